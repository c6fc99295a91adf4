"""How long a request a model allows, by vLLM's rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weightsmith.errors import InputRefused
from weightsmith.serving.text import text_part
from weightsmith.values import Json

_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
"""Names for the length; the smallest one counts (vLLM 0.33, model_arch_config_convertor.py)."""

_NOT_MULTIPLIED = frozenset(
    {"su", "longrope", "llama3", "yarn", "deepseek_yarn", "default", "mrope", "proportional"}
)
"""Kinds of position scaling whose factor is in the stated length already."""

_UNKNOWN = 2048
"""vLLM's own fallback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of prompt and answer together."""

    default: int
    most: int
    """What may be wished for; larger than the default where positions can be stretched."""


def lengths(config: Mapping[str, Json], *, stretched: bool = False) -> Lengths:
    """Return the model's own length and the longest that the engine accepts.

    `stretched` says that the user changes the positions, which lifts the limit. Raises
    InputRefused for a scaling factor that is none.
    """
    inner = text_part(config)
    stated = [
        value
        for key in _KEYS
        if isinstance(value := inner.get(key), int) and not isinstance(value, bool) and value > 0
    ]
    if not stated:
        return Lengths(default=_UNKNOWN, most=_STRETCHED)
    length = min([*stated, *_tokenizers(config)])
    rope = _rope(inner)
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    model_type = str(inner.get("model_type") or config.get("model_type") or "")
    if kind == "longrope" or kind == "su":
        original = rope.get("original_max_position_embeddings") or inner.get(
            "original_max_position_embeddings"
        )
        default = original if isinstance(original, int) and 0 < original <= length else length
        return Lengths(default=default, most=_STRETCHED if stretched else length)
    # Gemma 3 states the scaled length.
    if kind not in _NOT_MULTIPLIED and not model_type.startswith("gemma3"):
        length = int(length * _factor(rope))
    return Lengths(default=length, most=_STRETCHED if stretched else length)


def _tokenizers(config: Mapping[str, Json]) -> list[int]:
    """Return the tokenizer's own limit, where it has one; transformers writes 1e30 for none."""
    tokenizer = config.get("tokenizer")
    length = tokenizer.get("model_max_length") if isinstance(tokenizer, Mapping) else None
    if isinstance(length, bool) or not isinstance(length, int):
        return []
    return [length] if 0 < length < _STRETCHED else []


_STRETCHED = 1_000_000_000


def _rope(config: Mapping[str, Json]) -> Mapping[str, Json]:
    for key in ("rope_parameters", "rope_scaling"):
        found = config.get(key)
        if not isinstance(found, Mapping):
            continue
        nested = found.get("full_attention")  # transformers 5: one per kind of layer
        return nested if isinstance(nested, Mapping) else found
    return {}


def _factor(rope: Mapping[str, Json]) -> float:
    factor = rope.get("factor", 1.0)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1000:
        raise InputRefused(
            f"config.json: the position scaling's factor is {factor!r}, not a number up to 1000",
            hint="check the checkpoint's config.json",
        )
    return float(factor)
