"""What each GGUF type costs and loses on the examples, as a Markdown table.

    python benchmarks/quantize.py [--example tiny] [--types q8_0,q4_k_m] [--runner auto]

One build per example with the gates off: size, bits, divergence from the merged checkpoint on
held-out text (`quality` of build.json) and the task score of the started image. Everything is
written below benchmarks/work/quantize, whose store is kept until the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORK = ROOT / "benchmarks" / "work" / "quantize"
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


def main() -> None:
    """Build, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--example", choices=("tiny", "support-bot"), default=None)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--runner", default="auto")
    asked = parser.parse_args()
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    for example in [asked.example] if asked.example else ["tiny", "support-bot"]:
        for built in build(example, asked.types.split(","), asked.runner):
            print(row(example, built), flush=True)
    shutil.rmtree(WORK, ignore_errors=True)


if __name__ == "__main__":
    main()
