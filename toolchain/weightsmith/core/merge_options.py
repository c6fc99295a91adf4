"""How adapters are merged: a section of the recipe, and what a job passes to its builder.

Builders have no pydantic, so this is a plain dataclass. A field's metadata are the keywords of
pydantic's `Field`, by which the recipe's section is checked and described.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias

Method: TypeAlias = Literal[
    "sequential",
    "linear",
    "cat",
    "svd",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
]
Space: TypeAlias = Literal["delta", "factors"]
Dtype: TypeAlias = Literal["auto", "bfloat16", "float16", "float32"]
Precision: TypeAlias = Literal["exact"]
QuantizedBase: TypeAlias = Literal["refuse", "dequantize", "simulate-nf4", "simulate-nf4-double"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """How adapters are merged."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    method: Method = field(
        default="sequential",
        metadata={
            "description": "How adapters are merged. `sequential`, `linear` and `cat`: the "
            "weighted sum of all deltas, rounded once; `svd`: the same, truncated to `rank`; the "
            "others prune deltas or vote on their signs."
        },
    )
    density: float | None = field(
        default=None,
        metadata={
            "gt": 0,
            "le": 1,
            "description": "Share of each delta that pruning methods keep, above 0 and up to 1.",
        },
    )
    rank: int | None = field(
        default=None,
        metadata={
            "ge": 1,
            "description": "Rank of an `svd` method's result; default: the adapters' largest.",
        },
    )
    seed: int = field(
        default=0, metadata={"ge": 0, "description": "Random seed of the `dare` methods."}
    )
    space: Space = field(
        default="delta",
        metadata={
            "description": "What is combined. `delta`: the products B·A; `factors`: A and B, as in "
            "PEFT."
        },
    )
    dtype: Dtype = field(
        default="auto",
        metadata={"description": "Type of the merged weights; `auto` keeps the base's."},
    )
    precision: Precision = field(
        default="exact",
        metadata={"description": "`exact`: the exact sum, rounded once."},
    )
    quantized_base: QuantizedBase = field(
        default="refuse",
        metadata={
            "description": "`refuse`: refuse a quantized base; `dequantize`: merge onto its "
            "dequantized weights; `simulate-nf4`: first round a 16-bit base's linear layers to 4 "
            "bits and back, as in QLoRA training; `simulate-nf4-double`: the same with double "
            "quantization."
        },
    )
