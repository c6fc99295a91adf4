"""Cost and loss of each format on the examples, as Markdown tables.

    python benchmarks/quantize.py [--example tiny] [--types q8_0,q4_k_m] [--runner auto]
    python benchmarks/quantize.py --example tiny --checkpoints fp8,w8a8,gptq,awq

GGUF types: one build per example with the gates off: size, bits, divergence from the merged
checkpoint on held-out text (`quality` of build.json) and the task score of the started image.

Checkpoints for vLLM: `quantize` of the merged example, each in its own process, with its CPU time,
peak memory and peak disk space; the task score is that of the dequantized weights in transformers.
Everything is written below benchmarks/work/quantize, which is deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from weightsmith.building.wiring import open_tools
from weightsmith.core.ports import Silent
from weightsmith.models.facts import read_facts
from weightsmith.quantizers import of_format
from weightsmith.recipe.file import read_recipe
from weightsmith.recipe.user_config import RunOptions
from weightsmith.stages.merge import merge
from weightsmith.stages.quantize import kept_bytes
from weightsmith.stages.resolve import resolve
from weightsmith.steps.destinations import InStore
from weightsmith.steps.lock import pinned, read_lock

ROOT = Path(__file__).parents[1]
WORK = ROOT / "benchmarks" / "work" / "quantize"
TYPES = "f16,q8_0,q6_k,q5_k_m,q4_k_m,q4_0,iq4_xs,q3_k_m,q2_k,iq2_xxs"
PROGRAM = (sys.executable, "-m", "weightsmith.cli.program")
HEADINGS = (
    *("example", "type", "MB", "bits", "KL mean", "KL p99", "top-1", "perplexity", "layer"),
    *("task", "gate"),
)
COSTS = ("example", "type", "CPU s", "wall s", "peak RSS MiB", "peak disk MB", "planned MB")
OFF = ("quality.gate=measure", "quantize.allow_low_bits=true")


def build(example: str, types: list[str], runner: str) -> list[dict]:
    """Build every type of an example and return its build.json."""
    words = ["build", "--recipe", str(ROOT / "examples" / example), "--runner", runner, "--json"]
    words += [word for kind in types for word in ("--target", f"llamacpp-{kind}")]
    suites = read_recipe(ROOT / "examples" / example / "recipe.yaml").recipe.evaluate
    places = [f"{n}." for n in range(len(suites))] if len(suites) > 1 else [""]
    settings = (*OFF, *(f"evaluate.{place}max_drop=1" for place in places))
    words += [word for setting in settings for word in ("--set", setting)]
    words += ["--dist", str(WORK / "dist"), "--layout", str(WORK / "images" / example)]
    done = subprocess.run(
        [*PROGRAM, *words],
        env={**os.environ, "WEIGHTSMITH_STORE": str(WORK / "store")},
        check=True,
        stdout=subprocess.PIPE,
    )
    reports = [Path(t["report"]) for t in json.loads(done.stdout)["targets"].values()]
    return [json.loads((report.parent / "build.json").read_text()) for report in reports]


def gguf_row(example: str, built: dict) -> list[str]:
    """Return one line of the table."""
    artifact = built["artifact"]
    return row(
        example,
        artifact["format"],
        artifact["size"],
        artifact["bits_per_weight"],
        built["quality"],
        built["scores"]["image"],
    )


def row(example: str, name: str, size: int, bits: float, lost: dict, score: dict) -> list[str]:
    """Return the cells of one line."""
    return [
        example,
        name,
        f"{size / 1e6:.1f}",
        f"{bits:.2f}",
        f"{lost['kl_mean']:.2g}",
        f"{lost['kl_p99']:.2g}",
        f"{lost['top1']:.3f}",
        f"{lost['perplexity_ratio']:.3f}",
        f"{lost['layer_error']:.2g}",
        f"{round(score['score'] * score['n'])} of {score['n']}",
        "stopped" if lost["exceeded"] else "passed",
    ]


def checkpoint_rows(example: str, name: str, model: Path) -> tuple[list[str], list[str]]:
    """Quantize the merged example; return one line for its loss and one for its cost."""
    file = read_recipe(ROOT / "examples" / example / "recipe.yaml")
    recipe = file.recipe
    folder = WORK / example / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = ["quantize", "--model", model, "--format", name, "--no-gate", "--runner", "local"]
    words += ["--calibration", file.folder / recipe.calibration.data, "--out", folder / "out"]
    told, cost = measured([*PROGRAM, *words, "--json"], folder)
    plain = dequantized(folder, name, model)
    asked = ["evaluate", "--model", plain, "--data", file.folder / recipe.evaluate[0].data]
    asked += ["--metric", recipe.evaluate[0].metric]
    asked += ["--max-tokens", recipe.evaluate[0].max_tokens]
    words = [*PROGRAM, *map(str, asked), "--runner", "local", "--json"]
    score = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
    details = told["details"]
    size = sum(path.stat().st_size for path in model.iterdir())
    quantizer = of_format(name)
    format_ = next(f for f in quantizer.formats if f.name == name)
    kept = kept_bytes(size, format_, read_facts(model))
    planned = quantizer.peak_disk(size, kept, format_, {}) / 1e6
    lost = row(example, name, details["size"], details["bits_per_weight"], told["quality"], score)
    costs = [f"{cost[key]:.1f}" for key in ("cpu", "wall", "rss", "disk")]
    return lost, [example, name, *costs, f"{planned:.1f}"]


def measured(words: list, folder: Path) -> tuple[dict, dict[str, float]]:
    """Run a command; return its JSON, CPU and wall seconds, peak MiB of memory and MB of disk."""
    began = time.monotonic()
    with watched(folder) as peak, (folder / ".told").open("wb") as out:
        process = subprocess.Popen([str(word) for word in words], stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{words} ended with {process.returncode}")
    cost = {"cpu": usage.ru_utime + usage.ru_stime, "wall": wall, "rss": usage.ru_maxrss / 1024}
    return json.loads((folder / ".told").read_text()), {**cost, "disk": peak[0] / 1e6}


@contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """Yield a list whose only number becomes the peak bytes of files below a folder."""
    seen, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):  # the worst moment is short: all is written, nothing deleted
            seen[0] = max(seen[0], used(folder))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def used(folder: Path) -> int:
    """Return the disk space of all files below a folder; files deleted meanwhile count as 0."""
    total = 0
    for place, _, names in os.walk(folder):  # unlike rglob, it bears folders that go meanwhile
        for name in names:
            try:
                total += 512 * Path(place, name).stat().st_blocks
            except OSError:
                continue
    return total


def dequantized(folder: Path, name: str, model: Path) -> Path:
    """Write the quantized checkpoint dequantized to float32; return its folder."""
    view = of_format(name).view(folder / "out", model)
    plain = shutil.copytree(
        model, folder / "plain", ignore=shutil.ignore_patterns("*.safetensors*")
    )
    weights = {n: np.ascontiguousarray(view.tensor(n)) for n in sorted(view.names)}
    save_file(weights, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config.pop("torch_dtype", None)
    (plain / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    return plain


def merged(example: str) -> Path:
    """Return the folder of an example's merged checkpoint in the user's store."""
    file = read_recipe(ROOT / "examples" / example / "recipe.yaml")
    file = pinned(file, read_lock(file))
    with open_tools(RunOptions(runner="local"), Silent()) as tools:
        store = InStore(tools.store)
        merged = merge(resolve(file, tools), file.recipe.merge, store, tools)
        return merged.value.tree.root


def say(cells: list[str] | tuple[str, ...]) -> None:
    """Print a line of a table."""
    print(f"| {' | '.join(cells)} |", flush=True)


def heading(cells: tuple[str, ...]) -> None:
    """Print a table's first lines."""
    say(cells)
    print(f"|{'---|' * len(cells)}")


def main() -> None:
    """Build or quantize, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--example", choices=("tiny", "support-bot"), default=None)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--checkpoints", default="", metavar="FORMATS")
    parser.add_argument("--runner", default="auto")
    asked = parser.parse_args()
    examples = [asked.example] if asked.example else ["tiny", "support-bot"]
    heading(HEADINGS)
    costs = []
    for example in examples:
        if not asked.checkpoints:
            for built in build(example, asked.types.split(","), asked.runner):
                say(gguf_row(example, built))
            continue
        model = merged(example)
        for name in asked.checkpoints.split(","):
            lost, cost = checkpoint_rows(example, name, model)
            say(lost)
            costs.append(cost)
    if costs:
        print()
        heading(COSTS)
        for cost in costs:
            say(cost)
    shutil.rmtree(WORK, ignore_errors=True)


if __name__ == "__main__":
    main()
