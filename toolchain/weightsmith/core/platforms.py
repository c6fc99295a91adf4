"""The platforms that images are for: this machine's, and what compilers call their machines."""

from __future__ import annotations

import platform
from collections.abc import Iterable

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
"""The compilers' and the kernel's name of a machine -> the images'."""


def host_platform() -> str:
    """Return this machine's platform, such as `linux/amd64`; images are always for Linux."""
    machine = platform.machine().lower()
    return f"linux/{_ARCHITECTURES.get(machine, machine)}"


def usual(wanted: str) -> str:
    """Return a platform's usual name: `linux/arm64` for `linux/aarch64` and `linux/arm64/v8`.

    https://github.com/containerd/platforms (database.go)
    """
    system, _, machine = wanted.strip().lower().partition("/")
    machine = "arm64" if machine == "arm64/v8" else machine
    return f"{system}/{_ARCHITECTURES.get(machine, machine)}" if machine else system


def usual_names(wanted: Iterable[str]) -> tuple[str, ...]:
    """Return the platforms' usual names, each once."""
    return tuple(dict.fromkeys(map(usual, wanted)))


def machine_of(wanted: str) -> str:
    """Return what compilers and packages call a platform's machine, such as `aarch64`."""
    own = wanted.partition("/")[2]
    return next((name for name, other in _ARCHITECTURES.items() if other == own), own)
