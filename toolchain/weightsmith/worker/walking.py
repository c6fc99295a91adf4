"""Measures importance in a copy of the program that quantizes, while the program starts.

Libraries are imported once, before there are two: also those that the copy alone needs, since it
takes longer. Nothing is computed before: with its first tensor, a process chooses torch's loops,
and the converter's differ.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from weightsmith.core.cpus import AVX2_LOOPS, has_avx2
from weightsmith.core.safe_parse import parse
from weightsmith.forward.libraries import import_models, load_torch_beside_transformers
from weightsmith.outside.forked import forked
from weightsmith.quantizers.gguf_settings import Walk
from weightsmith.quantizers.running import progress_line
from weightsmith.worker.calibrating import importance
from weightsmith.worker.virtual import computed_for_program


@contextmanager
def walking(walk: Walk | None) -> Iterator[Callable[[], object]]:
    """Measure importance while the block runs; yield a function that waits for the file.

    The file that an interrupted run has finished is taken.
    """
    if walk is None or Path(walk.out).is_file():
        yield lambda: None
        return
    load_torch_beside_transformers()
    import_models()
    with forked(partial(_measure, walk), "measuring importance") as copy:
        yield copy.join


def _measure(walk: Walk) -> None:
    gc.freeze()
    gc.enable()
    if has_avx2():
        os.environ.update(AVX2_LOOPS)
    rows = [parse(line) for line in Path(walk.texts).read_text("utf-8").splitlines()]
    with computed_for_program(compared=False):
        importance(Path(walk.model), rows, Path(walk.out), _tell)


def _tell(done: int, total: int, unit: str) -> None:
    # In one call: the program that starts meanwhile writes to the same place.
    os.write(1, f"{progress_line(done, total, unit)}\n".encode())
