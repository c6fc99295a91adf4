"""Times 10,000 serving plans (models x GPUs x lengths) in one process, and one render.

Usage: python benchmarks/plan.py
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Iterator
from itertools import cycle, islice, product
from pathlib import Path

from weightsmith.building.targets import all_targets
from weightsmith.core.errors import WeightsmithError
from weightsmith.models.facts import ModelFacts
from weightsmith.serving.devices import GPUS
from weightsmith.serving.engine import ServeOptions
from weightsmith.stages.render import render

MODELS = Path(__file__).parents[1] / "tests" / "golden" / "models"
COUNT = 10_000


def cases() -> Iterator[tuple[dict, str, ServeOptions]]:
    """Yield every model on every GPU, at several lengths, on each engine."""
    models = [json.loads(path.read_text("utf-8")) for path in sorted(MODELS.glob("*.json"))]
    engines = ("vllm", "sglang", "trtllm", "tgi", "llamacpp-q8_0")
    lengths = (None, 1024, 4096, 8192, 32768)
    for model, gpu, count, length, engine in product(models, GPUS, (1, 2, 8), lengths, engines):
        yield model, engine, ServeOptions(gpu=gpu, gpu_count=count, max_model_len=length)


def sweep() -> tuple[float, int]:
    """Return the seconds for COUNT plans, and how many of them fit."""
    targets, fitting = all_targets(), 0
    todo = list(islice(cycle(cases()), COUNT))
    began = time.perf_counter()
    for model, engine, wishes in todo:
        try:
            plan = targets[engine].engine.plan(
                ModelFacts.of(model["config"]), model["weight_bytes"], wishes
            )
        except WeightsmithError:
            continue
        fitting += plan.fits
    return time.perf_counter() - began, fitting


def one_render() -> float:
    """Return the seconds for one render of all files."""
    model = json.loads((MODELS / "llama-3-8b.json").read_text("utf-8"))
    began = time.perf_counter()
    render(
        target=all_targets()["vllm"],
        name="bench",
        version="1",
        model=ModelFacts.of(model["config"]),
        model_file="",
        weight_bytes=model["weight_bytes"],
        options=ServeOptions(gpu="nvidia-l40s"),
        image="",
        made_from=(),
    )
    return time.perf_counter() - began


def main() -> None:
    """Print a table of medians."""
    runs = [sweep() for _ in range(3)]
    seconds = statistics.median(run[0] for run in runs)
    renders = statistics.median(one_render() for _ in range(9))
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")
    print("| what | median |\n|---|---|")
    print(f"| {COUNT:,} plans, of which {runs[0][1]:,} fit | {seconds:.2f} s |")
    print(f"| one plan | {seconds / COUNT * 1000:.3f} ms |")
    print(f"| one render with every file | {renders * 1000:.0f} ms |")


if __name__ == "__main__":
    main()
