"""The finished merge, read back and recomputed another way on rows drawn at random."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from toolchain.checkpoints.safetensors import TensorInfo, open_checkpoint
from toolchain.errors import CheckFailed
from toolchain.merging.families.family import Term
from toolchain.merging.plan import MergePlan
from toolchain.merging.rounding import FORMATS
from toolchain.merging.stream import Reader

ROWS = 16
"""Rows per tensor: a wrong scaling, order, place or transposition shows in any of them."""


def prove(plan: MergePlan, out: Path, *, exact: bool) -> None:
    """Compare random rows of every merged tensor, as written, with float64 sums of the inputs.

    Rows are drawn by the tensor's name, so that a failure can be seen again. The written headers
    are read afresh, with all their checks. Raises CheckFailed naming the first tensor that is off.
    """
    written = {i.name: (s.path, i) for s in open_checkpoint(out).shards for i in s.tensors}
    adapters = [Reader(adapter.header.path) for adapter in plan.adapters]
    try:
        for shard in plan.base.shards:
            base = Reader(shard.path)
            found = Reader(out / shard.path.name)
            try:
                for info in shard.tensors:
                    if info.name in plan.terms and info.size:
                        place = written[info.name][1]
                        wanted = _wanted(base, adapters, info, plan.terms[info.name])
                        _compare(info.name, wanted, _rows(found, place), exact=exact)
            finally:
                base.close()
                found.close()
    finally:
        for reader in adapters:
            reader.close()


def _places(info: TensorInfo) -> list[int]:
    seed = int.from_bytes(hashlib.sha256(info.name.encode()).digest()[:7], "little")
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, info.shape[0], (ROWS,), generator=random).tolist()


def _rows(reader: Reader, info: TensorInfo) -> torch.Tensor:
    return torch.cat([reader.rows(info, place, 1) for place in _places(info)])


def _wanted(
    base: Reader, adapters: list[Reader], info: TensorInfo, terms: tuple[Term, ...]
) -> torch.Tensor:
    """Return W + Σ factor · (B·A) of the drawn rows in float64."""
    places, total = _places(info), _rows(base, info).double()
    for term in terms:
        reader = adapters[term.adapter]
        a = reader.matrix(term.a).double()
        if term.transposed:
            b = reader.matrix(term.b).double()
            total += term.factor * (b @ a[:, places]).T
        else:
            b = torch.cat([reader.rows(term.b, place, 1) for place in places]).double()
            total += term.factor * (b @ a)
    return total


def _compare(name: str, wanted: torch.Tensor, found: torch.Tensor, *, exact: bool) -> None:
    """Allow half a unit in the last place, and what float64 or, for `fast`, float32 may be off."""
    form = FORMATS[found.dtype]
    size = wanted.abs()
    room = size * 2.0**-form.precision * (1 + 2.0**-20) + 2.0 ** (form.least - form.precision)
    # Sums that cancel are off by a part of what went in, which the row's largest value bounds.
    room += size.amax(1, keepdim=True) * (2.0**-40 if exact else 2.0**-16)
    off = (found.double() - wanted).abs() > room
    if off.any() or not torch.isfinite(found).all():
        raise CheckFailed(
            f"{name} was written wrong: {int(off.sum())} of {off.numel()} elements that were "
            "recomputed differ",
            hint="memory or disk may be faulty: merge again, on another machine if it recurs",
        )
