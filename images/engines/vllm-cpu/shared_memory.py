"""Says why the server could not start, where a container has less shared memory than was planned.

vLLM's processes talk through /dev/shm, and where it is full, the kernel ends them without a word. A
container has 64 MiB there unless it is told otherwise.
"""

import json
import os
import sys
from pathlib import Path


def require(plan: str = "/etc/weightsmith/plan.json", place: str = "/dev/shm") -> None:
    """Exit with 5 and a hint if there is less than the image's plan says."""
    try:
        needed = int(json.loads(Path(plan).read_text("utf-8"))["shm_bytes"])
        found = os.statvfs(place)
    except (OSError, ValueError, LookupError, TypeError):
        return  # unplanned, or a machine without it: vLLM itself will say
    size = found.f_blocks * found.f_frsize
    if size < needed:
        print(
            f"error: {place} has {size >> 20} MiB, and this server needs {needed >> 20} MiB: start "
            f"its container with --shm-size {needed} (in compose shm_size, in Kubernetes an "
            "emptyDir with medium Memory)",
            file=sys.stderr,
        )
        raise SystemExit(5)
