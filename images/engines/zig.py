"""What the engines that zig compiles share: the pinned compiler, where it runs, what it makes.

Each engine's `source.json` names the versions, and its `requirements.txt` their digests.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import NoReturn

REFUSED, ENVIRONMENT = 3, 5
ARCHES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
"""This machine's name for itself -> the compiler's."""


def fail(code: int, message: str) -> NoReturn:
    """Say what is wrong and end."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def find_compiler(pins: dict[str, str], requirements: Path) -> Path:
    """Find zig in this Python, and make sure that all build tools are the pinned ones."""
    for package, wanted in pins.items():
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        if found != wanted:
            fail(
                REFUSED,
                f"{package} {wanted} is needed, this Python has {found}: run "
                f"{sys.executable} -m pip install --require-hashes -r {requirements}",
            )
    return Path(importlib.import_module("ziglang").__file__ or "").parent / "zig"


def environment(work: Path) -> dict[str, str]:
    """Return the compiler's environment: nothing of the caller's; its caches stay in `work`."""
    cache = str(work / "zig-cache")
    return {
        "PATH": "/usr/bin:/bin",
        "HOME": str(work),
        "LC_ALL": "C",
        "ZIG_GLOBAL_CACHE_DIR": cache,
        "ZIG_LOCAL_CACHE_DIR": cache,
    }


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the options that every compile.py takes."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--source", type=Path, required=True, help="the tree fetch.py wrote")
    made.add_argument("--out", type=Path, required=True, help="folder to write")
    made.add_argument("--arch", choices=sorted(set(ARCHES.values())), help="default: this machine")
    made.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    return made


def arch_of(given: str | None) -> str:
    """Return the architecture to compile for: the one that was asked for, else this machine's."""
    arch = given or ARCHES.get(platform.machine().lower())
    if arch is None:
        fail(ENVIRONMENT, f"{platform.machine()} is not supported: give --arch x86_64 or aarch64")
    return arch
