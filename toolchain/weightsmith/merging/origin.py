"""Detect adapters that were trained on another model family than the base's."""

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
    named = _families(trained_on.rstrip("/\\").replace("\\", "/").rpartition("/")[2])
    return own if named and _families(own) and not named & _families(own) else ""


def _families(name: str) -> frozenset[str]:
    return frozenset(family for family in _FAMILIES if family in name.lower())
