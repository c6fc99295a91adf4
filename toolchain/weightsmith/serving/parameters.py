"""What a checkpoint weighs, worked out from config.json alone: for plans before a download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weightsmith.errors import InputRefused
from weightsmith.serving.model import ModelShape
from weightsmith.serving.text import text_part
from weightsmith.values import Json

_TIED = {
    "Llama": False, "Mistral": False, "Mixtral": False, "Phi3": False, "PhiMoE": False,
    "Qwen2": False, "Qwen3": False, "Qwen2Moe": False, "Qwen3Moe": False,
    "Gemma": True, "Gemma2": True, "Gemma3": True,
    "Granite": False, "Olmo2": False, "Olmo3": False, "SmolLM3": True,
    "DeepseekV2": False, "DeepseekV3": False, "Glm4Moe": False, "GptOss": False,
}  # fmt: skip
"""Families with a gated feed-forward, here or in experts -> whether the output layer is the
embedding where config.json does not say (transformers, the `configuration_*.py` of each)."""

WORKED_OUT = "no weights there: their size is worked out from config.json, an estimate"
"""The note that belongs to such a plan."""

_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts")
_SPARSE = frozenset(
    {"Mixtral", "PhiMoE", "Qwen2Moe", "Qwen3Moe", "DeepseekV2", "DeepseekV3", "Glm4Moe", "GptOss"}
)
_BITS = {"fp8": 8.0, "awq": 4.25, "gptq": 4.25, "mxfp4": 4.25}
"""`quant_method` -> bits of a packed weight with its scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Numbers of parameters; norms and biases, about one in a thousand, are left out."""

    tables: int
    """Embedding, and output layer where it has its own."""
    dense: int
    """Matrices of attention, feed-forward and a vision tower."""
    experts: int

    @property
    def all(self) -> int:
        """Their sum."""
        return self.tables + self.dense + self.experts


def weights_from_config(config: Mapping[str, Json]) -> int:
    """Return the bytes of a checkpoint's weights by its config.json, within about one percent.

    Raises InputRefused for a family whose layers are not known here, or a packing.
    """
    counted = parameters(config)
    shape = ModelShape.from_config(config)
    plain = 32 if shape.dtype == "float32" else 16
    packed = experts = float(plain)
    packing = config.get("quantization_config")
    if isinstance(packing, Mapping):
        method = str(packing.get("quant_method", ""))
        if method not in _BITS or packing.get("bits", 4) != 4:
            raise InputRefused(
                f"the size of {method or 'packed'} weights cannot be worked out from config.json",
                hint="add the weights, or their model.safetensors.index.json",
            )
        experts = _BITS[method]
        packed = plain if method == "mxfp4" else experts
    bits = counted.tables * plain + counted.dense * packed + counted.experts * experts
    return int(bits / 8)


def parameters(config: Mapping[str, Json]) -> Parameters:
    """Count the parameters of a known family; raises InputRefused for another, or a lying file."""
    shape = ModelShape.from_config(config)
    family = shape.architecture.partition("For")[0]
    states = [part for part in shape.cache if part.kind == "state"]
    if family not in _TIED or states:
        raise InputRefused(
            f"there are no weights, and the size of {shape.architecture} cannot be worked out from"
            " config.json",
            hint="add the weights, or their model.safetensors.index.json",
        )
    inner = text_part(config)
    tied = inner.get("tie_word_embeddings", config.get("tie_word_embeddings", _TIED[family]))
    number = next((_count(inner, name) for name in _EXPERTS if inner.get(name)), 0)
    if family in _SPARSE and not number:
        raise InputRefused(
            f"config.json: {shape.architecture} has experts, and it does not say how many",
            hint="check the checkpoint's config.json",
        )
    sparse = _sparse_layers(inner, shape.layers) if number else 0
    width = _count(inner, "moe_intermediate_size") or shape.intermediate
    one = 3 * shape.hidden * width
    dense = shape.layers * _attention(inner, shape)
    dense += (shape.layers - sparse) * 3 * shape.hidden * shape.intermediate
    shared = _count(inner, "n_shared_experts") * one
    shared += 3 * shape.hidden * _count(inner, "shared_expert_intermediate_size")
    # Multi-token prediction: further layers at the end, which the files have.
    predicted = _count(inner, "num_nextn_predict_layers") if number else 0
    dense += sparse * (shared + shape.hidden * number) + predicted * (
        _attention(inner, shape) + shared + shape.hidden * number + 2 * shape.hidden**2
    )
    return Parameters(
        tables=(1 if tied else 2) * shape.vocab * shape.hidden * (1 + predicted),
        dense=dense + _vision(config, shape.hidden),
        experts=(sparse + predicted) * number * one,
    )


def _attention(config: Mapping[str, Json], shape: ModelShape) -> int:
    """Return the parameters of one attention layer."""
    out = shape.heads * shape.v_head_dim * shape.hidden
    if not shape.kv_lora_rank:
        keys = shape.kv_heads * (shape.head_dim + shape.v_head_dim)
        return shape.hidden * (shape.heads * shape.head_dim + keys) + out
    # Multi-head latent attention: queries may be, keys and values are, factored.
    inside = _count(config, "qk_nope_head_dim")
    queries, rank = shape.heads * (inside + shape.rope_head_dim), _count(config, "q_lora_rank")
    asked = rank * (shape.hidden + queries) if rank else shape.hidden * queries
    down = shape.hidden * (shape.kv_lora_rank + shape.rope_head_dim)
    return asked + down + shape.kv_lora_rank * shape.heads * (inside + shape.v_head_dim) + out


def _sparse_layers(config: Mapping[str, Json], layers: int) -> int:
    """Return how many layers have experts instead of one feed-forward."""
    step = _count(config, "decoder_sparse_step") or 1
    first = _count(config, "first_k_dense_replace")
    listed = config.get("mlp_only_layers")
    plain = listed if isinstance(listed, list) else []
    return sum(i >= first and (i + 1) % step == 0 and i not in plain for i in range(layers))


def _vision(config: Mapping[str, Json], hidden: int) -> int:
    """Return the parameters of a vision tower and its projection; 0 without one."""
    tower = config.get("vision_config")
    if not isinstance(tower, Mapping) or not tower.get("hidden_size"):
        return 0
    width, inner = _count(tower, "hidden_size"), _count(tower, "intermediate_size")
    each = 4 * width**2 + 2 * width * (inner or 4 * width)
    return _count(tower, "num_hidden_layers") * each + width * hidden


def _count(config: Mapping[str, Json], name: str) -> int:
    value = config.get(name) or 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 10_000_000:
        raise InputRefused(
            f"config.json: {name} is {value!r}, not a whole number from 0 on",
            hint="check the checkpoint's config.json",
        )
    return value
