"""CPU cores and GPUs of this machine."""

from __future__ import annotations

import functools
import os
import shutil

from weightsmith.drivers import process
from weightsmith.errors import EnvironmentFailure


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


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
