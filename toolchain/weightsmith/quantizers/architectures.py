"""Which architectures can have a packed format, and with which dimensions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from weightsmith.core.errors import InputRefused
from weightsmith.core.values import Json
from weightsmith.models.facts import ModelFacts
from weightsmith.quantizers.checkpoints import DENSE, check_config
from weightsmith.quantizers.known import STACKED_MXFP4, what_works
from weightsmith.quantizers.schemes import Scheme

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

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_QKV = frozenset({"q_proj", "k_proj", "v_proj"})
_GATED = frozenset({"gate_proj", "up_proj"})
_LACKED = {
    **dict.fromkeys(JOINED, (_QKV | _GATED, "joins Q, K and V, and gate and up")),
    **dict.fromkeys(("GlmForCausalLM", "Glm4ForCausalLM"), (_GATED, "joins gate and up")),
    **dict.fromkeys(
        ("ApertusForCausalLM", "ArceeForCausalLM", "Jais2ForCausalLM", "NemotronForCausalLM"),
        (frozenset({"gate_proj"}), "has no gate"),
    ),
    "Lfm2ForCausalLM": (
        _GATED | {"down_proj", "o_proj"},
        "has w1, w3, w2 and out_proj instead",
    ),
}
"""Architecture -> matrices of other decoders that its layers lack, and why."""
_MLP = ("gate_proj", "up_proj", "down_proj")


def check_rounded(scheme: Scheme, model: ModelFacts) -> None:
    """Refuse an architecture that is not known, and rows or outputs that tiles do not divide."""
    check_config(model, ROUNDED)
    if model.architecture in STACKED_MXFP4 and scheme.format.kind != "mxfp4":
        raise InputRefused(
            f"vLLM loads the experts of {model.architecture} in MXFP4 only, not in"
            f" {scheme.format.name}",
            hint=what_works(model),
        )
    if scheme.tile[0] > 1 and model.architecture in LLAMA4:
        # vLLM 0.33, models/llama4.py permute_qk_weight_for_rotary
        raise InputRefused(
            f"vLLM cannot load {scheme.format.name} weights of {model.architecture}: it reorders"
            " the rows of Q and K, and a block has one scale for several rows",
            hint="choose fp8, which has a scale per row",
        )
    if scheme.tile[0] > 1 and model.architecture in SCANNING:
        # vLLM 0.33, layers/mamba/mamba_mixer2.py
        raise InputRefused(
            f"{scheme.format.name} has blocks of rows, and vLLM splits {model.architecture}'s"
            " mamba.in_proj inside them",
            hint="choose fp8, which has a scale per row",
        )
    width, height = scheme.tile[1], scheme.tile[0]
    for name, outputs, inputs in dimensions(model):
        if scheme.packed and inputs % width:
            raise InputRefused(
                f"{scheme.format.name} has a scale per {width} inputs, and {name} has {inputs}",
                hint="choose fp8 or w8a8, which have a scale per row",
            )
        if height > 1 and outputs % height:
            raise InputRefused(
                f"{scheme.format.name} has blocks of {height} outputs, and {name}, which engines"
                f" fuse with others, has {outputs}",
                hint="choose fp8, which has a scale per row",
            )


def dimensions(model: ModelFacts) -> Iterator[tuple[str, int, int]]:
    """Yield name, outputs and inputs of matrices; 0 outputs where nothing is fused behind them."""
    shape, more = model.shape, model.matrices
    if shape.kv_lora_rank:
        yield "o_proj", 0, shape.heads * (shape.v_head_dim or shape.head_dim)
    else:
        yield "q_proj", shape.heads * shape.head_dim, shape.hidden
        yield "k_proj", shape.kv_heads * shape.head_dim, shape.hidden
        yield "o_proj", 0, shape.heads * shape.head_dim
    if more.sparse_layers < shape.layers:
        yield "gate_proj", shape.intermediate, shape.hidden
        yield "down_proj", 0, shape.intermediate
    if more.experts:
        width = more.expert_width or shape.intermediate
        yield "an expert's gate_proj", width, shape.hidden
        yield "an expert's down_proj", 0, width
    if more.shared_width:
        yield "the shared expert's gate_proj", more.shared_width, shape.hidden
        yield "the shared expert's down_proj", 0, more.shared_width


def check_kept(model: ModelFacts, chosen: Mapping[str, Json]) -> None:
    """Refuse names that a model lacks, and to keep only some matrices of a layer's experts."""
    keep = set(chosen.get("keep") or ())
    for end in sorted(keep):
        _check_there(model, end)
    if keep and model.architecture in STACKED_MXFP4:
        raise InputRefused(
            f"keep: vLLM loads all experts of {model.architecture} in MXFP4, and attention is never"
            " quantized",
            hint="remove keep",
        )
    if model.matrices.experts:
        _check_experts(keep)


def _check_there(model: ModelFacts, end: str) -> None:
    """Refuse a name of a layer or of a matrix that is not there."""
    layer = _LAYER.search(end)
    if layer and model.shape.layers and int(layer[1]) >= model.shape.layers:
        raise InputRefused(
            f"keep: no matrix has a name that ends in {end!r}: the model has"
            f" {model.shape.layers} layers",
            hint=f"name a layer from 0 to {model.shape.layers - 1}",
        )
    lacked, why = _LACKED.get(model.architecture, (frozenset(), ""))
    if model.shape.kv_lora_rank:
        lacked, why = _QKV, "makes Q, K and V in several steps"
    if end.rpartition(".")[2] in lacked:
        others = "" if "o_proj" in lacked else "; o_proj and down_proj can be kept"
        raise InputRefused(
            f"keep: no matrix has a name that ends in {end!r}: {model.architecture} {why}",
            hint=f"remove it, and what engines fuse with it{others}",
        )


def _check_experts(keep: Collection[str]) -> None:
    """Refuse to keep only some matrices of a layer's experts: engines fuse them all into two."""
    for end in sorted(keep):
        stem, _, name = end.rpartition(".")
        if "shared" in stem:
            continue
        missing = [p for p in _MLP if name in _MLP and f"{stem}.{p}".lstrip(".") not in keep]
        parts = stem.split(".")
        if missing or "experts" in parts or parts[-1].isdigit():  # a number: of one expert
            raise InputRefused(
                f"keep: {end!r} would leave some of a layer's experts in 16 bits, and engines"
                " load either all or none",
                hint="list gate_proj, up_proj and down_proj of the same layers, or none of them",
            )
