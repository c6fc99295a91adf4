"""Builds a synthetic model from base and adapter, and prints what each stage took.

    python benchmarks/large_build.py [--case 0.3b|1b|7b] [--questions 5] [--tokenizer CHECKPOINT]
        [--work benchmarks/work]

The model is a Llama in bfloat16 with random weights of 0.32, 1.17 or 7.38 billion, with an adapter
of rank 16 on every linear layer. The build is the default one for llama.cpp's Q4_K_M with the local
runner and a store of its own; the image is started and asked. `--tokenizer` takes a real
model's tokenizer (SmolLM2's, of 49,152 tokens); the default is the tiny example's, which cuts the
same texts into three times as many tokens. The head prefers the tokenizer's words, so that the
image says something; it is nothing right, so the verdict is "not proven".
Memory is the largest sum of the anonymous memory of all processes, seen ten times a second; pages
of mapped files do not count. CPU seconds are those of the build and of all processes that ended in
the stage. Validation and reference share a process and are in one row. The 7b case needs 16 GB of
disk for the base and 15 GB for the build. Builders must be there: a first build of `examples/tiny`
makes them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import merge as shapes
from proof import BILLION

ROOT = shapes.ROOT
TINY = ROOT / "examples" / "tiny" / "base"
CASES = {
    "0.3b": shapes.Shape(1024, 4096, 16, 16, 8, 32000),
    "1b": BILLION,
    "7b": shapes.Shape(4096, 14336, 32, 32, 8, 49152),
}
RECIPE = """name: large
version: 1.0.0
base: {{source: ./base}}
adapters: [{{source: ./adapter, version: v1}}]
evaluate: {{data: questions.jsonl, max_drop: 1.0, max_tokens: 8, limit: {questions}}}
targets: [llamacpp-q4_k_m]
serve: {{max_model_len: 512, max_num_seqs: 2}}
image: {{repository: large}}
"""
_ENDED = re.compile(r"^(\w[\w-]*): (?:done|cached)")
_TICKS = os.sysconf("SC_CLK_TCK")


def make_inputs(folder: Path, shape: shapes.Shape, questions: int, tokenizer: Path) -> None:
    """Write base, adapter, questions and recipe, unless they are there."""
    shapes.RANK = 16
    if not (folder / "base" / "config.json").exists():
        shutil.rmtree(folder / "base", ignore_errors=True)
        shapes.make_base(folder / "base", shape)
        for path in tokenizer.iterdir():
            if "token" in path.name or path.suffix == ".jinja":
                shutil.copy(path, folder / "base")
        prefer_words(folder / "base")
    if not (folder / "adapter" / "adapter_config.json").exists():
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        shapes.make_adapter(folder / "adapter", shape, "LORA")
    rows = [{"prompt": f"What is {n} times {n}?", "expected": str(n * n)} for n in range(questions)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "questions.jsonl").write_text(text)
    (folder / "recipe.yaml").write_text(RECIPE.format(questions=questions))


def prefer_words(base: Path) -> None:
    """Make the logits of all tokens small but those of words: others are no text, or end it."""
    import ml_dtypes
    import numpy as np
    from weightsmith.models.safetensors import open_checkpoint

    known = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(number for word, number in known.items() if word.isalpha())
    shards = open_checkpoint(base).shards
    path, head = next((s.path, t) for s in shards for t in s.tensors if t.name == "lm_head.weight")
    rows = np.memmap(path, np.uint16, "r+", head.start, head.shape).view(ml_dtypes.bfloat16)
    kept = rows[words]
    for start in range(0, len(rows), 4096):
        rows[start : start + 4096] *= ml_dtypes.bfloat16(1 / 64)
    rows[words] = kept


@dataclass
class Watch:
    """The memory and CPU time of a process and its descendants, by stage."""

    pid: int
    peak: int = 0
    """Anonymous KiB since the last stage ended."""
    cpu: float = 0.0
    """CPU seconds up to the end of the last stage."""
    began: float = field(default_factory=time.monotonic)
    rows: list[tuple[str, float, float, float]] = field(default_factory=list)
    """Stage, CPU seconds, wall seconds, peak MiB."""
    ended: bool = False
    exit_code: int = 0

    def sample(self) -> None:
        """Look ten times a second until the build has ended."""
        while not self.ended:
            self.peak = max(self.peak, sum(map(_anonymous, _family(self.pid))))
            time.sleep(0.1)

    def end(self, stage: str) -> None:
        """Write down what a stage took."""
        cpu, now = _cpu(self.pid), time.monotonic()
        self.rows.append((stage, cpu - self.cpu, now - self.began, self.peak / 1024))
        self.cpu, self.began, self.peak = cpu, now, 0


def _family(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        try:
            for task in Path(f"/proc/{one}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def _anonymous(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(row.split()[1]) for row in text.splitlines() if "RssAnon" in row), 0)


def _cpu(pid: int) -> float:
    """Return CPU seconds of a process, of those it waited for, and of those still running."""
    total = 0
    for one in _family(pid):
        try:
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(map(int, fields[11:15]))
    return total / _TICKS


def build(folder: Path, recipe: str = "recipe.yaml") -> Watch:
    """Build, and return what was seen; the image is started by our own sandbox, as a child."""
    words = ["build", "--recipe", str(folder / recipe), "--runner", "local", "--json"]
    nobody = {"DOCKER_HOST": f"unix://{folder}/none"}
    process = subprocess.Popen(
        [sys.executable, "-m", "weightsmith.cli.program", *words, "--dist", str(folder / "dist")],
        env=os.environ | nobody | {"WEIGHTSMITH_STORE": str(folder / "store")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watch = Watch(process.pid)
    threading.Thread(target=watch.sample, daemon=True).start()
    for line in process.stderr:
        sys.stderr.write(line)
        if match := _ENDED.match(line):
            watch.end(match[1])
    print(process.stdout.read(), file=sys.stderr)
    watch.ended = True
    watch.exit_code = process.wait()
    return watch


def main() -> None:
    """Make the inputs, build, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, default="1b")
    parser.add_argument("--questions", type=int, default=5)
    parser.add_argument("--tokenizer", type=Path, default=TINY, metavar="CHECKPOINT")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "work")
    asked = parser.parse_args()
    folder = asked.work / f"large-{asked.case}{'' if asked.tokenizer == TINY else '-real'}"
    folder.mkdir(parents=True, exist_ok=True)
    make_inputs(folder, CASES[asked.case], asked.questions, asked.tokenizer)
    for name in ("store", "dist"):
        shutil.rmtree(folder / name, ignore_errors=True)
    loads = " ".join(f"{load:.1f}" for load in os.getloadavg())
    seen = build(folder)
    rows = seen.rows
    print(f"{os.cpu_count()} CPUs, load before {loads}, {asked.questions} questions\n")
    print("| stage | CPU s | wall s | peak anonymous MiB |\n|---|---|---|---|")
    for stage, cpu, wall, peak in rows:
        print(f"| {stage} | {cpu:.1f} | {wall:.1f} | {peak:.0f} |")
    sums = [sum(row[n] for row in rows) for n in (1, 2)]
    print(f"| all | {sums[0]:.1f} | {sums[1]:.1f} | {max(row[3] for row in rows):.0f} |")
    for name in ("store", "dist"):
        shutil.rmtree(folder / name, ignore_errors=True)
    sys.exit(seen.exit_code)


if __name__ == "__main__":
    main()
