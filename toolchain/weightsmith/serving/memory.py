"""Sizes, the memory of this machine, and what a key-value cache weighs. Bytes throughout."""

from __future__ import annotations

import os
import re
from pathlib import Path

from weightsmith.checkpoints.shape import ModelShape
from weightsmith.errors import InputRefused, UsageError

MIB = 1 << 20
GIB = 1 << 30

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_CGROUPS = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")

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


def parse_size(text: str) -> int:
    """Return the bytes of "24GiB", "24GB", "512M" or "1.5 G".

    `i` makes it binary, its absence decimal, as in the SI. Raises UsageError otherwise.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise UsageError(f"not a size: {text!r}", hint="write it like 24GiB, 24GB or 512MiB")
    number, unit, binary = match.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** _POWERS[unit.upper()])


def human(size: int) -> str:
    """Return bytes for people, in binary units with one decimal."""
    for unit, step in (("GiB", GIB), ("MiB", MIB), ("KiB", 1024)):
        if abs(size) >= step:
            return f"{size / step:.1f} {unit}"
    return f"{size} B"


def host_memory() -> int:
    """Return this machine's memory, or this container's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUPS:
        try:
            limit = path.read_text("ascii").strip()
        except OSError:
            continue
        if limit.isdigit():
            return min(total, int(limit))
    return total


def padded(tokens: int) -> int:
    """Return the tokens that llama.cpp allocates for a slot of that length."""
    return -(-tokens // KV_PADDING) * KV_PADDING


def kv_layer_bytes(shape: ModelShape, type_k: str, type_v: str) -> int:
    """Return the bytes that one token takes in one layer of llama.cpp's cache.

    `kv_heads * (head_dim * k + v_head_dim * v)`, with the bytes per element of the two types;
    for multi-head latent attention one row of `kv_lora_rank + rope_head_dim` and no values
    (src/llama-kv-cache.cpp). Raises UsageError for a type that does not divide the heads.
    """
    if shape.kv_lora_rank:
        return _row(shape.kv_lora_rank + shape.rope_head_dim, type_k, "K")
    keys = shape.kv_heads * _row(shape.head_dim, type_k, "K")
    return keys + shape.kv_heads * _row(shape.v_head_dim, type_v, "V")


def kv_cache_bytes(
    shape: ModelShape, tokens: int, slots: int, layer_bytes: int, ubatch: int
) -> int:
    """Return llama.cpp's whole cache for `slots` requests of up to `tokens` each.

    Full layers hold every token of a slot; sliding layers hold window + ubatch
    (src/llama-kv-cache-iswa.cpp); both are padded to 256.
    """
    sliding = sliding_layers(shape)
    full = (shape.layers - sliding) * padded(tokens)
    window = padded(min(padded(tokens), shape.sliding_window + ubatch))
    return (full + sliding * window) * slots * layer_bytes


def sliding_layers(shape: ModelShape) -> int:
    """Return the layers that have the small cache in llama.cpp.

    Raises InputRefused for a model whose layers slide otherwise than llama.cpp computes them.
    """
    period = _PERIODS.get(shape.architecture)
    if not period or not shape.sliding_layers:
        return 0
    slides = [layer % period < period - 1 for layer in range(shape.layers)]
    if [kind == "sliding_attention" for kind in shape.layer_types] != slides:
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
