"""What models run on, by the names that Linux and nvidia-smi give, and how a name is recognised."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FILLING = frozenset(
    {
        "nvidia", "geforce", "tesla", "amd", "intel", "r", "tm", "cpu", "gpu", "processor",
        "core", "cores", "with", "graphics",
    }
)  # fmt: skip
"""Words that do not tell one device from another of the same maker."""
_CLOCK = re.compile(r"@.*|\b\d+(\.\d+)?\s*ghz\b|\b\d+-core\b")
_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """What a started image runs on."""

    cpu: str
    """The CPU's model name, as in /proc/cpuinfo; empty if the kernel does not say."""
    cpus: int
    """How many of them this process may use."""
    gpus: tuple[str, ...] = ()
    """As nvidia-smi names them."""


def telling_words(name: str) -> frozenset[str]:
    """Return the words of a device's name that tell it from others, such as `h100`."""
    return frozenset(_WORD.findall(_CLOCK.sub(" ", name.lower()))) - _FILLING


def is_device(wanted: str, found: str) -> bool:
    """Return whether a device is the wanted one: it has all words of that name that tell any.

    `H100` is `NVIDIA H100 80GB HBM3`, but `L4` is not `NVIDIA L40S`.
    """
    words = telling_words(wanted)
    return bool(words) and words <= telling_words(found)
