"""What llama.cpp's key-value cache weighs, by its own rules. Bytes throughout."""

from __future__ import annotations

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.models.shape import CacheLayers, ModelShape

KV_TYPES: dict[str, tuple[int, int]] = {
    "f32": (4, 1),
    "f16": (2, 1),
    "bf16": (2, 1),
    "q8_0": (34, 32),
    "q5_0": (22, 32),
    "q5_1": (24, 32),
    "q4_0": (18, 32),
    "q4_1": (20, 32),
    "iq4_nl": (18, 32),
}
"""Cache type -> (bytes, elements) of one block; ggml/src/ggml-common.h of llama.cpp."""

KV_PADDING = 256
"""llama.cpp rounds the context of a slot up to this many tokens (src/llama-context.cpp)."""

# Models whose sliding layers get the small cache in llama.cpp (src/models/*.cpp set swa_type), and
# the period by which every last layer is full whatever config.json lists, since its converter
# writes none down; for all others every layer is planned at full length, never too little.
_PERIODS = {
    "Cohere2ForCausalLM": 4,
    "Gemma2ForCausalLM": 2,
    "Gemma3ForCausalLM": 6,
    "Gemma3ForConditionalGeneration": 6,
    "GptOssForCausalLM": 2,
}


_LISTED = ("Gemma4For", "Gemma4UnifiedFor")
"""Beginnings of models whose sliding layers llama.cpp takes from config.json's list; their heads
may differ from those of full layers, and layers that share another's cache have none."""


def padded(tokens: int) -> int:
    """Return the tokens that llama.cpp allocates for a slot of that length."""
    return -(-tokens // KV_PADDING) * KV_PADDING


def kv_layer_bytes(
    shape: ModelShape, type_k: str, type_v: str, layer: CacheLayers | None = None
) -> int:
    """Return the bytes that one token takes in one layer of llama.cpp's cache.

    `layer` says which layers, where these differ.

    `kv_heads * (head_dim * k + v_head_dim * v)`, with the bytes per element of the two types;
    for multi-head latent attention one row of `kv_lora_rank + rope_head_dim` and no values
    (src/llama-kv-cache.cpp). Raises UsageError for a type that does not divide the heads.
    """
    if shape.latent_cache:
        return _row(shape.kv_lora_rank + shape.rope_head_dim, type_k, "K")
    own, width = (layer.kv_heads, layer.head_dim) if layer else (0, 0)
    heads = own or shape.kv_heads
    keys = heads * _row(width or shape.head_dim, type_k, "K")
    return keys + heads * _row(width or shape.v_head_dim, type_v, "V")


def kv_cache_bytes(
    shape: ModelShape, tokens: int, slots: int, types: tuple[str, str], ubatch: int
) -> int:
    """Return llama.cpp's whole cache for `slots` requests of up to `tokens` each.

    `types` are those of keys and of values.

    Full layers hold every token of a slot; sliding layers hold window + ubatch
    (src/llama-kv-cache-iswa.cpp); both are padded to 256. Recurrent layers hold a state in float32
    for each slot (src/llama-memory-recurrent.cpp).
    """
    window = padded(min(padded(tokens), shape.sliding_window + ubatch))
    kept = {"sliding": window, "full": padded(tokens)}
    return slots * (
        sum(
            part.layers * kept[part.kind] * kv_layer_bytes(shape, *types, part)
            for part in _parts(shape)
        )
        + _state_bytes(shape)
    )


def growth_bytes(shape: ModelShape, types: tuple[str, str]) -> int:
    """Return the bytes that a request grows by with each token."""
    return sum(
        part.layers * kv_layer_bytes(shape, *types, part)
        for part in _parts(shape)
        if part.kind == "full"
    )


def _parts(shape: ModelShape) -> list[CacheLayers]:
    """Return the layers with a cache as llama.cpp keeps them, each full or sliding."""
    if shape.architecture.startswith(_LISTED):
        return [part for part in shape.cache if part.kind in {"full", "sliding"}]
    sliding = sliding_layers(shape)
    full = attention_layers(shape) - sliding
    return [CacheLayers(kind="full", layers=full), CacheLayers(kind="sliding", layers=sliding)]


def attention_layers(shape: ModelShape) -> int:
    """Return the layers that keep tokens; all of them where a state's size is not known."""
    if not _state_bytes(shape):
        return shape.layers
    return sum(part.layers for part in shape.cache if part.kind != "state")


def _state_bytes(shape: ModelShape) -> int:
    """Return what all recurrent layers keep for one slot; 0 without any, or if it is not known."""
    states = [part for part in shape.cache if part.kind == "state"]
    return 4 * sum(part.layers * (part.convolved + part.recurrent) for part in states)


def sliding_layers(shape: ModelShape) -> int:
    """Return the layers that have the small cache in llama.cpp.

    Raises InputRefused for a model whose layers slide otherwise than llama.cpp computes them.
    """
    if shape.architecture.startswith(_LISTED):
        return sum(part.layers for part in shape.cache if part.kind == "sliding")
    period = _PERIODS.get(shape.architecture)
    if not period or not shape.sliding_window:
        return 0
    slides = [layer % period < period - 1 for layer in range(shape.layers)]
    listed = [kind == "sliding_attention" for kind in shape.layer_types]
    if listed and not any(listed):
        return 0
    if listed and listed != slides:
        raise InputRefused(
            f"config.json: layer_types of {shape.architecture} are not {period - 1} sliding and one"
            " full in turn, and llama.cpp computes no others",
            hint="choose a target of vLLM",
        )
    return sum(slides)


def _row(elements: int, kind: str, which: str) -> int:
    try:
        size, block = KV_TYPES[kind]
    except KeyError:
        raise UsageError(
            f"unknown cache type {kind!r} for {which}", hint=f"one of: {', '.join(KV_TYPES)}"
        ) from None
    if elements % block:
        raise UsageError(
            f"cache type {kind} packs {block} elements, which does not divide this model's"
            f" {which} head of {elements}",
            hint="choose f16 or bf16",
        )
    return elements // block * size


def require_attention(shape: ModelShape) -> None:
    """Raise InputRefused for a model without attention layers, which the formulas do not cover."""
    if shape.layer_types and not any("attention" in kind for kind in shape.layer_types):
        raise InputRefused(
            f"{shape.architecture} has no attention layer: its cache cannot be planned",
            hint="choose a decoder with attention",
        )
