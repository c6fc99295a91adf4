"""Whether a target's KV cache gets calibrated scales, and if not, why."""

from __future__ import annotations

from collections.abc import Mapping

from weightsmith.checkpoints.facts import ModelFacts
from weightsmith.errors import InputRefused
from weightsmith.planning.memory import cache_scales_memory
from weightsmith.planning.options import texts_of
from weightsmith.planning.origins import origin_of
from weightsmith.quantizers.architectures import MEASURED
from weightsmith.recipe_file import RecipeFile
from weightsmith.serving.memory import human
from weightsmith.serving.targets import Target
from weightsmith.stages import cache_scales as stage
from weightsmith.tools import Tools
from weightsmith.values import LORA, Json, Sources, Tree

_E4M3 = frozenset({"fp8", "fp8_e4m3"})
_NO_ATTENTION: Mapping[str, str] = {
    # vLLM 0.33, auto_awq.py and auto_gptq.py: get_quant_method has nothing for attention
    "awq": "vLLM reads no scales of a cache from AWQ checkpoints",
    "gptq": "vLLM reads no scales of a cache from GPTQ checkpoints",
}


def has_scales(file: RecipeFile, target: Target, model: ModelFacts) -> bool:
    """Return whether a target's checkpoint gets scales; raises InputRefused as `missing` does."""
    return _is_asked(file, target) and not missing(file, target, model)


def missing(file: RecipeFile, target: Target, model: ModelFacts) -> str:
    """Return why an fp8 cache has scale 1.0; "" if it is calibrated, or not asked to be.

    Raises InputRefused with that reason if the recipe demands calibrated scales.
    """
    demanded = file.recipe.serve.kv_cache_scales == "calibrated"
    why = _obstacle(file, target, model) if demanded or _is_asked(file, target) else ""
    if why and demanded:
        raise InputRefused(
            f"{target.name}: kv_cache_scales: calibrated is not possible: {why}",
            hint="set serve.kv_cache_scales to auto, which warns and uses 1.0, or choose"
            " vllm, vllm-fp8 or vllm-w8a8 with kv_cache_dtype fp8 and calibration text",
        )
    return f"{target.name}: its fp8 cache has scale 1.0: {why}" if why else ""


def _is_asked(file: RecipeFile, target: Target) -> bool:
    serve = file.recipe.serve
    wanted = serve.kv_cache_dtype in _E4M3 and serve.kv_cache_scales != "none"
    return wanted and target.engine.name == "vllm"


def _obstacle(file: RecipeFile, target: Target, model: ModelFacts) -> str:
    """Return why scales cannot be measured or loaded, or ""."""
    if target.engine.name != "vllm" or file.recipe.serve.kv_cache_dtype not in _E4M3:
        return "only vLLM's fp8 cache (kv_cache_dtype fp8) has them"
    if target.format == LORA:
        return "the adapters are not merged, and change keys and values"
    if target.format.kind in _NO_ATTENTION:
        return _NO_ATTENTION[target.format.kind]
    if target.format.name == "awq-compressed":
        return "llm-compressor changes the scale of values while it quantizes"
    if model.packing and not file.recipe.adapters:  # a merge dequantizes
        return "the base is already quantized"
    if model.architecture not in MEASURED or model.shape.kv_lora_rank:
        return f"the calibration does not know the cache of {model.architecture}"
    if file.recipe.calibration is None:
        return "the recipe has no `calibration`"
    return ""


def forecast_scales(
    file: RecipeFile,
    target: Target,
    model: ModelFacts,
    sources: Sources,
    checkpoint: Tree | None,
    tools: Tools,
) -> dict[str, Json] | None:
    """Return the stage's row of a forecast; None if there is no such stage.

    `checkpoint` is None if it does not exist yet.
    """
    if not has_scales(file, target, model):
        return None
    base, texts = sources.base.tree, texts_of(file)
    whole = origin_of(target, sources, file.recipe.merge).size
    row: dict[str, Json] = {
        "target": target.name,
        "read": whole,
        "write": base.size - base.weight_bytes,  # the small files, beside which the scales lie
        "memory": cache_scales_memory(model, whole, texts),
    }
    if checkpoint is None:
        return {**row, "cached": False, "why": "its checkpoint comes first"}
    cached = tools.store.find(stage.inputs(checkpoint.digest, texts).key) is not None
    why = "" if cached else f"measured on the checkpoint, {human(checkpoint.size)}"
    return {**row, "cached": cached, "why": why}
