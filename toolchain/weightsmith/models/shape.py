"""A decoder's dimensions, read from config.json and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weightsmith.core.errors import InputRefused
from weightsmith.core.values import JsonValue
from weightsmith.models.attention import CacheLayers, block_attention, cache_layers

_LARGEST = {
    "num_hidden_layers": 10_000,
    "hidden_size": 1_000_000,
    "num_attention_heads": 100_000,
    "num_key_value_heads": 100_000,
    "head_dim": 100_000,
    "v_head_dim": 100_000,
    "max_position_embeddings": 1_000_000_000,
    "vocab_size": 10_000_000,
    "intermediate_size": 100_000_000,
    "sliding_window": 1_000_000_000,
    "kv_lora_rank": 1_000_000,
    "qk_rope_head_dim": 100_000,
    "qk_nope_head_dim": 100_000,
}
_STATEFUL_KINDS = ("mamba", "rwkv", "xlstm", "retnet")
"""Of model types."""
_HINT = "check the checkpoint's config.json: a serving plan made from wrong numbers would not start"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder's dimensions, from which the sizes of cache and activations follow."""

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    """Width of the feed-forward networks: the largest if layers differ."""
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    max_positions: int
    """The model's maximum context in tokens; 0 if it is not set."""
    vocab: int
    sliding_window: int
    """The sliding window in tokens; 0 without sliding layers."""
    layer_types: tuple[str, ...]
    """One per layer; empty if they are not set."""
    dtype: str
    kv_lora_rank: int = 0
    """Width of the compressed keys and values of latent attention; 0 for other models."""
    rope_head_dim: int = 0
    state_dtype: str = ""
    """Dtype of the recurrent state of Mamba and linear attention; "" for the model's."""
    cache: tuple[CacheLayers, ...] = ()
    """The layers' caches, by kind."""

    @property
    def latent_cache(self) -> bool:
        """Whether engines cache one compressed row of latent attention for all heads.

        Not of MiniCPM 3, whose keys and values are expanded first (vLLM 0.33, models/minicpm3.py;
        llama.cpp, src/models/minicpm3.cpp).
        """
        return bool(self.kv_lora_rank) and not self.architecture.startswith("MiniCPM3")

    @property
    def sliding_layers(self) -> int:
        """Layers with a sliding window; 0 if config.json does not list them."""
        if not self.sliding_window:
            return 0
        return sum(kind == "sliding_attention" for kind in self.layer_types)

    @classmethod
    def of(cls, inner: Mapping[str, JsonValue], architecture: str, dtype: str) -> ModelShape:
        """Read the text config.

        Raises InputRefused for missing and invalid numbers.
        """
        if not architecture:
            raise InputRefused("config.json has no architectures", hint=_HINT)
        blocks = inner.get("layers_block_type")  # Nemotron-H as transformers 5 writes it
        default = len(blocks) if isinstance(blocks, list) and blocks else None
        layers = _number(inner, "num_hidden_layers", "n_layer", default=default)
        hidden = _number(inner, "hidden_size", "n_embd", "n_embed")  # the last is Bloom's
        if has_states_alone(inner):
            raise InputRefused(
                f"{architecture} has states instead of attention, and its memory cannot be planned",
                hint="choose a decoder with attention",
            )
        heads = _number(inner, "num_attention_heads", "n_head")
        kv_heads = _kv_heads(inner, heads)
        head_dim = _number(inner, "head_dim", default=0) or _head_dim(inner, hidden, heads)
        if heads % kv_heads:
            raise InputRefused(
                f"config.json: num_attention_heads {heads} is not a multiple of"
                f" num_key_value_heads {kv_heads}",
                hint=_HINT,
            )
        window = _sliding_window(inner)
        kinds = _layer_types(inner, layers)
        return cls(
            architecture=architecture,
            layers=layers,
            hidden=hidden,
            intermediate=_intermediate(inner, hidden),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            v_head_dim=_number(inner, "v_head_dim", default=0) or head_dim,
            max_positions=_number(
                inner, "max_position_embeddings", "n_positions", "seq_length", default=0
            ),
            vocab=_number(inner, "vocab_size"),
            sliding_window=window,
            layer_types=kinds,
            dtype=dtype or "float32",
            kv_lora_rank=_number(inner, "kv_lora_rank", default=0),
            rope_head_dim=_number(inner, "qk_rope_head_dim", default=0),
            state_dtype=_state_dtype(architecture, inner),
            cache=cache_layers(architecture, inner, layers, window),
        )


def has_states_alone(config: Mapping[str, JsonValue]) -> bool:
    """Return whether a decoder has no attention but states, as Mamba and RWKV have."""
    if "num_attention_heads" in config or "n_head" in config:
        return False
    stated = config.get("state_size") or config.get("attention_hidden_size")
    return bool(stated) or str(config.get("model_type")).startswith(_STATEFUL_KINDS)


def _intermediate(config: Mapping[str, JsonValue], hidden: int) -> int:
    """Return the width of the feed-forward networks; Gemma 3n lists one per layer."""
    listed, other = config.get("intermediate_size"), config.get("n_inner")
    widths = listed if isinstance(listed, list) and listed else [listed]
    each = ({"intermediate_size": width, "n_inner": other} for width in widths)
    return max(_number(one, "intermediate_size", "n_inner", default=4 * hidden) for one in each)


def _kv_heads(config: Mapping[str, JsonValue], heads: int) -> int:
    """Return the number of key-value heads by any of its keys (vLLM 0.33, config/model.py)."""
    # Older Falcon and GPT-BigCode: one key-value head.
    if config.get("multi_query") is True and not config.get("new_decoder_architecture"):
        return 1
    # Nemotron's pruned Llama has null where others have a number. Its layers may differ: the most
    # heads that one of them has are planned for all, since a cache too small is worse than one too
    # large.
    grouped = (one.get("n_heads_in_group") for one in block_attention(config))
    if each := min((n for n in grouped if type(n) is int and 0 < n <= heads), default=0):
        return heads // each
    names = ("num_key_value_heads", "n_head_kv", "num_kv_heads", "multi_query_group_num")
    return _number(config, *names, default=heads)


def _number(config: Mapping[str, JsonValue], *names: str, default: int | None = None) -> int:
    """Return the first key that is set; a default of 0 also allows the value 0."""
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise InputRefused(f"config.json: {name} is {value!r}, not an integer", hint=_HINT)
        most = _LARGEST.get(name, _LARGEST["vocab_size"])
        least = 0 if default == 0 else 1
        if not least <= value <= most:
            raise InputRefused(
                f"config.json: {name} is {value}, outside {least} to {most}", hint=_HINT
            )
        return value
    if default is None:
        raise InputRefused(f"config.json has no {names[0]}", hint=_HINT)
    return default


def _head_dim(config: Mapping[str, JsonValue], hidden: int, heads: int) -> int:
    rope = _number(config, "qk_rope_head_dim", default=0)
    if rope:
        return rope + _number(config, "qk_nope_head_dim", default=0)
    if hidden % heads:
        raise InputRefused(
            f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
            " and there is no head_dim",
            hint=_HINT,
        )
    return hidden // heads


def _sliding_window(config: Mapping[str, JsonValue]) -> int:
    # Qwen2 sets a window and disables it.
    if config.get("use_sliding_window") is False:
        return 0
    return _number(config, "sliding_window", default=0)


def _layer_types(config: Mapping[str, JsonValue], layers: int) -> tuple[str, ...]:
    kinds = config.get("layer_types")
    if kinds is None:
        return ()
    if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
        raise InputRefused("config.json: layer_types is not a list of names", hint=_HINT)
    if len(kinds) != layers:
        raise InputRefused(
            f"config.json: layer_types has {len(kinds)} entries for {layers} layers", hint=_HINT
        )
    return tuple(kinds)


def _state_dtype(architecture: str, config: Mapping[str, JsonValue]) -> str:
    """Return the model's state dtype (vLLM, model_executor/models/config.py)."""
    for name in ("mamba_ssm_cache_dtype", "mamba_ssm_dtype"):
        if config.get(name) in {"float32", "float16", "bfloat16"}:
            return str(config[name])
    return "float32" if architecture.startswith("NemotronH") else ""
