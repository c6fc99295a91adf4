"""Read a GGUF file's metadata with type checks: it is untrusted."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from weightsmith.core.errors import InputRefused
from weightsmith.core.values import JsonValue

_MOST = 1 << 31
_LARGEST = 3e38
"""Roughly float32's maximum."""


def count_of(facts: Mapping[str, JsonValue], key: str, default: int | None = None) -> int:
    """Return a count of at least 1; raise InputRefused if invalid, KeyError if missing."""
    value = facts[key] if default is None else facts.get(key, default)
    if type(value) is not int or not 0 < value < _MOST:
        raise _invalid(key, value)
    return value


def number_of(facts: Mapping[str, JsonValue], key: str, default: float | None = None) -> float:
    """Return a float; raise InputRefused if invalid, KeyError if missing.

    Returns the shortest decimal: GGUF stores 1e-05 as the float32 9.999999747378752e-06.
    """
    value = facts[key] if default is None else facts.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < _LARGEST:
        raise _invalid(key, value)
    return float(str(np.float32(value)))


def token_id(facts: Mapping[str, JsonValue], name: str) -> int | None:
    """Return a special token's id, or None; raise InputRefused if invalid."""
    key = f"tokenizer.ggml.{name}_token_id"
    value = facts.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < _MOST):
        raise _invalid(key, value)
    return value


def texts_of(facts: Mapping[str, JsonValue], key: str) -> list[str]:
    """Return a list of strings; raise InputRefused if invalid, KeyError if missing."""
    value = facts[key]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise _invalid(key, value)
    return value


def numbers_of(facts: Mapping[str, JsonValue], key: str) -> list[int]:
    """Return a list of integers, [] if missing; raise InputRefused if invalid."""
    value = facts.get(key, [])
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise _invalid(key, value)
    return value


def _invalid(key: str, value: object) -> InputRefused:
    return InputRefused(
        f"the GGUF key {key} has the invalid value {str(value)[:80]!r}",
        hint="the file is damaged; convert or download it again",
    )
