"""Rows quantized to llama.cpp's types: our kernels beside llama.cpp's own code, on one core.

    python benchmarks/gguf.py [--rounds 7] [--only Q4_K,Q6_K] [--core 1]

Both are libraries of the gguf builder, which is made if needed, and take turns on the same rows of
Gaussian weights. Printed are nanoseconds of CPU time per weight, medians; `ratio` is llama.cpp's
time divided by ours with 16 lanes (AVX-512) and 8 (AVX2), as far as this CPU has them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from weightsmith.building.progress import progress_for
from weightsmith.building.wiring import cache_folder
from weightsmith.core.kernels import library, quants
from weightsmith.outside.toolset import make_toolset, tools_variable

KINDS = ("Q4_K", "Q5_K", "Q6_K", "Q3_K", "Q2_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
SHAPE = (64, 4096)


def cpu() -> str:
    """Return the CPU's name, and whether it has AVX-512."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(line.split("\t: ", 1) for line in reversed(lines) if "\t: " in line)
    named = next((facts[key] for key in ("model name\t", "model name") if key in facts), "CPU")
    return f"{named}, {'with' if 'avx512f' in ' '.join(lines) else 'without'} AVX-512"


def ways(kind: str, rows: np.ndarray, weights: np.ndarray | None) -> dict[str, Callable[[], None]]:
    """Return what is measured: llama.cpp's function, and ours for each width of vectors."""
    number, ours, ggml = quants.number(kind), library.kernels(), library.ggml()
    made = np.empty((len(rows), quants.row_bytes(kind, rows.shape[1])), np.uint8)
    importance = None if weights is None else weights.ctypes.data
    count, columns = rows.shape

    def quantize(lanes: int) -> None:
        ours.weightsmith_lanes(lanes)
        ours.weightsmith_quantize_rows(
            number, rows.ctypes.data, made.ctypes.data, count, columns, importance
        )

    def llama() -> None:
        ggml.ggml_quantize_chunk(
            number, rows.ctypes.data, made.ctypes.data, 0, count, columns, importance
        )

    widths = [lanes for lanes in (16, 8, 4) if ours.weightsmith_lanes(lanes) == lanes]
    return {"llama.cpp": llama} | {
        f"{lanes} lanes": lambda lanes=lanes: quantize(lanes) for lanes in widths
    }


def measure(kind: str, rows: np.ndarray, weights: np.ndarray | None, rounds: int) -> list[str]:
    """Return the cells of one row of the table."""
    spent: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, way in ways(kind, rows, weights).items():
            began = time.thread_time()
            way()
            spent.setdefault(name, []).append(time.thread_time() - began)
    medians = {name: statistics.median(each) / rows.size * 1e9 for name, each in spent.items()}
    llama = medians["llama.cpp"]
    ratios = " / ".join(f"{llama / medians[name]:.1f}" for name in list(medians)[1:3])
    yes = "no" if weights is None else "yes"
    return [kind, yes, *(f"{value:.1f}" for value in medians.values()), ratios]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    options = parser.parse_args()
    made = make_toolset(cache_folder(), "kernels", progress_for())
    os.environ[tools_variable("kernels")] = str(made)
    os.sched_setaffinity(0, {options.core})
    random = np.random.default_rng(1)
    rows = (random.standard_normal(SHAPE) * 0.02).astype(np.float32)
    weights = random.lognormal(0, 1, SHAPE[1]).astype(np.float32)
    names = [name.replace("lanes", "lanes, ns") for name in ways("Q8_0", rows, None)]
    print(f"{cpu()}; one core, medians of {options.rounds} rounds\n")
    print("|", " | ".join(["type", "importance", *names, "ratio"]), "|")
    print("|" + "---|" * (len(names) + 3))
    for kind in options.only.split(","):
        for given in (None,) if kind == "Q8_0" else (None, weights):
            print("|", " | ".join(measure(kind, rows, given, options.rounds)), "|", flush=True)


if __name__ == "__main__":
    main()
