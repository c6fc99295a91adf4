"""CPU cores, free memory and GPUs of this machine."""

from __future__ import annotations

import functools
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from weightsmith.core.cpus import model
from weightsmith.core.devices import Devices
from weightsmith.core.errors import EnvironmentFailure
from weightsmith.outside import process


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


_CGROUP = Path("/sys/fs/cgroup")
"""The cgroup of this process, as a container sees it (version 2)."""


def free_memory() -> int:
    """Return the bytes that new programs can use here without swapping; 0 if unknown.

    The kernel's estimate, or what a limit on this container leaves if that is less. Pages of files
    count as free: the kernel drops them when it needs memory.
    """
    free = _number(Path("/proc/meminfo"), r"MemAvailable:\s+(\d+) kB") * 1024
    limit = _number(_CGROUP / "memory.max", r"(\d+)")
    if not limit:
        return free
    used = _number(_CGROUP / "memory.current", r"(\d+)")
    files = _number(_CGROUP / "memory.stat", r"(?m)^inactive_file (\d+)")
    return min(free or limit, max(1, limit - used + files))


_READ, _READS = 256 << 20, 5


def memory_bandwidth() -> float:
    """Return the bytes per second that all cores together read from memory: the best of five reads.

    As in STREAM (McCalpin, 1995), but reading alone, for a maximum, over more bytes than most
    caches hold: a quarter of a gigabyte. It takes about half a second.
    """
    import numpy as np

    count = min(cores(), 64)
    parts = [np.ones(_READ // 8 // count, np.uint64) for _ in range(count)]

    def read() -> float:
        began = time.perf_counter()
        for _ in pool.map(np.max, parts):
            pass
        return sum(part.nbytes for part in parts) / (time.perf_counter() - began)

    with ThreadPoolExecutor(count) as pool:
        return max(read() for _ in range(_READS))


def _number(path: Path, pattern: str) -> int:
    try:
        found = re.search(pattern, path.read_text("ascii"))
    except OSError:
        return 0
    return int(found[1]) if found else 0


def devices() -> Devices:
    """Return what programs run on here."""
    return Devices(cpu=model(), cpus=cores(), gpus=gpu_names())


_DRIVER = (
    "libcuda.so.1", "libnvidia-gpucomp.so.*", "libnvidia-ml.so.1", "libnvidia-nvvm.so.*",
    "libnvidia-ptxjitcompiler.so.1",
)  # fmt: skip
"""What programs load of NVIDIA's driver, which must be of the kernel module's version: those of
libnvidia-container (src/nvc_info.c, compute_libs and utility_libs) that compute and compile."""
DISTRIBUTION_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64")
"""Where a loader looks by itself."""
_DRIVER_FOLDERS = (
    *("/usr/local/nvidia/lib64", "/usr/local/nvidia/lib", "/usr/lib/wsl/lib"),
    *("/run/opengl-driver/lib", *DISTRIBUTION_FOLDERS),
)


def driver_libraries() -> tuple[Path, ...]:
    """Return the libraries of NVIDIA's driver, all of one folder; () if there is none."""
    named = filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))
    for folder in map(Path, (*named, *_DRIVER_FOLDERS)):
        if (folder / _DRIVER[0]).is_file():
            return tuple(path for name in _DRIVER for path in sorted(folder.glob(name)))
    return ()


@functools.cache
def gpu_names() -> tuple[str, ...]:
    """Return the names of the available NVIDIA GPUs; cached."""
    if shutil.which("nvidia-smi") is None:
        return ()
    question = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = process.run(question, env=process.scrubbed(), timeout=20)
    except EnvironmentFailure:
        return ()
    return done.tail if done.returncode == 0 else ()
