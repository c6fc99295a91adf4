"""Builds two adapters on one base, one after the other, and prints what each stage took.

    python benchmarks/next_adapter.py [--case 0.3b|1b] [--second unrelated|retrained] [--one-cpu]
        [--sure] [--tokenizer CHECKPOINT] [--work benchmarks/work]

Base and first adapter are those of `large_build.py`, with the support bot's 33 questions, answers
of 32 tokens and everything else as a build does by default. The second adapter finds in the store
what depends on the base alone. It is of other random numbers, or, `retrained`, the first one with a
hundredth of others added. With `--sure`, each token has a word that surely follows it: of random
weights, no token is much likelier than the next, which is true of no trained model, so that
rounding decides what follows, and neither drafts nor margins save any work. Weights are quantized
and measured beside validation and reference answers, so CPU seconds by stage are right with
`--one-cpu` only, where they follow one another.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import large_build as large
import merge as shapes

QUESTIONS = shapes.ROOT / "examples" / "support-bot" / "eval.jsonl"
RECIPE = """name: {name}
version: 1.0.0
base: {{source: ./base}}
adapters: [{{source: ./{name}, version: v1}}]
evaluate: {{data: questions.jsonl, max_drop: 1.0, max_tokens: 32}}
targets: [llamacpp-q4_k_m]
serve: {{max_model_len: 512, max_num_seqs: 2}}
image: {{repository: {name}}}
"""


def make_second(folder: Path, shape: shapes.Shape, kind: str) -> None:
    """Write the second adapter, unless it is there."""
    import numpy as np
    from weightsmith.models.safetensors import read_header

    if (folder / kind / "adapter_config.json").exists():
        return
    shutil.rmtree(folder / kind, ignore_errors=True)
    shapes.make_adapter(folder / kind, shape, "LORA", seed=2)
    if kind == "retrained":
        first, second = (folder / name / "adapter_model.safetensors" for name in ("adapter", kind))
        start = min(tensor.start for tensor in read_header(first).tensors)
        ours = np.memmap(second, np.float32, "r+", start)
        ours *= 0.01
        ours += np.memmap(first, np.float32, "r", start)


def make_sure(base: Path, hidden: int) -> None:
    """Let a word follow each token: what the head looks for is that token's own embedding.

    `make_base` repeats one block of weights, so embeddings have a period. They become so large that
    the layers, whose work stays the same, hardly turn them.
    """
    import ml_dtypes
    import numpy as np
    from weightsmith.models.safetensors import open_checkpoint

    places = {one.name: (s.path, one) for s in open_checkpoint(base).shards for one in s.tensors}

    def rows(name: str) -> np.ndarray:
        path, found = places[name]
        stored = np.memmap(path, np.uint16, "r+", found.start, found.shape)
        return stored.view(ml_dtypes.bfloat16)

    known = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(number for word, number in known.items() if word.isalpha())
    embedding, head = rows("model.embed_tokens.weight"), rows("lm_head.weight")
    head[:], rows("model.norm.weight")[:] = 0, 1
    for token in range(min((1 << 22) // hidden, len(embedding))):
        head[words[token % len(words)]] += embedding[token] / 2
    for start in range(0, len(embedding), 4096):
        embedding[start : start + 4096] *= ml_dtypes.bfloat16(64)


def main() -> None:
    """Make the inputs, build both, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=large.CASES, default="0.3b")
    parser.add_argument("--second", choices=("unrelated", "retrained"), default="unrelated")
    parser.add_argument("--one-cpu", action="store_true")
    parser.add_argument("--sure", action="store_true")
    parser.add_argument("--tokenizer", type=Path, default=large.TINY, metavar="CHECKPOINT")
    parser.add_argument("--work", type=Path, default=shapes.ROOT / "benchmarks" / "work")
    asked = parser.parse_args()
    if asked.one_cpu:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    real = "" if asked.tokenizer == large.TINY else "-real"
    kind = "sure" if asked.sure else "next"
    folder, shape = asked.work / f"{kind}-{asked.case}{real}", large.CASES[asked.case]
    if real:  # SmolLM2's has more tokens than the smallest case
        shape = replace(shape, vocabulary=max(shape.vocabulary, 49152))
    folder.mkdir(parents=True, exist_ok=True)
    made = (folder / "base" / "config.json").exists()
    large.make_inputs(folder, shape, 0, asked.tokenizer)
    if asked.sure and not made:
        make_sure(folder / "base", shape.hidden)
    make_second(folder, shape, asked.second)
    shutil.copy(QUESTIONS, folder / "questions.jsonl")
    for name in ("store", "dist"):
        shutil.rmtree(folder / name, ignore_errors=True)
    loads = " ".join(f"{load:.1f}" for load in os.getloadavg())
    seen = []
    for name in ("adapter", asked.second):
        (folder / f"{name}.yaml").write_text(RECIPE.format(name=name))
        seen.append(large.build(folder, f"{name}.yaml"))
        if seen[-1].exit_code:
            raise SystemExit(seen[-1].exit_code)
    print(f"{len(os.sched_getaffinity(0))} CPUs, load before {loads}, second {asked.second}\n")
    print("| stage | CPU s, first | second | wall s, first | second |\n|---|---|---|---|---|")
    first, second = ({row[0]: row[1:3] for row in one.rows} for one in seen)
    total = [[sum(row[n] for row in one.values()) for n in (0, 1)] for one in (first, second)]
    for stage, *both in [(n, first[n], second.get(n, (0, 0))) for n in first] + [("all", *total)]:
        cells = (f"{one[n]:.1f}" for n in (0, 1) for one in both)
        print(f"| {stage} | {' | '.join(cells)} |")
    for name in ("store", "dist"):
        shutil.rmtree(folder / name, ignore_errors=True)


if __name__ == "__main__":
    main()
