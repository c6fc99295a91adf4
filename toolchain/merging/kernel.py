"""The merge of one tensor, block by block: W + Σ factor · B·A, correctly rounded at float32 speed.

A first pass computes in `work` precision and bounds its own error rigorously. Rounding is monotone:
where both ends of the error interval round to the same value, that value is the correctly rounded
one, whatever the order of summation, thread count, block size, BLAS or device. The other elements,
about one in a thousand, go to `repair`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch

from toolchain.errors import EnvironmentFailure, InputRefused
from toolchain.merging.repair import Factors, Repairs, repair
from toolchain.merging.rounding import FORMATS, round_once

PIECE = 1 << 18
"""Elements that are worked on at once on the CPU: what the second-level cache holds."""

_SLACK = 8
"""Half units that an interval is widened by, for the roundings of W + δ and of its own ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """One tensor's addition, ready to be applied to its row blocks."""

    name: str
    factors: Factors
    """On the CPU, exact."""
    left: torch.Tensor
    """(rows, K), gains multiplied in, in the working type, on the device."""
    right: torch.Tensor
    """(K, columns)."""
    bound: torch.Tensor
    """(rows, 1): what the matrix product may be off by, in any order of summation."""
    still: torch.Tensor
    """Rows that nothing is added to, on the CPU."""
    dtype: torch.dtype
    """Of the result."""

    @property
    def work(self) -> torch.dtype:
        """The type of the first pass: one step above the result's."""
        return self.left.dtype


class Space:
    """One worker's buffers for pieces of `elements`, so that these cost no allocation."""

    def __init__(self, elements: int, dtype: torch.dtype, work: torch.dtype, device: str) -> None:
        form, self.elements = FORMATS[dtype], elements
        self.sums, self.spare, self.signed = (
            torch.empty(elements, dtype=work, device=device) for _ in range(3)
        )
        self.low = torch.empty(elements, dtype=dtype, device=device)
        self.same = torch.empty(elements, dtype=form.bits, device=device)

    def pieces(self, rows: torch.Tensor) -> Iterator[slice]:
        """Yield the row ranges of a matrix that fit, one row at least."""
        step = max(1, self.elements // max(1, rows.shape[1]))
        for start in range(0, len(rows), step):
            yield slice(start, min(start + step, len(rows)))


def work_type(dtype: torch.dtype) -> torch.dtype:
    """Return the first pass's type: float32 for 16-bit results, float64 for float32."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def prepare(name: str, factors: Factors, dtype: torch.dtype, device: str = "cpu") -> Prepared:
    """Return the addition in the working type, with the error bound of each row."""
    work = work_type(dtype)
    bound = _bound(factors.norms, factors.norm, len(factors.gains), work)
    return Prepared(
        name=name,
        factors=factors,
        left=factors.left.double().mul_(factors.gains).to(work).to(device),
        right=factors.right.to(work).to(device),
        bound=bound.to(work).unsqueeze(1).to(device),
        still=(factors.norms == 0).nonzero().flatten(),
        dtype=dtype,
    )


def _bound(left: torch.Tensor, right: float, terms: int, work: torch.dtype) -> torch.Tensor:
    """Bound |computed - exact| of a row of the product, given its norms: γₙ · ‖bᵢ‖ · maxⱼ‖aⱼ‖.

    γₙ = n·u / (1 - n·u) holds for any order of summation, fused or not (Higham, section 3.5); n
    counts the K products and sums, the rounding of the gains, and room to spare. The second part
    covers underflow, even where subnormals are flushed. A row that nothing is added to is exact,
    and one whose partial sums could overflow has no bound.
    """
    unit, tiny = torch.finfo(work).eps / 2, torch.finfo(work).tiny
    n = (terms + 4) * unit
    product = left * right
    bound = (n / (1 - n)) * 1.01 * product + 4 * (terms + 2) * tiny * (1 + left + right)
    bound[product > torch.finfo(work).max / 256] = math.inf
    bound[left == 0] = 0.0
    return bound


def merge_rows(
    prepared: Prepared, weight: torch.Tensor, first: int, space: Space, out: torch.Tensor
) -> Repairs:
    """Fill `out` with rows `first` and following of W + δ, correctly rounded, ties to even.

    `weight` (rows, columns) in the base's type and `out` in the result's are on the CPU. Rows
    without addition keep W's bits. Raises InputRefused where W is not finite or `out` overflows.
    """
    rows, columns = weight.shape
    flagged, safe = _first_pass(prepared, weight, first, space, out)
    if not safe:
        _check_base(prepared.name, weight)
        flagged = torch.arange(weight.numel())
    done = Repairs()
    if len(flagged):
        row = flagged // columns
        values, done = repair(
            prepared.factors,
            weight.flatten()[flagged],
            row + first,
            flagged - row * columns,
            prepared.dtype,
        )
        out.view(-1)[flagged] = values
    if len(prepared.still):
        inside = prepared.still[(prepared.still >= first) & (prepared.still < first + rows)] - first
        out[inside] = round_once(weight[inside], prepared.dtype)
    if not safe:
        _check_result(prepared, out)
    return done


def _first_pass(
    prepared: Prepared, weight: torch.Tensor, first: int, space: Space, out: torch.Tensor
) -> tuple[torch.Tensor, bool]:
    """Round what the working type can decide, in pieces of the size of `space`.

    Returns the flat places of what could not be decided, and whether every sum stays clear of
    overflow.
    """
    safe, rest = True, []
    limit = FORMATS[prepared.dtype].largest * 0.99
    for part in space.pieces(weight):
        place = first + part.start
        sums = _sums(prepared, weight[part], place, space)
        same = _round_interval(prepared, sums, place, space, out[part])
        rest.append(_differing(same).add_(part.start * weight.shape[1]))
        safe = safe and _stays_below(sums, limit)
    return torch.cat(rest), safe


def _sums(prepared: Prepared, weight: torch.Tensor, first: int, space: Space) -> torch.Tensor:
    """Compute fl(W + fl(B·A)) in the working type."""
    rows, size = len(weight), weight.numel()
    sums = space.sums[:size].view(weight.shape)
    torch.mm(prepared.left[first : first + rows], prepared.right, out=sums)
    if weight.dtype != prepared.work or sums.device != weight.device:
        # One copy and one add of equal types is 12 times faster than torch's mixed add.
        weight = space.spare[:size].view(weight.shape).copy_(weight)
    return sums.add_(weight)


def _round_interval(
    prepared: Prepared, sums: torch.Tensor, first: int, space: Space, out: torch.Tensor
) -> torch.Tensor:
    """Round both ends of |sum| ± error, one into `out`; return both ends' bits exclusively or-ed.

    With e = the row's bound with the sum's sign and u = the working unit, the ends are
    (1 ± 8u)·sum ± e. The lower one is computed negated, so ends that agree differ in the sign bit
    alone, and an interval around zero does not pass for one.
    """
    form, shape, size = FORMATS[prepared.dtype], sums.shape, sums.numel()
    widen = _SLACK * torch.finfo(prepared.work).eps / 2
    signed = space.signed[:size].view(shape)
    torch.copysign(prepared.bound[first : first + len(sums)], sums, out=signed)
    high = torch.add(signed, sums, alpha=1 + widen, out=space.spare[:size].view(shape))
    low = torch.add(signed, sums, alpha=widen - 1, out=signed)
    rounded = out.copy_(high) if high.device == out.device else high.to(out.dtype)
    negated = space.low[:size].view(shape).copy_(low)
    same = torch.bitwise_xor(
        rounded.view(form.bits), negated.view(form.bits), out=space.same[:size].view(shape)
    )
    if rounded is not out:
        out.copy_(rounded)
    return same


def _stays_below(sums: torch.Tensor, limit: float) -> bool:
    """Say whether all are finite and below the limit; the sum of squares says so at a third."""
    flat = sums.flatten()
    if float(torch.dot(flat, flat)) < limit * limit / 4:
        return True
    least, most = (float(end) for end in torch.aminmax(flat))
    return -limit < least and most < limit


def _differing(same: torch.Tensor) -> torch.Tensor:
    """Return the flat places, on the CPU, where more than the sign bit is left or it is not."""
    same = same.flatten()
    sign, lanes = torch.iinfo(same.dtype).min, 8 // same.element_size()
    if same.device.type != "cpu" or len(same) % lanes:
        return (same != sign).nonzero().flatten().cpu()
    # numpy, eight bytes at a time: nearly all of them are as expected.
    bits = same.numpy()
    signs = np.full(lanes, sign, bits.dtype).view(np.int64)
    words = np.flatnonzero(bits.view(np.int64) != signs)
    places = (words[:, None] * lanes + np.arange(lanes)).ravel()
    return torch.from_numpy(places[bits[places] != sign])


def merge_rows_fast(
    prepared: Prepared, weight: torch.Tensor, first: int, space: Space, out: torch.Tensor
) -> None:
    """Fill `out` with W + (B·A)·s in float32, rounded once: for one adapter, PEFT's own bits.

    Runs on the CPU; shapes and errors are those of `merge_rows`.
    """
    factors = prepared.factors
    gains, counts = torch.unique_consecutive(factors.gains, return_counts=True)
    ends = counts.cumsum(0)
    groups = list(zip(gains.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True))
    for part in space.pieces(weight):
        left = factors.left[first + part.start : first + part.stop]
        products = [
            (left[:, start:end] @ factors.right[start:end]).mul_(gain)
            for gain, start, end in groups
        ]
        # The first product itself, since adding it to zero would turn -0 into 0.
        delta = reduce(torch.Tensor.add_, products)
        out[part] = delta.add_(weight[part].float())
    if not torch.isfinite(out).all():
        _check_base(prepared.name, weight)
        _check_result(prepared, out)


def check_arithmetic(device: str) -> None:
    """Raise EnvironmentFailure where this machine's float32 is not what the bounds assume.

    Reduced-precision products (TF32, bfloat16 "fast math") and conversions that flush subnormals
    are settings and compilers' options, so they are looked for, not trusted to be off.
    """
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(96, 96, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    found = torch.mm(left.to(device), right.to(device)).cpu().double()
    room = 100 * 2.0**-24 * (left.double().abs() @ right.double().abs())
    small = torch.tensor([2.0**-133, 2.0**-127, 2.0**-24]).repeat(32)
    kept = small.to(device).to(torch.bfloat16).cpu().float()
    half = small[2].to(device).to(torch.float16).cpu().float()
    if (found - exact).abs().gt(room).any() or not torch.equal(kept, small) or half != small[2]:
        raise EnvironmentFailure(
            f"{device} computes float32 with reduced precision or flushes small numbers to zero",
            hint="unset DNNL_DEFAULT_FPMATH_MODE, NVIDIA_TF32_OVERRIDE and the like, or merge with "
            "another device",
        )


def _check_base(name: str, weight: torch.Tensor) -> None:
    if not torch.isfinite(weight).all():
        raise InputRefused(
            f"the base's {name} holds NaN or infinite values",
            hint="the base checkpoint is damaged; download it again",
        )


def _check_result(prepared: Prepared, out: torch.Tensor) -> None:
    if torch.isfinite(out).all():
        return
    factors = prepared.factors
    largest = ((factors.left.double() * factors.gains).abs() @ factors.right.double().abs()).max()
    raise InputRefused(
        f"{prepared.name} overflows {str(prepared.dtype).removeprefix('torch.')}, which ends at "
        f"{FORMATS[prepared.dtype].largest:g}: the adapter adds up to {float(largest):.3g}",
        hint="merge with dtype bfloat16 or float32, or lower the adapter's weight",
    )
