"""What the name of the model that an adapter was trained on tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FAMILIES = frozenset({"llama", "qwen", "gemma", "mistral", "mixtral"})
"""Families with the same module names and, in small models, the same shapes.

Families whose models often have another family's `model_type` (Falcon, Granite, DeepSeek) are
omitted.
"""


def other_family(trained_on: str, config: Mapping[str, Any]) -> str:
    """Return the base's `model_type` if the name `trained_on` contradicts it, else "".

    `trained_on` is `base_model_name_or_path`, a hub name or a path; only its last part is used.
    """
    own = str(config.get("model_type", ""))
    named = _families(_last(trained_on))
    return own if named and _families(own) and not named & _families(own) else ""


def in_four_bits(trained_on: str) -> bool:
    """Return whether a name is that of a checkpoint in bitsandbytes' 4 bits."""
    return "bnb-4bit" in _last(trained_on).lower()


def _last(name: str) -> str:
    return name.rstrip("/\\").replace("\\", "/").rpartition("/")[2]


def _families(name: str) -> frozenset[str]:
    return frozenset(family for family in _FAMILIES if family in name.lower())
