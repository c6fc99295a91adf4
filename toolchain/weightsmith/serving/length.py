"""How long a request a model allows, by vLLM's rule."""

from __future__ import annotations

from dataclasses import dataclass

from weightsmith.core.errors import InputRefused
from weightsmith.models.facts import ModelFacts

_NOT_MULTIPLIED = frozenset(
    {"su", "longrope", "llama3", "yarn", "deepseek_yarn", "default", "mrope", "proportional"}
)
"""Kinds of position scaling whose factor is in the stated length already."""

_UNKNOWN = 2048
"""vLLM's own fallback."""
_STRETCHED = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of prompt and answer together."""

    default: int
    most: int
    """What may be asked for; larger than the default where positions can be stretched."""


def lengths(model: ModelFacts, *, stretched: bool = False) -> Lengths:
    """Return the model's own length and the longest that the engine accepts.

    Of several stated lengths the smallest counts. `stretched` says that the user changes the
    positions, which lifts the limit. Raises InputRefused for a scaling factor that is no number.
    """
    positions, kind = model.positions, model.positions.scaling
    if not positions.lengths:
        return Lengths(default=_UNKNOWN, most=_STRETCHED)
    length = min(positions.lengths)
    if 0 < model.tokenizer_length < _STRETCHED:  # transformers writes 1e30 for no limit
        length = min(length, model.tokenizer_length)
    if kind in {"longrope", "su"}:
        default = positions.original if 0 < positions.original <= length else length
        return Lengths(default=default, most=_STRETCHED if stretched else length)
    # Gemma 3 states the scaled length.
    if kind not in _NOT_MULTIPLIED and not model.text_model_type.startswith("gemma3"):
        if not positions.factor:
            raise InputRefused(
                "config.json: the position scaling's factor is not a number above 0, up to 1000",
                hint="check the checkpoint's config.json",
            )
        length = int(length * positions.factor)
    return Lengths(default=length, most=_STRETCHED if stretched else length)
