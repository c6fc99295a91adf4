"""Formats with a scale per block of weights: what several GPUs can share."""

from __future__ import annotations

from weightsmith.core.errors import UsageError
from weightsmith.core.values import Format
from weightsmith.models.facts import ModelFacts

_TILES = {"fp8-block": 128, "nvfp4a16": 16, "nvfp4": 16, "mxfp4a16": 32}
"""Format -> weights along the axis that tensor parallelism divides: a GPU has whole tiles."""

_PADDED = frozenset({"GptOssForCausalLM"})
"""Architectures whose experts vLLM pads to whole tiles (models/gpt_oss.py: _load_weights_mxfp4)."""


def check_blocks(model: ModelFacts, format_: Format, gpus: int) -> None:
    """Refuse tensor parallelism that would cut through the blocks of a format.

    Source: validate_fp8_block_shape and GroupQuantScaleParameter of vLLM 0.33, and the same checks
    in SGLang 0.5.23. Raises UsageError.
    """
    size = _TILES.get(format_.name, 0)
    if not size or gpus < 2 or model.architecture in _PADDED:
        return
    shape, more = model.shape, model.matrices
    parts = {"o_proj": shape.heads * (shape.v_head_dim or shape.head_dim)}
    if size == 128 and not shape.kv_lora_rank:
        parts["k_proj"] = max(shape.kv_heads // gpus, 1) * shape.head_dim * gpus
    if not more.experts or more.sparse_layers < shape.layers:
        parts["down_proj"] = shape.intermediate
    if more.experts:
        parts["an expert's down_proj"] = more.expert_width or shape.intermediate
    for name, length in parts.items():
        if length % (size * gpus):
            raise UsageError(
                f"{format_.name} has blocks of {size} weights, and {gpus} GPUs would share the"
                f" {length} of {name}: no whole number of blocks each",
                hint="set serve.tensor_parallel_size to fewer GPUs, or choose fp8, which has a"
                " scale per row",
            )
