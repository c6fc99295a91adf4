"""Prune a delta: keep its largest weights, or random ones.

DARE draws from a counter-based stream keyed by seed, tensor and adapter, so that neither threads
nor the order of adapters change the result.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

_CHUNK = 1 << 20
"""Elements per call of the generator; must be even; the result does not depend on it."""


def keep_largest(delta: np.ndarray, density: float) -> np.ndarray:
    """Zero all but the ⌊density · n⌋ weights of largest magnitude in place; return the delta.

    `delta` is float32 and contiguous. Among equal magnitudes the first in row order are kept, so
    the result is deterministic (PEFT's `torch.topk` is not). This is the trimming of TIES (Yadav
    et al., "TIES-Merging", 2023, section 4) per tensor, as in PEFT.
    """
    flat = delta.reshape(-1)
    kept = int(density * len(flat))
    if kept >= len(flat):
        return delta
    if kept == 0:
        flat[:] = 0
        return delta
    # Magnitudes of floats sort like their bits.
    bits = flat.view(np.uint32) & np.uint32(0x7FFFFFFF)
    least = np.partition(bits, len(bits) - kept)[len(bits) - kept]
    drop = bits < least
    equal = np.flatnonzero(bits == least)
    drop[equal[kept - int(np.count_nonzero(bits > least)) :]] = True
    flat[drop] = 0
    return delta


def drop_at_random(delta: np.ndarray, density: float, *names: str) -> np.ndarray:
    """Keep each weight with probability `density` and divide it by that, in place.

    DARE (Yu et al., "Language Models are Super Mario", 2023). The draws depend only on `names`
    (seed, tensor and adapter) and the weight's position in row order, not on threads, blocks or
    the order of tensors. The generator is Philox 4x64 keyed by the SHA-256 of the names.
    """
    flat = delta.reshape(-1)
    digest = hashlib.sha256("\0".join(names).encode()).digest()
    stream = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    limit = math.floor(density * 2**32)
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK]
        draws = stream.random_raw((len(part) + 1) // 2).view(np.uint32)[: len(part)]
        part /= np.float32(density)
        part[draws >= limit] = 0
    return delta
