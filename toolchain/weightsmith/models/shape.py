"""A decoder's dimensions and what each layer caches, read from config.json and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from weightsmith.core.errors import InputRefused
from weightsmith.core.values import JsonValue

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

Kind = Literal["full", "sliding", "chunked", "state"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayers:
    """Layers of one kind: their number and what they cache."""

    kind: Kind
    """`full`: every token; `sliding`, `chunked`: a window; `state`: a fixed size per request."""
    layers: int
    window: int = 0
    """Size of the window or chunk in tokens."""
    convolved: int = 0
    """For `state`: elements of the convolution state per request and layer."""
    recurrent: int = 0
    """For `state`: elements of the recurrent state, which may have another dtype."""
    kv_heads: int = 0
    """Key-value heads where these layers have others than the model says of all; else 0."""
    head_dim: int = 0
    """The same of a head's width."""


_KINDS: Mapping[str, Kind] = {
    "full_attention": "full",
    "attention": "full",
    "full": "full",
    "sliding_attention": "sliding",
    "sliding": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "state",
    "mamba": "state",
    "mamba2": "state",
    "conv": "state",
}
"""Names in `layer_types` (transformers, configuration_utils.ALLOWED_LAYER_TYPES) -> kind."""

_NONE = frozenset({"moe", "mlp", "dense"})
"""Layers without a cache."""

# In older config.json files without layer_types, every n-th layer is full, the others slide.
# vLLM 0.33: model_executor/models/{gemma2,gemma3,cohere2}.py; transformers has the same defaults.
_FULL_EVERY = {"Gemma2": 2, "Gemma3": 6, "Cohere2": 4, "GptOss": 2}


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
        layers = _number(inner, "num_hidden_layers", "n_layer", "n_layers", default=default)
        # The third is Bloom's, the last DistilBERT's.
        hidden = _number(inner, "hidden_size", "n_embd", "n_embed", "dim")
        if has_states_alone(inner):
            raise InputRefused(
                f"{architecture} has states instead of attention, and its memory cannot be planned",
                hint="choose a decoder with attention",
            )
        heads = _number(inner, "num_attention_heads", "n_head", "n_heads")
        kv_heads = _kv_heads(inner, heads)
        head_dim = _number(inner, "head_dim", default=0) or _head_dim(inner, hidden, heads)
        if heads % kv_heads:
            raise InputRefused(
                f"config.json: num_attention_heads {heads} is not a multiple of"
                f" num_key_value_heads {kv_heads}",
                hint=_HINT,
            )
        # Qwen2 sets a window and disables it.
        slides = inner.get("use_sliding_window") is not False
        window = _number(inner, "sliding_window", default=0) if slides else 0
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
    listed, others = config.get("intermediate_size"), ("n_inner", "hidden_dim", "ffn_hidden_size")
    widths = listed if isinstance(listed, list) and listed else [listed]
    rest = {name: config.get(name) for name in others}
    each = ({"intermediate_size": width, **rest} for width in widths)
    return max(_number(one, "intermediate_size", *others, default=4 * hidden) for one in each)


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
    for name in ("mamba_ssm_cache_dtype", "mamba_ssm_dtype"):
        if config.get(name) in {"float32", "float16", "bfloat16"}:
            return str(config[name])
    return "float32" if architecture.startswith("NemotronH") else ""


def cache_layers(
    architecture: str, config: Mapping[str, JsonValue], layers: int, window: int
) -> tuple[CacheLayers, ...]:
    """Return the layers with a cache by kind, full attention first.

    `config` is the text config; `window` its sliding window, 0 for none. Raises InputRefused for
    unknown layer types.
    """
    if architecture.startswith("FalconH1"):  # every layer attends, and has a state beside
        names: Sequence[str] = ["full"] * layers + ["state"] * layers
    else:
        names = _names(architecture, config, layers, window)
    shared = config.get("num_kv_shared_layers")
    if isinstance(shared, int) and not isinstance(shared, bool) and 0 < shared < layers:
        # The last layers read the cache of earlier ones (Gemma 3n and 4).
        names = names[: layers - shared]
    found = []
    for kind in ("full", "chunked", "sliding", "state"):
        count = sum(name == kind for name in names)
        if not count:
            continue
        chunk = _int(config, "attention_chunk_size", 8192) if kind == "chunked" else 0
        convolved, recurrent = _state(config) if kind == "state" else (0, 0)
        heads, width = _own_heads(config, kind, [n for n, name in enumerate(names) if name == kind])
        found.append(
            CacheLayers(
                kind=kind,
                layers=count,
                window=window if kind == "sliding" else chunk,
                convolved=convolved,
                recurrent=recurrent,
                kv_heads=heads,
                head_dim=width,
            )
        )
    if not found:
        raise InputRefused(
            f"{architecture} has no layers with a cache or a state",
            hint="choose a decoder with attention",
        )
    return tuple(found)


def _names(
    architecture: str, config: Mapping[str, JsonValue], layers: int, window: int
) -> Sequence[str]:
    """Return one kind per layer; "" for no cache."""
    listed = config.get("layer_types") or config.get("layers_block_type")
    if isinstance(listed, list):
        kinds = [_kind(architecture, str(name)) for name in listed]
        # Without a window, sliding layers are full.
        return kinds if window else ["full" if k == "sliding" else k for k in kinds]
    pattern = config.get("hybrid_override_pattern")  # Nemotron-H: M mamba, * attention, - MLP
    if isinstance(pattern, str):
        return [{"M": "state", "*": "full"}.get(letter, "") for letter in pattern]
    rope = config.get("no_rope_layers")
    if isinstance(rope, list) and rope and config.get("attention_chunk_size"):
        return ["chunked" if uses else "full" for uses in rope]  # Llama 4
    if config.get("attn_layer_indices") is not None:  # Bamba
        attends = _list(config, "attn_layer_indices")
        return ["full" if i in attends else "state" for i in range(layers)]
    if config.get("attn_layer_period"):  # Jamba
        period, offset = _int(config, "attn_layer_period", 1), _int(config, "attn_layer_offset", 0)
        return ["full" if i % period == offset % period else "state" for i in range(layers)]
    if config.get("full_attention_interval") and config.get("linear_num_value_heads"):
        every = _int(config, "full_attention_interval", 1)  # Qwen3-Next
        return ["state" if (i + 1) % every else "full" for i in range(layers)]
    if blocks := block_attention(config):  # Nemotron's pruned Llama: some layers attend to nothing
        skipped = ("no_op", "replace_with_linear")
        return ["" if any(one.get(key) for key in skipped) else "full" for one in blocks]
    if types := _attention_types(config):
        return types
    if not window:
        return ["full"] * layers
    every = _full_every(architecture, config)
    if every:
        return ["sliding" if (i + 1) % every else "full" for i in range(layers)]
    first = config.get("max_window_layers")  # Qwen2: the layers from here on slide
    if isinstance(first, int) and config.get("use_sliding_window") is True:
        return ["full" if i < first else "sliding" for i in range(layers)]
    return ["sliding"] * layers  # Mistral 7B v0.1, Phi-3


def _own_heads(
    config: Mapping[str, JsonValue], kind: str, numbers: Sequence[int]
) -> tuple[int, int]:
    """Return key-value heads and head width of some layers, each 0 if they have the model's own.

    Gemma 4 widens the heads of its full layers: by keys of their own, or layer by layer as
    transformers 5 writes them. Raises InputRefused for layers of one kind that differ.
    """
    listed = config.get("per_layer_config")
    if not isinstance(listed, Mapping):
        listed = {}
    names = ("num_key_value_heads", "head_dim")
    each = {int(key): one for key, one in listed.items() if str(key).isdecimal()}
    own = [one if isinstance(one := each.get(n, {}), Mapping) else {} for n in numbers]
    found = {tuple(_int(one, name, 0) for name in names) for one in own} or {(0, 0)}
    if len(found) > 1:
        raise InputRefused(
            f"config.json: layers of {kind} attention have heads of different numbers or widths",
            hint="its memory cannot be planned; choose another model",
        )
    (heads, width) = found.pop()
    if kind == "full":
        heads = heads or _first(config, "num_global_key_value_heads")
        width = width or _first(config, "global_head_dim")
    return heads, width


def _attention_types(config: Mapping[str, JsonValue]) -> list[str]:
    """Return one kind per layer by `attn_type_list` (MiniMax-01); [] if all are full."""
    types = config.get("attn_type_list")
    if not isinstance(types, list) or 0 not in types:
        return []
    return ["full" if kind else "state" for kind in types]


def block_attention(config: Mapping[str, JsonValue]) -> list[Mapping[str, JsonValue]]:
    """Return what `block_configs` say of each layer's attention; [] without them."""
    blocks = config.get("block_configs")
    found = blocks if isinstance(blocks, list) else []
    parts = [one.get("attention") if isinstance(one, Mapping) else None for one in found]
    return [part if isinstance(part, Mapping) else {} for part in parts]


def _kind(architecture: str, name: str) -> str:
    if name not in _KINDS and name not in _NONE:
        raise InputRefused(
            f"config.json: {architecture} has the unknown layer type {name!r}",
            hint=f"known: {', '.join(_KINDS)}",
        )
    return _KINDS.get(name, "")


def _full_every(architecture: str, config: Mapping[str, JsonValue]) -> int:
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        if isinstance(config.get(key), int):
            return _int(config, key, 1)
    return next((n for stem, n in _FULL_EVERY.items() if architecture.startswith(stem)), 0)


def _state(config: Mapping[str, JsonValue]) -> tuple[int, int]:
    """Return the elements of a layer's convolution and recurrent state; (0, 0) if unknown.

    vLLM 0.33, model_executor/layers/mamba/mamba_utils.py: gated delta net, linear attention,
    short convolution, Mamba 2, Mamba 1.
    """
    if config.get("linear_num_value_heads"):
        keys = _int(config, "linear_num_key_heads", 0) * _int(config, "linear_key_head_dim", 0)
        heads = _int(config, "linear_num_value_heads", 0)
        width = _int(config, "linear_value_head_dim", 0)
        conv = (2 * keys + heads * width) * (_int(config, "linear_conv_kernel_dim", 4) - 1)
        return conv, heads * width * _int(config, "linear_key_head_dim", 0)
    if _attention_types(config):
        heads, width = _int(config, "num_attention_heads", 0), _int(config, "head_dim", 0)
        return 0, heads * width**2
    if kernel := _first(config, "conv_L_cache"):  # LFM2
        return _first(config, "conv_dim", "hidden_size") * (kernel - 1), 0
    if heads := _first(config, "mamba_n_heads", "mamba_num_heads"):
        width = _first(config, "mamba_d_head", "mamba_head_dim")
        size = _first(config, "mamba_d_state", "ssm_state_size")
        groups = _first(config, "mamba_n_groups", "n_groups") or 1
        kernel = _first(config, "mamba_d_conv", "conv_kernel") or 4
        return (heads * width + 2 * groups * size) * (kernel - 1), heads * width * size
    if size := _first(config, "mamba_d_state", "state_size"):
        inner = _first(config, "intermediate_size_mamba") or (
            _int(config, "mamba_expand", 2) * _int(config, "hidden_size", 0)
        )
        return inner * ((_first(config, "mamba_d_conv", "conv_kernel") or 4) - 1), inner * size
    return 0, 0


def _first(config: Mapping[str, JsonValue], *names: str) -> int:
    return next((_int(config, name, 0) for name in names if config.get(name) is not None), 0)


def _int(config: Mapping[str, JsonValue], name: str, default: int) -> int:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 1_000_000_000:
        raise InputRefused(
            f"config.json: {name} is {value!r}, not a non-negative integer",
            hint="check the checkpoint's config.json",
        )
    return value


def _list(config: Mapping[str, JsonValue], name: str) -> list[int]:
    value = config.get(name)
    if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
        raise InputRefused(
            f"config.json: {name} is not a list of integers",
            hint="check the checkpoint's config.json",
        )
    return value
