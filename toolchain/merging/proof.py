"""The finished merge, read back and recomputed another way on rows drawn at random."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from toolchain.checkpoints.safetensors import open_checkpoint
from toolchain.errors import CheckFailed
from toolchain.merging.outputs import Output, Term
from toolchain.merging.plan import MergePlan
from toolchain.merging.rounding import F64, FORMATS
from toolchain.merging.stream import Files

ROWS = 16
"""Rows per tensor: a wrong scaling, order, place or transposition shows in any of them."""


def prove(plan: MergePlan, out: Path, *, exact: bool) -> None:
    """Compare random rows of every merged tensor, as written, with float64 sums of the inputs.

    Rows are drawn by the tensor's name, so that a failure can be seen again. The written headers
    are read afresh, with all their checks. Raises CheckFailed naming the first tensor that is off.
    """
    written = {i.name: (s.path, i) for s in open_checkpoint(out).shards for i in s.tensors}
    files = Files()
    try:
        for output in plan.outputs.values():
            if output.kind == "merged" and output.size and not output.change:
                path, info = written[output.name]
                found = np.concatenate(
                    [files.rows(path, info, row, 1, output.columns) for row in _places(output)]
                )
                _compare(output.name, _wanted(output, files), found, exact=exact)
    finally:
        files.close()


def _places(output: Output) -> list[int]:
    seed = int.from_bytes(hashlib.sha256(output.name.encode()).digest()[:7], "little")
    places: list[int] = np.random.default_rng(seed).integers(0, output.rows, ROWS).tolist()
    return places


def _wanted(output: Output, files: Files) -> np.ndarray:
    """Return W + Σ factor · (B·A) of the drawn rows in float64."""
    return np.concatenate([_row(output, files, row) for row in _places(output)])


def _row(output: Output, files: Files, row: int) -> np.ndarray:
    total = output.source.rows(files, row, 1, output.columns).astype(F64)
    for patch in output.patches:
        if row in patch.places:
            place = len(patch.places) - 1 - patch.places[::-1].index(row)
            total = patch.stored.rows(files, place, 1, output.columns).astype(F64)
    for term in output.terms:
        if term.first <= row < term.first + term.shape[0]:
            total += _product(term, files, row - term.first)
    return total


def _product(term: Term, files: Files, row: int) -> np.ndarray:
    left = files.matrix(term.left)[row : row + 1].astype(F64)
    right = files.matrix(term.right).astype(F64) if term.right else np.ones((1, 1))
    product: np.ndarray = term.factor * (left @ right)
    return product


def _compare(name: str, wanted: np.ndarray, found: np.ndarray, *, exact: bool) -> None:
    """Allow half a unit in the last place, and what float64 or, for `fast`, float32 may be off."""
    form = FORMATS[found.dtype]
    size = np.abs(wanted)
    room = size * 2.0**-form.precision * (1 + 2.0**-20) + 2.0 ** (form.least - form.precision)
    # Sums that cancel are off by a part of what went in, which the row's largest value bounds.
    room += size.max(1, keepdims=True) * (2.0**-40 if exact else 2.0**-16)
    off = np.abs(found.astype(F64) - wanted) > room
    if off.any() or not np.isfinite(found).all():
        raise CheckFailed(
            f"{name} was written wrong: {int(off.sum())} of {off.size} elements that were "
            "recomputed differ",
            hint="memory or disk may be faulty: merge again, on another machine if it recurs",
        )
