"""The text part of a config.json, whole: transformers leaves out what is its class's default.

A checkpoint of several parts, such as Gemma 3 with its eyes, says of its text model only what
differs from the class (`PretrainedConfig.to_diff_dict`): Gemma 3 4B names no number of heads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import cast

from weightsmith.values import Json

_DEFAULTS = "text_defaults.json"


def text_part(config: Mapping[str, Json]) -> Mapping[str, Json]:
    """Return the configuration of the language model: `text_config` with its class's defaults.

    The whole one where there is no such part: what is not nested is written with every number.
    """
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return config
    return {**_defaults().get(str(text.get("model_type")), {}), **text}


@cache
def _defaults() -> Mapping[str, Mapping[str, int]]:
    """Return model type -> the numbers that its class has; a test holds them to transformers."""
    text = resources.files(__package__).joinpath(_DEFAULTS).read_text("utf-8")
    return cast("Mapping[str, Mapping[str, int]]", json.loads(text))
