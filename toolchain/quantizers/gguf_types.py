"""llama.cpp's file types by name: bits, numbers, and which of them need what."""

from __future__ import annotations

import re
from collections.abc import Mapping

from toolchain.values import Format

# Bits per weight of Llama-3.1-8B (tools/quantize/README.md of llama.cpp); of the types that it
# does not list, the bits of the tensor type itself.
_BITS = {
    "f32": 32.0,
    "bf16": 16.0,
    "f16": 16.0,
    "q8_0": 8.5,
    "q6_k": 6.56,
    "q5_k_m": 5.7,
    "q5_k_s": 5.57,
    "q5_1": 6.0,
    "q5_0": 5.5,
    "q4_k_m": 4.9,
    "q4_k_s": 4.67,
    "q4_1": 5.0,
    "q4_0": 4.5,
    "iq4_nl": 4.68,
    "iq4_xs": 4.46,
    "mxfp4_moe": 4.25,
    "q3_k_l": 4.3,
    "q3_k_m": 4.0,
    "q3_k_s": 3.64,
    "iq3_m": 3.76,
    "iq3_s": 3.66,
    "iq3_xs": 3.5,
    "iq3_xxs": 3.25,
    "q2_k": 3.16,
    "q2_k_s": 2.97,
    "iq2_m": 2.93,
    "iq2_s": 2.74,
    "iq2_xs": 2.59,
    "iq2_xxs": 2.38,
    "tq2_0": 2.06,
    "tq1_0": 1.69,
    "iq1_m": 2.15,
    "iq1_s": 2.0,
    "q1_0": 1.13,
}
FORMATS = tuple(Format(name=n, kind="gguf", bits_per_weight=b) for n, b in _BITS.items())

FILE_TYPES: Mapping[str, int] = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10,
    "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16,
    "q5_k_m": 17, "q6_k": 18, "iq2_xxs": 19, "iq2_xs": 20, "q2_k_s": 21, "iq3_xs": 22,
    "iq3_xxs": 23, "iq1_s": 24, "iq4_nl": 25, "iq3_s": 26, "iq3_m": 27, "iq2_s": 28, "iq2_m": 29,
    "iq4_xs": 30, "iq1_m": 31, "bf16": 32, "tq1_0": 36, "tq2_0": 37, "mxfp4_moe": 38, "q1_0": 40,
}  # fmt: skip
"""llama.h's llama_ftype, which the file's `general.file_type` holds."""

DIRECT = frozenset({"f32", "f16", "bf16", "q8_0"})
"""Types that the converter writes by itself."""

NEEDS_IMATRIX = frozenset({"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "q2_k_s"})
"""Types that llama-quantize refuses without an importance matrix (tools/quantize.cpp)."""

_IGNORES_IMATRIX = DIRECT | {"mxfp4_moe", "tq1_0", "tq2_0", "q1_0"}

TENSOR_TYPES = frozenset(
    {
        "f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k",
        "q5_k", "q6_k", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s",
        "iq4_nl", "iq4_xs", "tq1_0", "tq2_0", "mxfp4",
    }
)  # fmt: skip
"""Types that a single tensor may be given (ggml_type)."""

BLOCKS_OF_32 = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"})
"""Tensor types whose blocks have 32 weights; those of the other quantized types have 256."""


def named_bits(name: str) -> int:
    """Return the bits that a type's name promises: 4 for q4_k_m and iq4_xs."""
    found = re.search(r"\d+", name)
    return int(found[0]) if found else 16


def is_low(name: str) -> bool:
    """Say whether a type has less than four bits by its name."""
    return named_bits(name) < 4


def takes_imatrix(name: str) -> bool:
    """Say whether an importance matrix changes what a type's quantizer writes."""
    return name not in _IGNORES_IMATRIX
