"""The devices that plans know by name: CPUs and GPUs.

A CPU with AMX is a device of its own: vLLM has kernels for quantized experts only there. Asking the
building machine would make the plan depend on it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from weightsmith.core.errors import UsageError

CPU = "cpu"
AMX = "cpu-amx"
CPUS: Mapping[str, str] = {
    CPU: "any CPU that the engine runs on",
    AMX: "an x86-64 server CPU with AMX: Intel Xeon from the 4th generation",
}
"""Device -> what it stands for."""
AMX_FLAGS = frozenset({"amx_tile", "amx_bf16", "amx_int8"})
"""What Linux calls AMX on such a CPU (/proc/cpuinfo)."""


def is_cpu(device: str) -> bool:
    """Return whether a planned device is a CPU."""
    return device in CPUS


# CUDA C++ Programming Guide, "Compute Capabilities".
_GENERATIONS = {
    (7, 5): "Turing",
    (8, 0): "Ampere",
    (8, 6): "Ampere",
    (8, 9): "Ada Lovelace",
    (9, 0): "Hopper",
    (10, 0): "Blackwell",
    (10, 3): "Blackwell Ultra",
    (12, 0): "Blackwell",
    (12, 1): "Blackwell",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU; sizes in bytes."""

    name: str
    total_bytes: int
    """On the board, as the data sheet has it."""
    usable_bytes: int
    """What a process sees as the total (`cudaMemGetInfo`): the board less ECC and the driver."""
    generation: str
    """The architecture's name, as its maker calls it."""
    compute_capability: tuple[int, int]
    """(0, 0) for AMD."""
    fp8: bool
    bf16: bool
    aliases: tuple[str, ...] = ()
    shares_memory: bool = False
    """Whether the CPU and what runs there use the same memory."""


def _nvidia(
    name: str, gb: int, usable_mib: int, capability: tuple[int, int], *aliases: str
) -> tuple[str, Gpu]:
    # FP8 tensor cores came with compute capability 8.9, bfloat16 with 8.0 (CUDA C++ Programming
    # Guide, "Features and Technical Specifications").
    full = f"nvidia-{name}"
    return full, Gpu(
        name=full,
        total_bytes=gb << 30,
        usable_bytes=usable_mib << 20,
        generation=_GENERATIONS[capability],
        compute_capability=capability,
        fp8=capability >= (8, 9),
        bf16=capability >= (8, 0),
        aliases=(name, *aliases, *(f"nvidia-{alias}" for alias in aliases)),
    )


def _amd(name: str, gb: int, usable_mib: int, generation: str) -> tuple[str, Gpu]:
    full = f"amd-{name}"
    return full, Gpu(
        name=full,
        total_bytes=gb << 30,
        usable_bytes=usable_mib << 20,
        generation=generation,
        compute_capability=(0, 0),
        fp8=True,
        bf16=True,
        aliases=(name,),
    )


# Memory: NVIDIA's and AMD's data sheets. Usable, in MiB: the totals that PyTorch and vLLM print on
# these cards in published logs ("79.10 GiB" on an H100), rounded down; drivers differ a little. No
# such log of an RTX PRO 5000 (48 GB) was found: it has what `nvidia-smi` prints, less what other
# cards lose. The GB300 of a DGX Station has 256,703 MiB there: give its memory by --gpu-memory.
_GB10 = replace(_nvidia("gb10", 128, 122_040, (12, 1), "dgx-spark")[1], shares_memory=True)
GPUS: Mapping[str, Gpu] = dict(
    [
        _nvidia("t4", 16, 15_090, (7, 5), "tesla-t4"),
        _nvidia("l4", 24, 22_563, (8, 9)),
        _nvidia("a10g", 24, 22_502, (8, 6)),
        _nvidia("a100-40gb", 40, 40_325, (8, 0), "a100"),
        _nvidia("a100-80gb", 80, 81_037, (8, 0)),
        _nvidia("l40s", 48, 45_457, (8, 9)),
        _nvidia("h100-80gb", 80, 80_990, (9, 0), "h100"),
        _nvidia("h200-141gb", 141, 143_156, (9, 0), "h200"),
        _nvidia("b200", 180, 182_500, (10, 0)),
        _nvidia("gb200", 186, 188_730, (10, 0)),
        _nvidia("b300", 288, 274_110, (10, 3)),
        _nvidia("gb300", 288, 283_130, (10, 3)),
        (_GB10.name, _GB10),
        _nvidia("rtx-4090", 24, 24_080, (8, 9), "rtx4090", "4090"),
        _nvidia("rtx-5090", 32, 32_110, (12, 0), "rtx5090", "5090"),
        _nvidia("rtx-pro-5000", 48, 48_420, (12, 0)),
        _nvidia("rtx-pro-6000", 96, 97_240, (12, 0)),
        _amd("mi300x", 192, 196_288, "CDNA 3"),
        _amd("mi325x", 256, 262_120, "CDNA 3"),
        _amd("mi350x", 288, 294_890, "CDNA 4"),
        _amd("mi355x", 288, 294_890, "CDNA 4"),
    ]
)
_BY_ANY_NAME = {alias: gpu for gpu in GPUS.values() for alias in (gpu.name, *gpu.aliases)}


def gpu(name: str) -> Gpu:
    """Return the GPU of that name or alias; UsageError with near misses otherwise."""
    wanted = name.strip().lower().replace("_", "-").replace(" ", "-")
    if wanted in _BY_ANY_NAME:
        return _BY_ANY_NAME[wanted]
    near = difflib.get_close_matches(wanted, (*_BY_ANY_NAME, *CPUS), n=2, cutoff=0.6)
    guess = f"did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(
        f"unknown GPU {name!r}",
        hint=f"{guess}known: {', '.join(GPUS)}; for another one give its memory:"
        " --gpu-memory 24GiB",
    )


def named_gpu(name: str) -> Gpu | None:
    """Return the GPU of that name; None for a CPU's name, or none. Raises what `gpu` does."""
    return gpu(name) if name and not is_cpu(name) else None
