"""What a checkpoint weighs, worked out from config.json alone: for plans before a download."""

from __future__ import annotations

from dataclasses import dataclass

from weightsmith.core.errors import InputRefused
from weightsmith.models.facts import Matrices, ModelFacts, Vision
from weightsmith.models.shape import ModelShape

_TIED = {
    "Llama": False, "Mistral": False, "Mixtral": False, "Phi3": False, "PhiMoE": False,
    "Qwen2": False, "Qwen3": False, "Qwen2Moe": False, "Qwen3Moe": False,
    "Gemma": True, "Gemma2": True, "Gemma3": True,
    "Granite": False, "Olmo2": False, "Olmo3": False, "SmolLM3": True,
    "DeepseekV2": False, "DeepseekV3": False, "Glm4Moe": False, "GptOss": False,
    "Ernie4_5_Moe": True,
    "Cohere": True, "Cohere2": True, "Glm": False, "Glm4": False, "Olmo": False, "SeedOss": False,
    "StableLm": False, "Exaone4": False,
    "Qwen2VL": False, "Qwen2_5_VL": False, "Qwen3VL": False, "Mistral3": False, "Llava": False,
    "InternVL": False, "PaliGemma": True,
    "Bloom": True, "Falcon": True, "GPT2": True, "GPTBigCode": True, "GPTNeoX": False,
    "Bert": True, "ModernBert": True, "Roberta": True, "XLMRoberta": True,
    "Nemotron": False, "OPT": True, "Phi": False, "Starcoder2": True, "Arcee": False,
}  # fmt: skip
"""Families -> whether the output layer is the embedding where config.json does not say
(transformers, the `configuration_*.py` of each)."""
_UNGATED = frozenset({
    "Bloom", "Falcon", "GPT2", "GPTBigCode", "GPTNeoX", "Nemotron", "OPT", "Phi", "Starcoder2",
    "Apertus", "Arcee", "Bert", "Jais2", "NemotronH", "Roberta", "XLMRoberta",
})  # fmt: skip
"""Families whose feed-forward has two matrices; the others' have a third, the gate."""
_POSITIONS = frozenset({"Bert", "GPT2", "GPTBigCode", "OPT", "Roberta", "XLMRoberta"})
"""Families with a table of positions."""
_PLAIN_PROJECTION = frozenset({"Gemma3", "PaliGemma"})
"""Families with one matrix between tower and decoder; others have two, or more where patches are
merged."""

NO_WEIGHTS = "no weights there: their size is "
"""How the note of a plan begins whose weights are not there."""

_SPARSE = frozenset({
    "Mixtral", "PhiMoE", "Qwen2Moe", "Qwen3Moe", "DeepseekV2", "DeepseekV3", "Ernie4_5_Moe",
    "Glm4Moe", "GptOss",
})  # fmt: skip
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


def weights_from_config(model: ModelFacts) -> int:
    """Return the bytes of a checkpoint's weights by its config.json, within about one percent.

    Raises InputRefused for a family whose layers are not known here, or a packing.
    """
    counted = parameters(model)
    plain = 32 if model.shape.dtype == "float32" else 16
    packed = experts = float(plain)
    if model.packing:
        method = model.packing.method
        if method not in _BITS or model.packing.bits != 4:
            raise InputRefused(
                f"the size of {method or 'packed'} weights cannot be worked out from config.json",
                hint="add the weights, or their model.safetensors.index.json",
            )
        experts = _BITS[method]
        packed = plain if method == "mxfp4" else experts
    bits = counted.tables * plain + counted.dense * packed + counted.experts * experts
    return int(bits / 8)


def parameters(model: ModelFacts) -> Parameters:
    """Count the parameters of a known family; raises InputRefused for others and wrong numbers."""
    shape, family = model.shape, _family(model)
    if family not in _TIED or any(part.kind == "state" for part in shape.cache):
        raise InputRefused(
            f"there are no weights, and the size of {shape.architecture} cannot be worked out from"
            " config.json",
            hint="add the weights, or their model.safetensors.index.json",
        )
    tied = is_tied(model)
    tied |= not model.architecture.endswith(("LM", "LMHeadModel", "Generation"))  # no output layer
    parts = model.matrices
    if family in _SPARSE and not parts.experts:
        raise InputRefused(
            f"config.json: {shape.architecture} has experts, and it does not say how many",
            hint="check the checkpoint's config.json",
        )
    sparse, predicted = parts.sparse_layers, parts.predicted_layers
    one = 3 * shape.hidden * (parts.expert_width or shape.intermediate)
    shared = parts.shared_experts * one + 3 * shape.hidden * parts.shared_width
    router, attention = shape.hidden * parts.experts, _attention(shape, parts)
    dense = shape.layers * attention
    width = 2 if family in _UNGATED else 3
    dense += (shape.layers - sparse) * width * shape.hidden * shape.intermediate
    dense += sparse * (shared + router)
    dense += predicted * (attention + shared + router + 2 * shape.hidden**2)
    rows = (1 if tied else 2) * shape.vocab * (1 + predicted)
    rows += shape.max_positions if family in _POSITIONS else 0
    plain = family in _PLAIN_PROJECTION
    return Parameters(
        tables=rows * shape.hidden,
        dense=dense + _vision(parts.vision, 0 if plain else shape.hidden, shape.hidden),
        experts=(sparse + predicted) * parts.experts * one,
    )


def is_tied(model: ModelFacts) -> bool:
    """Return whether the output layer is the embedding; of unknown families, only Gemmas do so."""
    tied, family = model.tied_embeddings, _family(model)
    return _TIED.get(family, family.startswith("Gemma")) if tied is None else tied


def is_gated(model: ModelFacts) -> bool:
    """Return whether a feed-forward network has a third matrix, the gate."""
    return _family(model) not in _UNGATED


def _family(model: ModelFacts) -> str:
    name = model.architecture.partition("For")[0].removesuffix("LMHeadModel")
    return name.removesuffix("Model")


def _attention(shape: ModelShape, parts: Matrices) -> int:
    out = shape.heads * shape.v_head_dim * shape.hidden
    if not shape.kv_lora_rank:
        keys = shape.kv_heads * (shape.head_dim + shape.v_head_dim)
        return shape.hidden * (shape.heads * shape.head_dim + keys) + out
    # Multi-head latent attention: queries may be, keys and values are, factored.
    inside, rank = parts.nope_head_dim, parts.query_rank
    queries = shape.heads * (inside + shape.rope_head_dim)
    asked = rank * (shape.hidden + queries) if rank else shape.hidden * queries
    down = shape.hidden * (shape.kv_lora_rank + shape.rope_head_dim)
    return asked + down + shape.kv_lora_rank * shape.heads * (inside + shape.v_head_dim) + out


def _vision(tower: Vision, inside: int, hidden: int) -> int:
    """Return the parameters of a vision tower and its projection, `inside` wide; 0 without one."""
    if not tower.layers:
        return 0
    width, merged = tower.hidden, tower.hidden * tower.merged**2
    matrices = 3 if tower.gated else 2
    each = 4 * width**2 + matrices * width * (tower.intermediate or 4 * width)
    if tower.merged > 1:
        return tower.layers * each + tower.mergers * merged * (merged + hidden)
    return tower.layers * each + width * hidden + inside * hidden
