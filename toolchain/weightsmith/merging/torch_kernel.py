"""The merge of one tensor with torch, on a GPU: the same bytes as on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from weightsmith.core.errors import EnvironmentFailure
from weightsmith.merging.kernel import SLACK, PreparedAddition
from weightsmith.merging.rounding import BF16, F16, F32, F64, FORMATS

TORCH_TYPES = {BF16: torch.bfloat16, F16: torch.float16, F32: torch.float32, F64: torch.float64}
_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUpdate:
    """One tensor's factors and bounds on the device."""

    left: torch.Tensor
    right: torch.Tensor
    bound: torch.Tensor
    dtype: torch.dtype
    largest: float


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """Return a tensor over the array's memory; numpy's bfloat16 becomes torch's."""
    if array.dtype == BF16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_device(prepared: PreparedAddition, device: str) -> DeviceUpdate:
    """Copy factors and bounds to a device."""
    left, right, bound = (
        as_tensor(array).to(device) for array in (prepared.left, prepared.right, prepared.bound)
    )
    return DeviceUpdate(
        left=left,
        right=right,
        bound=bound,
        dtype=TORCH_TYPES[prepared.dtype],
        largest=FORMATS[prepared.dtype].largest,
    )


def first_pass(
    held: DeviceUpdate, weight: np.ndarray, first: int, out: np.ndarray
) -> tuple[np.ndarray, bool]:
    """Like `kernel.first_pass`, for a whole block on the device."""
    place = slice(first, first + len(weight))
    sums = torch.mm(held.left[place], held.right)
    sums.add_(as_tensor(weight).to(sums.device).to(sums.dtype))
    # The lower end is computed negated, so equal ends differ only in the sign bit, and those of an
    # interval around zero never do.
    widen = SLACK * torch.finfo(sums.dtype).eps / 2
    signed = torch.copysign(held.bound[place], sums)
    high = torch.add(signed, sums, alpha=1 + widen).to(held.dtype)
    negated = torch.add(signed, sums, alpha=widen - 1).to(held.dtype)
    bits = _BITS[high.element_size()]
    same = high.view(bits) ^ negated.view(bits)
    flagged = (same.flatten() != torch.iinfo(bits).min).nonzero().flatten().cpu().numpy()
    least, most = (float(end) for end in torch.aminmax(sums))
    limit = held.largest * 0.99
    as_tensor(out).copy_(high)
    return flagged, -limit < least and most < limit


def check_arithmetic(device: str) -> None:
    """Raise EnvironmentFailure if the device's float32 arithmetic violates the bounds.

    Reduced-precision products (TF32, bfloat16 "fast math") and conversions that flush subnormals
    are options of libraries and compilers, so they are tested for.
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
