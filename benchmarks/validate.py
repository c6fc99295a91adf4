"""Validation of a merge compared with one forward of the same probes in transformers.

    python benchmarks/validate.py [--case gigabyte|small|wide|large] [--rounds 3] [--only validate]
        [--work benchmarks/work]

Uses base and adapter of benchmarks/merge.py's cases with the tiny example's tokenizer, and runs
both alternately. `forward` loads the merged checkpoint with transformers in float32 and runs the
probes once, including imports and loading, as ours.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from merge import ROOT, make_inputs, run

OURS = """
import sys
from pathlib import Path
from weightsmith.validating.validate import ValidationRequest, validate
base, adapter, merged = map(Path, sys.argv[1:4])
assert validate(ValidationRequest(base=base, adapters=((adapter, 1.0),), merged=merged)).passed
"""
FORWARD = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from weightsmith.validating import probes
from weightsmith.validating.forwards import ProbeBatch
torch.set_num_threads(max(1, torch.get_num_threads() - 1))
merged = Path(sys.argv[1])
ids = probes.encode(probes.load_tokenizer(merged), probes.choose(()), 32000)
model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
with torch.inference_mode():
    model(input_ids=ProbeBatch.of(ids).ids, use_cache=False)
"""
MERGE = """
import sys
from pathlib import Path
from weightsmith.merging.engine import MergeRequest, merge
base, adapter, out = map(Path, sys.argv[1:4])
merge(MergeRequest(base=base, adapters=((adapter, 1.0),), out=out, dtype=sys.argv[4]))
"""


def make_merged(base: Path, adapter: Path, out: Path, dtype: str = "auto") -> None:
    """Merge once into a type, and add a tokenizer to both folders."""
    for path in (ROOT / "examples" / "tiny" / "base").iterdir():
        if "token" in path.name or "template" in path.name:
            shutil.copy(path, base)
    if not (out / "config.json").exists():
        words = [sys.executable, "-c", MERGE, str(base), str(adapter), str(out), dtype]
        subprocess.run(words, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", choices=("gigabyte", "small", "wide", "large"), default="small")
    parser.add_argument("--only", default="", help="comma-separated ways to run")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "work")
    parser.add_argument("--make", action="store_true", help="make the inputs, run nothing")
    options = parser.parse_args()
    out = options.work / f"validated-{options.case}"
    if options.make:
        make_merged(*make_inputs(options.work, options.case), out)
        return
    # In its own process: a child's peak memory starts at its parent's.
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--make"], check=True)
    base, adapter = make_inputs(options.work, options.case)
    python = [sys.executable, "-c"]
    ways = {
        "validate": [*python, OURS, str(base), str(adapter), str(out)],
        "one forward": [*python, FORWARD, str(out)],
    }
    ways = {k: v for k, v in ways.items() if not options.only or k in options.only.split(",")}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, argv in ways.items():
            found[name].append(run(argv))
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    print(f"Checkpoint {size / 1e9:.2f} GB, {os.cpu_count()} CPUs, median of {options.rounds}.\n")
    print("| way | CPU s | wall s | peak RSS MiB |\n|---|---|---|---|")
    for name, runs in found.items():
        cpu, wall, rss = (statistics.median(r[key] for r in runs) for key in ("cpu", "wall", "rss"))
        print(f"| {name} | {cpu:.1f} | {wall:.1f} | {rss:.0f} |")
    (options.work / "validate.json").write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
