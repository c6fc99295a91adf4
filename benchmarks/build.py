"""Times whole builds of the support bot: from an empty store, with nothing changed, and with a
changed context length; prints a Markdown table.

    python benchmarks/build.py [--rounds 3] [--runner auto]

The builders are made first, untimed. Everything is written below benchmarks/work/build.
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

ROOT = Path(__file__).parents[1]
WORK = ROOT / "benchmarks" / "work" / "build"
RECIPE = ROOT / "examples" / "support-bot" / "recipe.yaml"


def build(runner: str, *extra: str) -> tuple[float, dict]:
    """Run one build in its own process; return its wall seconds and its JSON."""
    words = ["build", "--recipe", str(RECIPE), "--runner", runner, "--json"]
    words += ["--dist", str(WORK / "dist"), *extra]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "weightsmith.cli.program", *words],
        env={**os.environ, "WEIGHTSMITH_STORE": str(WORK / "store")},
        check=True,
        stdout=subprocess.PIPE,
    )
    return time.monotonic() - began, json.loads(done.stdout)["targets"]


def listing() -> float:
    """Return the wall seconds of `--list`."""
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "weightsmith.cli.program", "--list"], check=True, capture_output=True
    )
    return time.monotonic() - began


def main() -> None:
    """Time all cases, `--rounds` times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--runner", default="auto")
    asked = parser.parse_args()
    times: dict[str, list[float]] = {}
    for number in range(asked.rounds + 1):
        shutil.rmtree(WORK, ignore_errors=True)
        row = {"empty store": build(asked.runner)[0], "nothing changed": build(asked.runner)[0]}
        length = ("--set", f"serve.max_model_len={1024 + 256 * number}")
        row["changed max_model_len"] = build(asked.runner, *length)[0]
        row["--list"] = listing()
        if number:  # the first round makes the builders and warms the caches
            for name, seconds in row.items():
                times.setdefault(name, []).append(seconds)
    shutil.rmtree(WORK, ignore_errors=True)
    print("| build | median s | each round |\n|---|---|---|")
    for name, seconds in times.items():
        each = ", ".join(f"{s:.2f}" for s in seconds)
        print(f"| {name} | {statistics.median(seconds):.2f} | {each} |")


if __name__ == "__main__":
    main()
