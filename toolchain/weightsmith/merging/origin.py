"""Whether an adapter says that it was trained on another family of models than the base's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FAMILIES = frozenset({"llama", "qwen", "gemma", "mistral", "mixtral"})
"""Those whose modules have the same names, and in small models the same shapes.

Families whose published models often have another's `model_type` (Falcon, Granite, DeepSeek) are
left out: their names say nothing against a base.
"""


def other_family(trained_on: str, config: Mapping[str, Any]) -> str:
    """Return the base's `model_type` where the name `trained_on` contradicts it, else nothing.

    `trained_on` is `base_model_name_or_path`, a hub's name or any path: its last part alone counts.
    """
    own = str(config.get("model_type", ""))
    named = _families(trained_on.rstrip("/\\").replace("\\", "/").rpartition("/")[2])
    return own if named and _families(own) and not named & _families(own) else ""


def _families(name: str) -> frozenset[str]:
    return frozenset(family for family in _FAMILIES if family in name.lower())
