"""What `plan` says of formats without calibration, for a model of 70 billion weights.

    python benchmarks/plan_formats.py [--measure]

Llama 3.3 70B's shapes in bfloat16, with the tiny example's tokenizer and an adapter of rank 16 on
all linear layers. All weights are holes below benchmarks/work, which take no disk. With
`--measure`, one layer is timed in the local builder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import merge as shapes

ROOT = shapes.ROOT
TINY = ROOT / "examples" / "tiny" / "base"
TARGETS = ("vllm-fp8", "vllm-fp8-block", "vllm-nvfp4a16", "vllm-mxfp4a16")
RECIPE = """name: large
version: 1.0.0
base: {source: ./base}
adapters: [{source: ./adapter, version: v1}]
evaluate: {data: questions.jsonl}
targets: [vllm-fp8]
serve: {gpu: nvidia-h100-80gb, gpu_count: 2, max_model_len: 8192}
image: {repository: large}
"""


def make_inputs(folder: Path) -> None:
    """Write base, adapter, twenty questions and a recipe."""
    shutil.rmtree(folder, ignore_errors=True)
    shapes.RANK = 16
    shapes.make_base(folder / "base", shapes.WHOLE, sparse=True)
    for path in TINY.iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, folder / "base")
    shapes.make_adapter(folder / "adapter", shapes.WHOLE, "LORA", sparse=True)
    rows = [{"prompt": f"What is {n} times {n}?", "expected": str(n * n)} for n in range(20)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE)


def main() -> None:
    """Print the stages' table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true")
    asked = parser.parse_args()
    folder = ROOT / "benchmarks" / "work" / "plan-formats"
    make_inputs(folder)
    argv = [sys.executable, "-m", "weightsmith", "plan", "--recipe", folder / "recipe.yaml"]
    argv += ["--runner", "local", "--json", *(["--measure"] if asked.measure else [])]
    for name in TARGETS:
        argv += ["--target", name]
    told = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    plan = json.loads(told)
    print("| stage | target | reads GB | writes GB | memory MiB | s |\n|---|---|---|---|---|---|")
    for row in plan["stages"]:
        if row["cached"]:
            continue
        read, write = (round(row[f"{what}_bytes"] / 1e9, 1) or "" for what in ("read", "write"))
        memory = round(row["peak_memory_bytes"] / (1 << 20)) or ""
        seconds = row.get("seconds") or ""
        print(f"| {row['stage']} | {row['target']} | {read} | {write} | {memory} | {seconds} |")
    print(
        f"\nat most {plan['peak_memory_bytes'] / (1 << 20):.0f} MiB of memory"
        f" and {plan['peak_disk_bytes'] / 1e9:.0f} GB of disk"
    )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
