"""What a GGUF file says of itself, held to the types that it must have: a stranger wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from weightsmith.errors import InputRefused

_MOST = 1 << 31
_LARGEST = 3e38
"""Of float32."""


def count_of(facts: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return a number of things, 1 or more; InputRefused for what is none, KeyError for nothing."""
    value = facts[key] if default is None else facts.get(key, default)
    if type(value) is not int or not 0 < value < _MOST:
        raise _strange(key, value)
    return value


def number_of(facts: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """Return the decimal that was meant; InputRefused for what is none, KeyError for nothing.

    GGUF keeps 1e-05 as the float32 9.999999747378752e-06.
    """
    value = facts[key] if default is None else facts.get(key, default)
    if type(value) not in (int, float) or not abs(value) < _LARGEST:
        raise _strange(key, value)
    return float(str(np.float32(value)))


def token_id(facts: Mapping[str, Any], name: str) -> int | None:
    """Return the number of a special token, None where there is none; InputRefused for others."""
    key = f"tokenizer.ggml.{name}_token_id"
    value = facts.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < _MOST):
        raise _strange(key, value)
    return value


def texts_of(facts: Mapping[str, Any], key: str) -> list[str]:
    """Return a list of texts; InputRefused for what is none, KeyError for nothing."""
    value = facts[key]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise _strange(key, value)
    return value


def numbers_of(facts: Mapping[str, Any], key: str) -> list[int]:
    """Return a list of numbers, [] where there is none; InputRefused for what is none."""
    value = facts.get(key, [])
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise _strange(key, value)
    return value


def _strange(key: str, value: object) -> InputRefused:
    return InputRefused(
        f"the GGUF entry {key} is {str(value)[:80]!r}, which it cannot be",
        hint="the file is damaged; convert or download it again",
    )
