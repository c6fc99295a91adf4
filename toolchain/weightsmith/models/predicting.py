"""The tensors of layers that predict further tokens (multi-token prediction, MTP, NextN).

transformers leaves them out when it loads a model (`_keys_to_ignore_on_load_unexpected`), so no
adapter that PEFT trained has weights for them. Engines draft with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import cast

from weightsmith.core.values import JsonValue
from weightsmith.models.facts import ModelFacts

_NAMED = re.compile(r"(?:[a-z_]+\.)*?mtp(?:_[a-z_]+)?\.")
"""`mtp.` of Qwen3-Next, Qwen3.5, Nemotron-H and EXAONE-MoE, `model.mtp_layers.` of MiMo,
`model.mtp_block.` of ERNIE 4.5, `model.mtp.` of LongCat (vLLM 0.33, models/*_mtp.py)."""
_LAYER = re.compile(
    r"(?P<above>(?:(?:model|language_model)\.|language_model\.model\."
    r"|model\.(?:language|text)_model\.)?layers)\.(?P<number>\d+)\.(?P<within>.+)"
)
"""A layer of the language model; towers have other names."""


def predicting(config: Mapping[str, object]) -> Callable[[str], bool]:
    """Return what tells by a tensor's name whether it belongs to such a layer.

    Those of DeepSeek-V3, GLM-4.5 and others are numbered on behind the decoder's layers.
    """
    facts = ModelFacts.of(cast("Mapping[str, JsonValue]", config))
    behind = facts.layers if facts.predicting_layers else 0

    def belongs(name: str) -> bool:
        if _NAMED.match(name):
            return True
        layer = _LAYER.fullmatch(name) if behind else None
        return layer is not None and int(layer["number"]) >= behind

    return belongs


def predicting_tensors(config: Mapping[str, object], names: Iterable[str]) -> list[str]:
    """Return those of a checkpoint's tensors, in their order."""
    return list(filter(predicting(config), names))
