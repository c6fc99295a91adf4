"""Architectures that the pinned engines know, and which of them can have a packed format.

Tests compare the lists with the engines.
"""

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
CONVERTED_WHOLE = frozenset({
    "Exaone4_5_ForConditionalGeneration", "KimiK3ForConditionalGeneration",
    "Sarashina2VisionForCausalLM", "Step3p7ForConditionalGeneration",
    "StepVLForConditionalGeneration",
})  # fmt: skip
"""Models whose own class the converter looks up (its `get_model_architecture`)."""
LLAMAS = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)
"""Llama-like architectures, which every engine here supports."""
DENSE = LLAMAS | {
    "Cohere2ForCausalLM", "Exaone4ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
    "GemmaForCausalLM", "GraniteForCausalLM", "HunYuanDenseV1ForCausalLM", "Olmo2ForCausalLM",
    "Olmo3ForCausalLM", "SeedOssForCausalLM", "SmolLM3ForCausalLM",
}  # fmt: skip
"""Dense decoders whose layers consist of `*_proj` matrices, norms and biases, so that each matrix
can be rounded separately. For each, vLLM's log-probabilities were compared with ours."""
EXPERTS = frozenset({
    "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Glm4MoeForCausalLM", "GraniteMoeForCausalLM",
    "Llama4ForCausalLM", "MiniMaxM2ForCausalLM", "MixtralForCausalLM", "OlmoeForCausalLM",
    "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM",
})  # fmt: skip
"""Decoders with experts, whose routers and gates of shared experts stay in 16 bits."""
FURTHER_EXPERTS = frozenset({
    "AfmoeForCausalLM", "Cohere2MoeForCausalLM", "Ernie4_5_MoeForCausalLM", "ExaoneMoeForCausalLM",
    "FlexOlmoForCausalLM", "Glm4MoeLiteForCausalLM", "GraniteMoeHybridForCausalLM",
    "GraniteMoeSharedForCausalLM", "HYV3ForCausalLM", "HunYuanMoEV1ForCausalLM",
    "Lfm2MoeForCausalLM", "MellumForCausalLM", "Qwen3NextForCausalLM", "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
})  # fmt: skip
"""Further decoders with experts, quantized by the same rule; some have linear attention or states.

That vLLM's loaders read their files is tested with vLLM's own models (test_vllm_loads.py).
"""
SEEING = frozenset({
    "Gemma3ForConditionalGeneration", "Llama4ForConditionalGeneration",
    "Mistral3ForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration",
})  # fmt: skip
"""Vision models: only the language model is quantized."""
JOINED = frozenset({"Phi3ForCausalLM"})
"""Decoders whose checkpoints join Q, K and V, and gate and up."""
NAMED = frozenset({
    "ApertusForCausalLM", "ArceeForCausalLM", "Cohere2VisionForConditionalGeneration",
    "CohereForCausalLM", "CwmForCausalLM", "Ernie4_5ForCausalLM",
    "Exaone4_5_ForConditionalGeneration", "FalconH1ForCausalLM", "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration", "Glm4ForCausalLM", "GlmForCausalLM", "HyperCLOVAXForCausalLM",
    "Idefics3ForConditionalGeneration", "InternVLForConditionalGeneration", "Jais2ForCausalLM",
    "Lfm2ForCausalLM", "LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration",
    "LlavaNextVideoForConditionalGeneration", "LlavaOnevisionForConditionalGeneration",
    "MiniCPM3ForCausalLM", "Ministral3ForCausalLM", "NemotronForCausalLM", "OlmoForCausalLM",
    "PaliGemmaForConditionalGeneration", "Qwen2VLForConditionalGeneration", "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration", "SmolVLMForConditionalGeneration", "StableLmForCausalLM",
    "VaultGemmaForCausalLM",
})  # fmt: skip
"""Further decoders without experts whose layers consist of `*_proj` matrices, norms and biases."""
ROUNDED = DENSE | EXPERTS | FURTHER_EXPERTS | SEEING | JOINED | NAMED | STACKED_MXFP4
"""Every architecture that a format without calibration can have."""
LLAMA4 = frozenset({"Llama4ForCausalLM", "Llama4ForConditionalGeneration"})
"""Engines reorder the outputs of their Q and K while they load them."""
WALKED = ROUNDED - LLAMA4 - STACKED_MXFP4 - {"PaliGemmaForConditionalGeneration"}
"""Every architecture that our walk can calibrate.

Llama 4 calls its experts in another way. PaliGemma's tokens attend to later ones, so also to the
padding of a batch.
"""
SCANNING = frozenset({"FalconH1ForCausalLM", "GraniteMoeHybridForCausalLM"})
"""Those with Mamba layers, whose in_proj vLLM splits into parts of odd heights."""
GROUPED = WALKED - SCANNING
"""Those of `awq` and `gptq`, which need 8 outputs each: Mamba's in_proj ends in one a head."""
MEASURED = WALKED - NAMED - FURTHER_EXPERTS
"""Those whose importance matrices and cache our walk measures; it was not tried on the others."""


@cache
def gguf_architectures() -> frozenset[str]:
    """Return what `convert_hf_to_gguf.py --print-supported-models` prints."""
    return frozenset(json.loads((_FOLDER / "gguf_architectures.json").read_text("utf-8")))


@cache
def gguf_projectors() -> frozenset[str]:
    """Return the architectures whose vision or audio part the same program can convert."""
    return frozenset(json.loads((_FOLDER / "gguf_projectors.json").read_text("utf-8")))


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
