"""Settings that llama.cpp's converter reads in config.json, and that transformers 5 leaves out.

A base that its authors published has them; a folder that transformers 5 saved has not. Which they
are was found by comparing what the converter's classes read with what transformers' write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from weightsmith.core.errors import InputRefused
from weightsmith.models.facts import PREDICTING, ModelFacts
from weightsmith.quantizers.architectures import converted_as

Settings = dict[str, Any]
_SIGMOID = frozenset({"deepseek_v3", "dots1", "exaone_moe", "glm4_moe_lite", "minimax_m2"})
"""Model types whose router is a sigmoid in transformers, whatever config.json says."""
_FOURFOLD = frozenset(
    {"FalconForCausalLM", "GPT2LMHeadModel", "GPTBigCodeForCausalLM", "PhiForCausalLM"}
)
_UNGROUPED = frozenset({"OlmoeForCausalLM", "PhiForCausalLM"})
_VLLM = "choose target vllm"
_GEMMAS = {
    "Gemma2ForCausalLM": 46,
    "Gemma3ForCausalLM": 62,
    "Gemma3ForConditionalGeneration": 62,
    "Gemma3TextModel": 0,
}
"""Classes with `query_pre_attn_scalar` -> layers of the 27B model."""
_QUERY_SCALAR = 256
"""What transformers takes where config.json has none."""
_SCORING = ("score_function", "scoring_func", "score_func")


def as_published(config: Mapping[str, Any], *, predicts: bool = True) -> Settings:
    """Return a configuration with the settings that the converter reads.

    A text model's own part is completed, too. Without `predicts`, the checkpoint has no layers that
    predict further tokens, though its configuration may count some. Raises InputRefused for what
    llama.cpp cannot express.
    """
    kind = str(config.get("model_type"))
    changed = _CHANGED[kind](config) if kind in _CHANGED else {}
    left_out = {name for name, value in changed.items() if value is None}
    found = {name: value for name, value in {**config, **changed}.items() if name not in left_out}
    added = _MISSING[kind](config) if kind in _MISSING else {}
    if kind in _SIGMOID and not any(config.get(name) for name in _SCORING):
        added["scoring_func"] = "sigmoid"
    found |= {name: value for name, value in added.items() if config.get(name) is None}
    if not predicts:
        found |= {name: 0 for name in PREDICTING if found.get(name)}
    if isinstance(text := config.get("text_config"), Mapping):
        found["text_config"] = as_published(text, predicts=predicts)
    return found


def check_settings(model: ModelFacts) -> None:
    """Raise InputRefused for a model that llama.cpp would compute in another way, or not load.

    Its code has these for constants, and its converter does not look at them.
    """
    name, on = converted_as(model), model.switches
    if name == "HunYuanMoEV1ForCausalLM":
        _refuse("needs a tokenizer that is Python code, and no code of a model is run")
    if name == "AfmoeForCausalLM" and not on.get("mup_enabled"):
        _refuse("multiplies the embeddings (mup_enabled), and this model does not")
    if name == "FalconForCausalLM":
        in_turn = on.get("parallel_attn") is False and not on.get("new_decoder_architecture")
        if on.get("alibi") or on.get("bias") or in_turn:
            _refuse("has no alibi, bias or parallel_attn: false")
    if name == "PhiForCausalLM" and on.get("qk_layernorm"):
        _refuse("has no qk_layernorm")
    try:
        shape = model.shape
    except InputRefused:  # it has no attention
        return
    if name in _FOURFOLD and shape.intermediate != 4 * shape.hidden:
        _refuse(
            f"has feed-forward networks of {4 * shape.hidden}, and this is {shape.intermediate}"
        )
    heads = {"GPTBigCodeForCausalLM": 1}.get(name, shape.heads if name in _UNGROUPED else 0)
    if heads and shape.kv_heads != heads:
        _refuse(f"has {heads} heads of K and V, and this model has {shape.kv_heads}")


def other_scale(model: ModelFacts) -> str:
    """Return how llama.cpp scales a Gemma's attention in another way; "" where it does not.

    It reads no `query_pre_attn_scalar`: it takes the width of a head, or in the 27B models, which
    it knows by their number of layers, the hidden size per head (load_arch_hparams in its
    src/models/gemma2.cpp, gemma3.cpp and gemma-embedding.cpp).
    """
    name = converted_as(model)
    if name not in _GEMMAS or isinstance(model.read_shape, InputRefused):
        return ""
    shape, own = model.shape, model.query_scalar or _QUERY_SCALAR
    theirs = shape.hidden // shape.heads if shape.layers == _GEMMAS[name] else shape.head_dim
    if own == theirs:
        return ""
    return (
        f"llama.cpp divides this model's attention scores by the square root of {theirs}, not of"
        f" {own:g} (query_pre_attn_scalar in config.json), so its answers will differ"
    )


def _refuse(why: str) -> NoReturn:
    raise InputRefused(f"config.json: llama.cpp's model of this architecture {why}", hint=_VLLM)


def _gpt2(config: Mapping[str, Any]) -> Settings:
    return {"n_ctx": config.get("n_positions", 1024)}


def _neox(config: Mapping[str, Any]) -> Settings:
    return {"rotary_pct": _turned(config)}


def _cohere2(config: Mapping[str, Any]) -> Settings:
    return {"rotary_pct": _turned(config)}


def _minimax_m2(config: Mapping[str, Any]) -> Settings:
    return {"rotary_dim": int(_head_dim(config) * _turned(config))}


def _falcon_h1(config: Mapping[str, Any]) -> Settings:
    return {"head_dim": _head_dim(config)}


def _falcon(config: Mapping[str, Any]) -> Settings:
    """Return the heads of K and V of an older Falcon: transformers writes those of Q there."""
    shared = config.get("multi_query", True) and not config.get("new_decoder_architecture")
    return {"num_kv_heads": 1} if shared else {}


def _granite_hybrid(config: Mapping[str, Any]) -> Settings:
    kinds = config.get("layer_types") or []
    return {"layer_types": [_OLDER.get(kind, kind) for kind in kinds]} if kinds else {}


def _nemotron_h(config: Mapping[str, Any]) -> Settings:
    """Return the layers as letters; without experts, the converter must not read a number of them.

    Raises InputRefused for layers with experts beside others without, which llama.cpp's two models
    do not have.
    """
    kinds = config.get("layers_block_type")
    if not isinstance(kinds, list) or not kinds:
        return {}
    letters = "".join(_LETTERS.get(str(kind), "?") for kind in kinds)
    if "E" in letters and "-" in letters:
        raise InputRefused(
            "config.json: layers_block_type has `moe` and `mlp`, and llama.cpp knows a Nemotron-H"
            " with one of them",
            hint=_VLLM,
        )
    found: Settings = {"hybrid_override_pattern": letters}
    return found if "E" in letters else {**found, **dict.fromkeys(_COUNTED)}


def _modernbert(config: Mapping[str, Any]) -> Settings:
    found = {"layer_norm_eps": config.get("norm_eps", 1e-5)}
    kinds = config.get("layer_types") or []
    whole = [number for number, kind in enumerate(kinds) if kind == "full_attention"]
    step = whole[1] if len(whole) > 1 else len(kinds)
    if kinds and whole != list(range(0, len(kinds), step)):
        raise InputRefused(
            "config.json: layer_types is irregular, and llama.cpp knows only every n-th layer as"
            " one that sees all tokens",
            hint=_VLLM,
        )
    return found | ({"global_attn_every_n_layers": step} if kinds else {})


_COUNTED = ("num_experts_per_tok", "n_routed_experts", "n_shared_experts", "n_group", "topk_group")
_OLDER = {"full_attention": "attention", "linear_attention": "mamba"}
"""A kind of layer in transformers 5 -> in what the converter reads."""
_LETTERS = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*"} | {
    "mlp": "-",
    "moe": "E",
}
_CHANGED: Mapping[str, Callable[[Mapping[str, Any]], Settings]] = {
    "falcon": _falcon,
    "granitemoehybrid": _granite_hybrid,
    "nemotron_h": _nemotron_h,
}
"""Model type -> settings that the converter takes for something else; None leaves one out."""
_MISSING: Mapping[str, Callable[[Mapping[str, Any]], Settings]] = {
    "cohere2": _cohere2,
    "falcon_h1": _falcon_h1,
    "gpt2": _gpt2,
    "gpt_neox": _neox,
    "minimax_m2": _minimax_m2,
    "modernbert": _modernbert,
}
"""Model type -> what it lacks."""


def _turned(config: Mapping[str, Any]) -> float:
    """Return which part of a head is rotated."""
    rope = config.get("rope_parameters")
    found = rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None
    return float(found or config.get("partial_rotary_factor") or 1)


def _head_dim(config: Mapping[str, Any]) -> int:
    found = config.get("head_dim")
    return int(found or config["hidden_size"] // config["num_attention_heads"])
