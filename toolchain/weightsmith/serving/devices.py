"""The CPUs that plans know by name; gpus.py has the GPUs.

A CPU with AMX is a device of its own: vLLM has kernels for quantized experts only there. Asking the
building machine would make the plan depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping

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
