"""Changes that a fuzzer makes to bytes and to JSON: those that readers stumble over."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

NUMBERS = [0, 1, 2, 7, 8, 127, 255, 1 << 15, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 64) - 1]
VALUES = [
    None, True, False, "", "x", "4096", "../../x", "<script>alert(1)</script>", "\x1b[2J",
    "ä" * 300, "x\n\n<script>alert(1)</script>", "a\0b",
    0, 1, -1, 3, 7, 128, 10**12, 2**70, 10**400, 1.5, 1e308, float("nan"), float("inf"), [], {},
    [1], ["a"], [[]], [None] * 62, {"a": 1}, {"rope_type": "yarn"}, {"factor": 0},
]  # fmt: skip


def bytes_changed(random: Random, data: bytes) -> bytes:
    """Return bytes with some changes: flipped, cut, doubled, or a number of interest put in."""
    found = bytearray(data)
    for _ in range(random.randint(1, 8)):
        at = random.randrange(len(found) or 1)
        match random.randrange(6):
            case 0:
                found[at : at + 1] = bytes([random.randrange(256)])
            case 1:
                width = random.choice((1, 2, 4, 8))
                number = random.choice(NUMBERS) % (1 << 8 * width)
                found[at : at + width] = number.to_bytes(width, "little")
            case 2:
                del found[at : at + random.choice((1, 8, 64, 512))]
            case 3:
                found[at:at] = found[at : at + random.choice((1, 8, 64, 512))]
            case 4:
                del found[at:]
            case _:
                found[at : at + 8] = random.randbytes(8)
    return bytes(found)


def early(random: Random, data: bytes, end: int) -> bytes:
    """Return bytes of which only those before `end` are changed, where the structure is."""
    return bytes_changed(random, data[:end]) + data[end:]


def json_changed(random: Random, value: Any) -> Any:
    """Return a value in which some parts are others, or absent."""
    found = copy.deepcopy(value)
    for _ in range(random.randint(1, 4)):
        found = _changed(random, found)
    return found


def _changed(random: Random, value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or not random.randrange(8):
        return copy.deepcopy(random.choice(VALUES))
    key = random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
    if not random.randrange(5):
        del value[key]
    else:
        value[key] = _changed(random, value[key])
    return value
