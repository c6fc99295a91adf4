"""What this machine's CPUs can do, and how many threads a computation gets.

Threads of llama.cpp spin until the last one is done: on two quiet CPUs, two threads took 6 seconds
less than one for the support bot's matrix, beside another busy program 66.7 s instead of 20.1. So
the idle CPUs are counted for 0.2 seconds when such a program starts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

AVX2_LOOPS = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE"}
"""Environment in which torch and MKL use the same loops on all CPUs that have AVX2 and FMA."""
_WITH_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2"})
"""As in `lanes` of dispatch.c: a virtual machine may hide some of them."""
_MOMENT = 0.2
"""Seconds; the kernel counts hundredths."""


def has_avx2(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether this CPU is an x86-64 with AVX2, FMA and what our kernels use with them."""
    return flags(cpuinfo) >= _WITH_AVX2


def flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return what this x86-64 can do, in Linux's names; empty where it does not say."""
    try:
        lines = cpuinfo.read_text("ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), ()))


def model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the CPU's model name; empty where the kernel has none, as on 64-bit Arm."""
    try:
        lines = cpuinfo.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "")[:200]


def all_but_one() -> int:
    """Return the CPUs of this process but one, and at least one.

    If one thread is preempted, all others wait for it; a free CPU makes that rare.
    """
    return max(1, len(os.sched_getaffinity(0)) - 1)


def granted(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return the CPUs that this process may use, by its container's limit too, and at least one."""
    there = len(os.sched_getaffinity(0))
    try:
        most, period = map(int, quota.read_text("ascii").split())
    except (OSError, ValueError):  # there is no limit
        return there
    return max(1, min(there, round(most / period)))


def idle() -> int:
    """Return how many of this process's CPUs had nothing to do just now, and at least one.

    For programs that run for long and whose threads spin until the last is done. Takes 0.2 s.
    """
    unused = _unused_over(_MOMENT)
    return all_but_one() if unused is None else max(1, round(sum(unused)))


def in_use(seconds: float) -> float:
    """Wait; return the share of this process's CPUs in use meanwhile, 0 where none is shown."""
    unused = _unused_over(seconds)
    return 0.0 if unused is None else 1 - sum(unused) / len(unused)


def _unused_over(seconds: float) -> Sequence[float] | None:
    """Wait; return the share of the time that each CPU had nothing to do; None if unknown."""
    before = _unused()
    time.sleep(seconds)
    after = _unused()
    # Sandboxes such as gVisor show zeros only.
    if not any(before.values()) or before.keys() != after.keys():
        return None
    ticks = seconds * os.sysconf("SC_CLK_TCK")
    return [min(1.0, (after[cpu] - before[cpu]) / ticks) for cpu in after]


def _unused(stat: Path = Path("/proc/stat")) -> Mapping[str, int]:
    """Return for each CPU how long it was idle or waited for a disk, in ticks (man 5 proc_stat).

    {} where that cannot be read.
    """
    names = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    try:
        rows = [line.split() for line in stat.read_text("ascii").splitlines()]
        return {row[0]: int(row[4]) + int(row[5]) for row in rows if row[0] in names}
    except (OSError, ValueError, IndexError):
        return {}
