"""Tables of llama.cpp's file types and tensor types.

Types below four bits are made only on request: fine-tuning makes small changes, which are lost
first. Large models tolerate them, so they are offered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from weightsmith.core.values import Format


@dataclass(frozen=True, slots=True, kw_only=True)
class FileType:
    """A type of files such as `q4_k_m`, for which llama.cpp mixes tensor types."""

    name: str
    number: int
    """llama.h's llama_ftype, stored as `general.file_type`."""
    bits: float
    """Bits per weight of Llama-3.1-8B (tools/quantize/README.md of llama.cpp); for types not listed
    there, of the tensor type."""
    direct: bool
    """Written by the converter without llama-quantize."""
    takes_imatrix: bool
    """Whether an importance matrix affects it."""
    needs_imatrix: bool
    """Whether llama-quantize requires an importance matrix (tools/quantize.cpp)."""

    @property
    def named_bits(self) -> int:
        """The bits in the name: 4 for q4_k_m and iq4_xs."""
        found = re.search(r"\d+", self.name)
        return int(found[0]) if found else int(self.bits)

    @property
    def family(self) -> str:
        """The name without the size of the mix: q4_k for q4_k_s and q4_k_m, iq3 for iq3_xxs."""
        return re.sub(r"_(xxs|xs|s|m|l)$", "", self.name)

    @property
    def is_low(self) -> bool:
        """Whether the name says less than four bits."""
        return self.named_bits < 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorType:
    """A tensor type (ggml_type) such as `q4_k`."""

    name: str
    block: int
    """Weights per block; rows must be a multiple of it."""
    scales: tuple[int, ...] = ()
    """Byte offsets of the float16 scales in a block (ggml-common.h)."""
    selectable: bool = True
    """Whether users may choose it (llama-quantize's --tensor-type)."""


_FILE_TYPES = (
    ("f32", 0, 32.0, "direct"),
    ("bf16", 32, 16.0, "direct"),
    ("f16", 1, 16.0, "direct"),
    ("q8_0", 7, 8.5, "direct"),
    ("q6_k", 18, 6.56, ""),
    ("q5_k_m", 17, 5.7, ""),
    ("q5_k_s", 16, 5.57, ""),
    ("q5_1", 9, 6.0, ""),
    ("q5_0", 8, 5.5, ""),
    ("q4_k_m", 15, 4.9, ""),
    ("q4_k_s", 14, 4.67, ""),
    ("q4_1", 3, 5.0, ""),
    ("q4_0", 2, 4.5, ""),
    ("iq4_nl", 25, 4.68, ""),
    ("iq4_xs", 30, 4.46, ""),
    ("mxfp4_moe", 38, 4.25, "fixed"),
    ("q3_k_l", 13, 4.3, ""),
    ("q3_k_m", 12, 4.0, ""),
    ("q3_k_s", 11, 3.64, ""),
    ("iq3_m", 27, 3.76, ""),
    ("iq3_s", 26, 3.66, ""),
    ("iq3_xs", 22, 3.5, ""),
    ("iq3_xxs", 23, 3.25, ""),
    ("q2_k", 10, 3.16, ""),
    ("q2_k_s", 21, 2.97, "measured"),
    ("iq2_m", 29, 2.93, ""),
    ("iq2_s", 28, 2.74, "measured"),
    ("iq2_xs", 20, 2.59, "measured"),
    ("iq2_xxs", 19, 2.38, "measured"),
    ("tq2_0", 37, 2.06, "fixed"),
    ("tq1_0", 36, 1.69, "fixed"),
    ("iq1_m", 31, 2.15, "measured"),
    ("iq1_s", 24, 2.0, "measured"),
    ("q1_0", 40, 1.13, "fixed"),
)
"""Name, number and bits; how it is made, if not as a mix that an importance matrix may affect."""
FILE_TYPES: Mapping[str, FileType] = {
    name: FileType(
        name=name,
        number=number,
        bits=bits,
        direct=how == "direct",
        takes_imatrix=how not in ("direct", "fixed"),
        needs_imatrix=how == "measured",
    )
    for name, number, bits, how in _FILE_TYPES
}

TENSOR_TYPES: Mapping[str, TensorType] = {
    row.name: row
    for row in (
        TensorType(name="f32", block=1),
        TensorType(name="f64", block=1, selectable=False),
        TensorType(name="f16", block=1),
        TensorType(name="bf16", block=1),
        TensorType(name="q8_0", block=32, scales=(0,)),
        TensorType(name="q5_1", block=32, scales=(0, 2)),
        TensorType(name="q5_0", block=32, scales=(0,)),
        TensorType(name="q4_1", block=32, scales=(0, 2)),
        TensorType(name="q4_0", block=32, scales=(0,)),
        TensorType(name="iq4_nl", block=32, scales=(0,)),
        TensorType(name="mxfp4", block=32),
        TensorType(name="q6_k", block=256, scales=(208,)),
        TensorType(name="q5_k", block=256, scales=(0, 2)),
        TensorType(name="q4_k", block=256, scales=(0, 2)),
        TensorType(name="q3_k", block=256, scales=(108,)),
        TensorType(name="q2_k", block=256, scales=(80, 82)),
        TensorType(name="iq4_xs", block=256, scales=(0,)),
        TensorType(name="iq3_s", block=256, scales=(0,)),
        TensorType(name="iq3_xxs", block=256, scales=(0,)),
        TensorType(name="iq2_s", block=256, scales=(0,)),
        TensorType(name="iq2_xs", block=256, scales=(0,)),
        TensorType(name="iq2_xxs", block=256, scales=(0,)),
        TensorType(name="iq1_m", block=256),
        TensorType(name="iq1_s", block=256, scales=(0,)),
        TensorType(name="tq2_0", block=256, scales=(64,)),
        TensorType(name="tq1_0", block=256, scales=(52,)),
        TensorType(name="q1_0", block=128, scales=(0,), selectable=False),
    )
}

MIX = FileType(
    name="mix", number=-1, bits=4.5, direct=False, takes_imatrix=True, needs_imatrix=False
)
"""Types chosen within a budget, which says how many bits there are (`gguf_mix`). llama.cpp has no
number for it."""
FORMATS = tuple(
    Format(name=row.name, kind="gguf", bits_per_weight=row.bits)
    for row in (*FILE_TYPES.values(), MIX)
)


def file_type(format_: str) -> FileType:
    """Return the row of a format."""
    return MIX if format_ == MIX.name else FILE_TYPES[format_]


EXPERTS_ONLY = "mxfp4_moe"
"""It packs experts; everything else becomes q8_0 (llama_tensor_get_type)."""
