"""What each GGUF type costs and loses on the examples, as a Markdown table.

    python benchmarks/quantize.py [--example tiny] [--types q8_0,q4_k_m] [--runner auto]
    python benchmarks/quantize.py --by-hand CHECKPOINT [--rounds 3]

The second form times q4_k_m with an importance matrix: our job in the local builder, which also
applies the chat template and reads the file back, against llama.cpp's three commands.

One build per example with the gates off: size, bits, divergence from the merged checkpoint on
held-out text (`quality` of build.json) and the task score of the started image. Everything is
written below benchmarks/work/quantize, whose store is kept until the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from toolchain.drivers.environment import Pins, environment_folder
from toolchain.drivers.toolset import toolset_folder
from toolchain.quantizers.calibration import GENERAL, Bounds, read_texts
from toolchain.wiring import cache_folder

ROOT = Path(__file__).parents[1]
WORK = ROOT / "benchmarks" / "work" / "quantize"
HAND = WORK.with_name("quantize-by-hand")
TYPES = "f16,q8_0,q6_k,q5_k_m,q4_k_m,q4_0,iq4_xs,q3_k_m,q2_k,iq2_xxs"
HEADINGS = (
    *("example", "type", "MB", "bits", "KL mean", "KL p99", "top-1", "perplexity", "layer"),
    *("task", "gate"),
)
OFF = ("quality.gate=false", "evaluate.max_drop=1", "quantize.allow_low_bits=true")


def build(example: str, types: list[str], runner: str) -> list[dict]:
    """Build every type of an example and return its build.json."""
    words = ["build", "--recipe", str(ROOT / "examples" / example), "--runner", runner, "--json"]
    words += [word for kind in types for word in ("--target", f"llamacpp-{kind}")]
    words += [word for setting in OFF for word in ("--set", setting)]
    words += ["--dist", str(WORK / "dist"), "--layout", str(WORK / "images" / example)]
    done = subprocess.run(
        [sys.executable, "-m", "toolchain.cli.program", *words],
        env={**os.environ, "WEIGHTSMITH_STORE": str(WORK / "store")},
        check=True,
        stdout=subprocess.PIPE,
    )
    reports = [Path(t["report"]) for t in json.loads(done.stdout)["targets"].values()]
    return [json.loads((report.parent / "build.json").read_text()) for report in reports]


def row(example: str, built: dict) -> str:
    """Return one line of the table."""
    artifact, lost = built["artifact"], built["quality"]
    score = built["scores"]["image"]
    cells = [
        example,
        artifact["format"],
        f"{artifact['size'] / 1e6:.1f}",
        f"{artifact['bits_per_weight']:.2f}",
        f"{lost['kl_mean']:.2g}",
        f"{lost['kl_p99']:.2g}",
        f"{lost['top1']:.3f}",
        f"{lost['perplexity_ratio']:.3f}",
        f"{lost['layer_error']:.2g}",
        f"{round(score['score'] * score['n'])} of {score['n']}",
        "stopped" if lost["exceeded"] else "passed",
    ]
    return f"| {' | '.join(cells)} |"


OURS = """
import sys
from pathlib import Path
from toolchain.drivers.local import LocalRunner
from toolchain.ports import Silent
from toolchain.quantizers import formats
from toolchain.quantizers.calibration import GENERAL, Bounds, read_texts
from toolchain.stages.quantize import Wanted, job_of
from toolchain.wiring import cache_folder
model, out = map(Path, sys.argv[1:])
wanted = Wanted(name="m", format=formats()["q4_k_m"], options={"imatrix": "auto"},
                texts=read_texts(GENERAL, Bounds()))
LocalRunner(cache_folder()).run(job_of(model, 1 << 30, wanted, out), Silent())
"""


def by_hand(model: Path, rounds: int) -> None:
    """Print wall and CPU seconds of our job and of llama.cpp's commands, in turn."""
    cache = cache_folder()
    tools = toolset_folder(cache, "llamacpp")
    python = environment_folder(cache, Pins(name="gguf", flavour="cpu")) / "bin" / "python"
    rows = read_texts(GENERAL, Bounds()).calibration
    times: dict[str, list[tuple[float, float]]] = {"weightsmith": [], "by hand": []}
    for _ in range(rounds):
        shutil.rmtree(HAND, ignore_errors=True)
        for name in times:
            (HAND / name).mkdir(parents=True)
        ours = [sys.executable, "-c", OURS, str(model), str(HAND / "weightsmith")]
        times["weightsmith"].append(timed([ours], ROOT, {}))
        hand = HAND / "by hand"
        (hand / "text").write_text("\n".join(str(row["text"]) for row in rows))
        threads = str(max(1, len(os.sched_getaffinity(0)) - 1))
        files = ["--imatrix", "imatrix.gguf", "f16.gguf", "m.gguf", "Q4_K_M"]
        settings = ["--no-ppl", "-t", threads, "-fa", "off"]
        words: list[list] = [
            [python, tools / "convert" / "convert_hf_to_gguf.py", model, "--outfile", "f16.gguf"],
            [tools / "bin" / "llama-imatrix", "-m", "f16.gguf", "-f", "text", *settings],
            [tools / "bin" / "llama-quantize", *files],
        ]
        paths = {"PYTHONPATH": f"{tools}/convert:{tools}/convert/gguf-py"}
        variant = {"WEIGHTSMITH_CPU_VARIANT": "x86-64-v3"}
        times["by hand"].append(timed(words, hand, {**paths, **variant}))
    print("| way | wall s | CPU s | each round's CPU |\n|---|---|---|---|")
    for name, found in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*found, strict=True))
        each = ", ".join(f"{c:.1f}" for _, c in found)
        print(f"| {name} | {wall:.1f} | {cpu:.1f} | {each} |")
    shutil.rmtree(HAND, ignore_errors=True)


def timed(commands: list[list], folder: Path, env: dict[str, str]) -> tuple[float, float]:
    """Run commands in turn; return their wall and CPU seconds."""
    before, began = os.times(), time.monotonic()
    for words in commands:
        subprocess.run(
            [str(word) for word in words],
            cwd=folder,
            env={**os.environ, **env},
            check=True,
            capture_output=True,
        )
    after = os.times()
    cpu = after.children_user + after.children_system
    return time.monotonic() - began, cpu - before.children_user - before.children_system


def main() -> None:
    """Build, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--example", choices=("tiny", "support-bot"), default=None)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--runner", default="auto")
    parser.add_argument("--by-hand", type=Path, default=None, metavar="CHECKPOINT")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    if asked.by_hand:
        by_hand(asked.by_hand.absolute(), asked.rounds)
        return
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    for example in [asked.example] if asked.example else ["tiny", "support-bot"]:
        for built in build(example, asked.types.split(","), asked.runner):
            print(row(example, built), flush=True)
    shutil.rmtree(WORK, ignore_errors=True)


if __name__ == "__main__":
    main()
