"""CPU seconds and memory of formats without calibration, made of base and adapter.

    python benchmarks/quantize_unwritten.py [--case billion|layer70b] [--formats fp8,fp8-block]
        [--rounds 1]

A Llama of 1.07 billion random weights, or one layer of a model of 70 billion, with the tiny
example's tokenizer and an adapter of rank 64 on all linear layers. Each job runs in the local
builder, in a process of its own: the merge that writes its files, the one that writes headers
alone, and then each format, of the files and of base and adapter, which must give the same bytes.
Files are written below benchmarks/work.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
from pathlib import Path
from shutil import rmtree

from merge import LAYER, make_adapter
from quantize_by_hand import BILLION, ROOT, billion, timed

WORK = ROOT / "benchmarks" / "work" / "quantize-unwritten"
CASES = {"billion": BILLION, "layer70b": LAYER}

MERGE = """
import json, sys
from pathlib import Path
from weightsmith.outside.local import LocalRunner
from weightsmith.core.jobs import Input
from weightsmith.core.jobs import MergeJob
from weightsmith.core.merge_options import Merge
from weightsmith.core.ports import Silent
from weightsmith.building.wiring import cache_folder
base, adapter, out, headers_only = sys.argv[1:]
job = MergeJob(builder="merge", base=Input(path=Path(base)), weights=(1.0,), options=Merge(),
               adapters=(Input(path=Path(adapter)),), output=Path(out), seconds=0,
               memory_bytes=4 << 30, headers_only=bool(headers_only))
made = LocalRunner(cache_folder()).run(job, Silent())
digests = {shard["file"]: shard["sha256"] for shard in made["shards"]}
Path(f"{out}.json").write_text(json.dumps([digests, made.get("largest", {})]))
"""

QUANTIZE = """
import json, sys
from dataclasses import replace
from pathlib import Path
from weightsmith.outside.local import LocalRunner
from weightsmith.core.jobs import Input, Virtual
from weightsmith.core.merge_options import Merge
from weightsmith.core.ports import Silent
from weightsmith.quantizers import formats
from weightsmith.stages.quantize import QuantizeOptions, job_of
from weightsmith.building.wiring import cache_folder
base, adapter, model, name, out, headers_only = sys.argv[1:]
job = job_of(Input(path=Path(model)), 4 << 30, QuantizeOptions(name="m", format=formats()[name]),
             Path(out))
if headers_only:
    digests, largest = json.loads(Path(f"{model}.json").read_text())
    virtual = Virtual(base=Input(path=Path(base)), adapters=(Input(path=Path(adapter)),),
                      weights=(1.0,), options=Merge(), digests=digests, largest=largest)
    job = replace(job, virtual=virtual)
LocalRunner(cache_folder()).run(job, Silent())
"""


def digest_of(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def once(name: str, base: Path, adapter: Path) -> dict[str, tuple[float, ...]]:
    """Return the measures of both ways to a format; end the program if their bytes differ."""
    found, made = {}, []
    for way, headers_only in (("files", ""), ("base and adapter", "1")):
        rmtree(WORK, ignore_errors=True)
        model, out = WORK / "model", WORK / "out"
        model.mkdir(parents=True)
        out.mkdir()
        merge = [sys.executable, "-c", MERGE, base, adapter, model, headers_only]
        found[f"merge for {way}"] = timed([merge], ROOT, WORK)
        quantize = [sys.executable, "-c", QUANTIZE, base, adapter, model, name, out, headers_only]
        found[f"{name} of {way}"] = timed([quantize], ROOT, WORK)
        made.append({path.name: digest_of(path) for path in out.iterdir()})
    if made[0] != made[1]:
        sys.exit(f"{name}: the bytes differ")
    return found


def main() -> None:
    """Measure each format, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, default="billion")
    parser.add_argument("--formats", default="fp8,fp8-block,w8a8,nvfp4a16,mxfp4a16")
    parser.add_argument("--rounds", type=int, default=1)
    asked = parser.parse_args()
    base, adapter = (WORK.with_name(f"{asked.case}-{what}") for what in ("tiny", "lora"))
    billion(ROOT / "examples" / "tiny" / "base", base, CASES[asked.case])
    if not adapter.exists():
        make_adapter(adapter, CASES[asked.case], "LORA")
    print("| job | wall s | CPU s | peak MiB | disk MB |\n|---|---|---|---|---|")
    for name in asked.formats.split(","):
        rounds = [once(name, base, adapter) for _ in range(asked.rounds)]
        for job in rounds[0]:
            columns = zip(*(one[job] for one in rounds), strict=True)
            wall, cpu, peak, disk = map(statistics.median, columns)
            print(f"| {job} | {wall:.1f} | {cpu:.1f} | {peak:.0f} | {disk:.0f} |", flush=True)
    rmtree(WORK, ignore_errors=True)


if __name__ == "__main__":
    main()
