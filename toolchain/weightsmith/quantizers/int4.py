"""Symmetric 4-bit integers with a scale per group of inputs, packed as compressed-tensors does it.

A scale that cuts the largest weight off may err less in all. So a few are tried, and the one whose
error counts least is taken; an error counts by the importance of its input. Scales have the
checkpoint's type, so codes are of the scale that servers read.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from weightsmith.models.tensors import array_type

Floats = npt.NDArray[np.float32]

_DIVISORS = (7.0, 7.5, 8.0, 8.6, 9.3, 10.2)
"""The largest magnitude of a group, in units of a scale that is tried; codes reach from -8 to 7."""


def round_groups(
    rows: Floats, group: int, scales: str, importance: Floats | None = None
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.generic]]:
    """Return codes from -8 to 7 [n, inputs], and scales [n, groups] of the type `scales`.

    `inputs` is a multiple of `group`, `importance` is [inputs]. Raises ValueError for weights that
    are not finite.
    """
    count, inputs = rows.shape
    parts = rows.reshape(count, -1, group)
    most = np.abs(parts).max(2)
    if not np.isfinite(most).all():
        raise ValueError("weights that are not finite")
    counts = None if importance is None else importance.reshape(1, -1, group)
    dtype, least = array_type(scales), np.float32(2.0**-24)  # the least that float16 has
    best = np.full(most.shape, np.inf, np.float32)
    codes = np.zeros(parts.shape, np.int8)
    chosen = np.ones(most.shape, np.float32)
    for divisor in _DIVISORS:
        scale = np.maximum(most / np.float32(divisor), least).astype(dtype).astype(np.float32)
        made = np.rint(parts / scale[..., None])
        np.clip(made, -8, 7, out=made)
        wrong = parts - made * scale[..., None]
        np.multiply(wrong, wrong, out=wrong)
        if counts is not None:
            wrong *= counts
        error = wrong.sum(2)
        better = error < best
        best[better], chosen[better] = error[better], scale[better]
        codes[better] = made[better].astype(np.int8)
    return codes.reshape(count, inputs), chosen.astype(dtype)
