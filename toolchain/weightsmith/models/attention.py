"""What each layer of a decoder caches, read from config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from weightsmith.core.errors import InputRefused
from weightsmith.core.values import JsonValue

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
        convolved, recurrent = _state(config) if kind == "state" else (0, 0)
        heads, width = _own_heads(config, kind, [n for n, name in enumerate(names) if name == kind])
        found.append(
            CacheLayers(
                kind=kind,
                layers=count,
                window=window if kind == "sliding" else _chunk(config, kind),
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
        attends = set(_list(config, "attn_layer_indices"))
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
    if name in _NONE:
        return ""
    try:
        return _KINDS[name]
    except KeyError:
        raise InputRefused(
            f"config.json: {architecture} has the unknown layer type {name!r}",
            hint=f"known: {', '.join(_KINDS)}",
        ) from None


def _full_every(architecture: str, config: Mapping[str, JsonValue]) -> int:
    for key in ("sliding_window_pattern", "_sliding_window_pattern"):
        if isinstance(config.get(key), int):
            return _int(config, key, 1)
    return next((n for stem, n in _FULL_EVERY.items() if architecture.startswith(stem)), 0)


def _chunk(config: Mapping[str, JsonValue], kind: str) -> int:
    return _int(config, "attention_chunk_size", 8192) if kind == "chunked" else 0


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
