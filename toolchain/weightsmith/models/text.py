"""The text config of a config.json, completed by defaults.

Multimodal checkpoints such as Gemma 3 store only values of the text config that differ from the
class's defaults (`PretrainedConfig.to_diff_dict`): Gemma 3 4B has no number of heads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import cast

from weightsmith.core.values import JsonValue

_DEFAULTS = "text_defaults.json"


def text_part(config: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
    """Return the language model's configuration: `text_config` with its class's defaults.

    Without a `text_config`, the whole configuration, which is complete.
    """
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config
    return {**_defaults().get(str(text.get("model_type")), {}), **text}


@cache
def _defaults() -> Mapping[str, Mapping[str, int]]:
    """Return model type -> its class's defaults; a test compares them with transformers."""
    text = resources.files(__package__).joinpath(_DEFAULTS).read_text("utf-8")
    return cast("Mapping[str, Mapping[str, int]]", json.loads(text))
