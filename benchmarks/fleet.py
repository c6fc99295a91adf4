"""Fleets of the tiny example: the fleet's own share, shared work done once, nothing changed.

    python benchmarks/fleet.py [--cells N]

Prints CPU seconds, which other programs on the machine change little, and seconds of the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny"


def fleet(folder: Path, *words: str) -> tuple[dict[str, Any], float, float]:
    """Run a fleet; return its rows, CPU seconds of all processes and seconds."""
    before, began = os.times(), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "weightsmith", "fleet", "--runner", "local", "--json", *words],
        cwd=folder, check=False, capture_output=True, text=True,
        env={**os.environ, "WEIGHTSMITH_STORE": str(folder / "store"),
             "DOCKER_HOST": f"unix://{folder}/none",
             "PYTHONPATH": f"{ROOT / 'toolchain'}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    after = os.times()
    cpu = sum(after[2:4]) - sum(before[2:4])
    return json.loads(done.stdout), cpu, time.monotonic() - began


def main() -> None:
    """Build a fleet of copies of one adapter, each with its own bytes, then build it again."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", type=int, default=4)
    cells = parser.parse_args().cells
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(TINY / "base", folder / "base")
        for file in ("recipe.yaml", "eval-a.jsonl", "calibration.jsonl"):
            shutil.copy(TINY / file, folder)
        for number in range(cells):
            place = folder / "adapters" / f"n{number:03}"
            shutil.copytree(TINY / "adapters" / "a", place)
            settings = json.loads((place / "adapter_config.json").read_text())
            # Another file, and nearly the same change: each adapter is merged by itself.
            settings["lora_alpha"] = settings["lora_alpha"] * (1 + number / 10_000)
            (place / "adapter_config.json").write_text(json.dumps(settings))
        (folder / "fleet.yaml").write_text(yaml.safe_dump({"adapters": ["./adapters/*"]}))
        first, cpu, seconds = fleet(folder)
        again, cpu_again, seconds_again = fleet(folder)
    bases = sum(row["kind"] == "base" and not row["cached"] for row in first["shared"])
    print(f"cells: {cells}, llamacpp-q4_k_m, on {len(os.sched_getaffinity(0))} CPUs")
    print(f"first run: {cpu:.1f} CPU seconds, {seconds:.1f} s")
    print(f"  the fleet's own process: {first['own_cpu_seconds']:.2f} CPU seconds,")
    print(f"  {100 * first['own_cpu_seconds'] / first['cpu_seconds']:.1f} % of all")
    print(f"  tasks for the base: {bases}; stages: {first['stages']}")
    print(f"nothing changed: {cpu_again:.1f} CPU seconds, {seconds_again:.1f} s")
    print(f"  stages run: {sum(row['run'] for row in again['stages'].values())}")


if __name__ == "__main__":
    main()
