"""Positions in config.json: lengths, and rope parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weightsmith.core.values import JsonValue

_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
"""Keys of the length (vLLM 0.33, model_arch_config_convertor.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionSettings:
    """Lengths and rope parameters; numbers are 0 if they are not set."""

    lengths: tuple[int, ...]
    """Every configured length, in tokens."""
    scaling: str
    """The rope type, such as `llama3`, `yarn` or `linear`; `default` for no scaling."""
    factor: float
    """Rope's scaling factor; 0 if it is not a number up to 1000."""
    original: int
    """The length before scaling."""
    theta: float
    """`rope_theta` in `rope_parameters`."""
    transformers_5_only: bool
    """Only `rope_parameters` has the theta, which transformers 4 does not read."""

    @classmethod
    def of(cls, text: Mapping[str, JsonValue]) -> PositionSettings:
        """Read them from the text config."""
        parameters, rope = text.get("rope_parameters"), _rope(text)
        factor = _number(rope.get("factor", 1.0))
        original = rope.get("original_max_position_embeddings")
        return cls(
            lengths=tuple(filter(None, (whole(text.get(key)) for key in _LENGTHS))),
            scaling=str(rope.get("rope_type") or rope.get("type") or "default"),
            factor=factor if 0 < factor <= 1000 else 0,
            original=whole(original or text.get("original_max_position_embeddings")),
            theta=_number(parameters.get("rope_theta")) if isinstance(parameters, Mapping) else 0,
            transformers_5_only=isinstance(parameters, Mapping) and "rope_theta" not in text,
        )


def _rope(text: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
    for key in ("rope_parameters", "rope_scaling"):
        found = text.get(key)
        if not isinstance(found, Mapping):
            continue
        nested = found.get("full_attention")  # transformers 5: one per kind of layer
        return nested if isinstance(nested, Mapping) else found
    return {}


def whole(value: JsonValue) -> int:
    """Return a whole number above 0, and 0 for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _number(value: JsonValue) -> float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else 0
