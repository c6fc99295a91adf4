"""Architectures that the pinned engines know, from lists that tests compare with the engines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import cast

from weightsmith.models.facts import ModelFacts

_FOLDER = Path(__file__).parent
STACKED_MXFP4 = frozenset({"GptOssForCausalLM"})
"""Architectures whose experts vLLM loads in OpenAI's MXFP4 layout, and in no other packed one.

vLLM 0.32 and 0.33, models/gpt_oss.py: `_load_weights_other` passes over tensors of single experts
under the names of compressed-tensors, AWQ and GPTQ, and reads stacked ones in 16 bits.
"""


@cache
def gguf_architectures() -> frozenset[str]:
    """Return what `convert_hf_to_gguf.py --print-supported-models` prints."""
    return frozenset(json.loads((_FOLDER / "gguf_architectures.json").read_text("utf-8")))


@cache
def gguf_projectors() -> frozenset[str]:
    """Return the architectures whose vision or audio part the same program can convert."""
    return frozenset(json.loads((_FOLDER / "gguf_projectors.json").read_text("utf-8")))


CONVERTED_WHOLE = frozenset({
    "Exaone4_5_ForConditionalGeneration", "KimiK3ForConditionalGeneration",
    "Sarashina2VisionForCausalLM", "Step3p7ForConditionalGeneration",
    "StepVLForConditionalGeneration",
})  # fmt: skip
"""Models whose own class the converter looks up (its `get_model_architecture`)."""


def converted_as(model: ModelFacts) -> str:
    """Return the class by which llama.cpp's converter knows the language model.

    That is what `text_config` says of itself in config.json, as SmolVLM's does, else the model's.
    """
    whole = model.architecture in CONVERTED_WHOLE
    return model.architecture if whole else model.text_architecture


def has_projector(model: ModelFacts) -> bool:
    """Return whether llama.cpp has a projector for a model that sees.

    Its converter needs to know how pictures are prepared.
    """
    known = model.vision_architecture in gguf_projectors()
    return model.sees_images and model.describes_images and known


@cache
def vllm_architectures() -> Mapping[str, str]:
    """Return the models that generate text in both the pinned transformers and the pinned vLLM.

    The value is `own` for a class of vLLM's, `transformers` where vLLM runs transformers' class.
    Written by `docs/known.py`.
    """
    text = (_FOLDER / "vllm_architectures.json").read_text("utf-8")
    return cast("Mapping[str, str]", json.loads(text))


def what_works(model: ModelFacts) -> str:
    """Return how a model can be served that a packed format does not support."""
    choices = ["serve it in 16 bits (target vllm)"]
    if model.architecture in STACKED_MXFP4:
        choices.insert(0, "choose mxfp4a16")
    if converted_as(model) in gguf_architectures():
        choices.append("as GGUF (target llamacpp-q4_k_m)")
    return ", or ".join(choices)
