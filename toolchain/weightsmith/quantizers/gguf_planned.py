"""The types that llama.cpp gives to a decoder's matrices, to plan the size of a file.

The rules are those of llama_tensor_get_type_impl and tensor_type_fallback in its
src/llama-quant.cpp. Where it asks for an importance matrix, there is one: our types below five bits
have it by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from weightsmith.core.values import Format
from weightsmith.quantizers.architectures import JOINED
from weightsmith.quantizers.gguf_types import EXPERTS_ONLY, FILE_TYPES, TENSOR_TYPES, FileType

Part = Literal["embedding", "head", "q", "k", "v", "o", "up", "down", "other"]
"""What a matrix is of; `up` also of a gate, `head` also of the embedding that is one, and `v` of Q,
K and V in one."""
QKV = JOINED | {
    "BloomForCausalLM", "FalconForCausalLM", "GPT2LMHeadModel", "GPTBigCodeForCausalLM",
    "GPTNeoXForCausalLM",
}  # fmt: skip
"""Decoders in whose files Q, K and V are one matrix."""
AS_LLAMA = frozenset({
    "InternLM3ForCausalLM", "LlamaForCausalLM", "LlavaForConditionalGeneration",
    "MistralForCausalLM", "MixtralForCausalLM", "VoxtralForConditionalGeneration",
})  # fmt: skip
"""Decoders that the converter writes as `llama`."""
OF_70B = {
    **dict.fromkeys((*AS_LLAMA, "DeciLMForCausalLM", "OlmoForCausalLM", "Qwen2ForCausalLM"), 80),
    "Jais2ForCausalLM": 68,
}
"""Decoders -> layers of the model that llama.cpp calls 70B (its src/models/); a `llama` of that has
fewer heads of K and V than of Q."""
_BLOCK, _SMALL_BLOCK = 256, 32
_INSTEAD = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""Type -> that of rows which are no whole blocks of 256 weights; all others become 4.5 bits."""
_BASE = {
    "iq3_m": "iq3_s", "iq3_xs": "iq3_s", "iq2_m": "iq2_s", "iq2_s": "iq2_xs", EXPERTS_ONLY: "mxfp4",
}  # fmt: skip
"""File type -> the type of most of its tensors, where the names differ."""
_TINY = "iq1_s iq1_m iq2_xxs iq2_xs"
_LOWEST = frozenset(f"{_TINY} iq2_s iq2_m".split())
_BUMPED = 8
"""A model with so many experts has more bits in its attention."""
_EIGHT = (
    "q2_k iq3_xs iq3_xxs q3_k_s q3_k_m iq4_nl q4_k_s q4_k_m iq3_s iq3_m iq4_xs iq2_s iq2_m " + _TINY
)
_RULES: Mapping[Part, tuple[tuple[str, str, str], ...]] = {
    "head": (
        ("", "falcon", "q8_0"),
        (f"{_TINY} iq2_s iq2_m iq3_xxs", "", "q5_k"),
        ("q8_0 mxfp4_moe", "", "q8_0"),
        ("", "", "q6_k"),
    ),
    "embedding": (
        (_TINY, "", "q2_k"),
        ("iq2_s iq2_m iq3_xxs", "", "iq3_s"),
        ("tq1_0 tq2_0", "", "q4_k"),
    ),
    "q": (("iq3_xs", "", "iq3_xxs"), ("iq3_xxs", "", "iq2_s")),
    "k": (
        (f"iq2_s iq2_m {_TINY}", "eight", "q4_k"),
        ("", "eight", "q8_0"),
        ("iq3_xs", "", "iq3_xxs"),
        ("iq3_xxs", "", "iq2_s"),
    ),
    "v": (
        (f"iq2_s iq2_m {_TINY}", "grouped", "q4_k"),
        (f"iq2_s iq2_m {_TINY}", "several", "q4_k"),
        ("iq2_s iq2_m", "", "iq3_s"),
        (_TINY, "", "q2_k"),
        ("", "eight", "q8_0"),
        ("q2_k q2_k_s iq3_xxs iq3_xs iq3_s", "grouped", "q4_k"),
        ("q2_k", "", "q3_k"),
        ("q3_k_m", "two", "q5_k"),
        ("q3_k_m iq3_m", "", "q4_k"),
        ("q3_k_l", "", "q5_k"),
        ("iq4_nl iq4_xs", "grouped", "q5_k"),
        ("q4_k_m q5_k_m", "more", "q6_k"),
        ("q4_k_s", "four", "q5_k"),
    ),
    "o": (
        ("q3_k_l", "falcon", "q4_k"),
        ("q2_k iq3_xxs q3_k_m iq3_m", "falcon", ""),
        (_EIGHT, "eight", "q5_k"),
        ("q3_k_l", "eight", ""),
        ("q2_k", "", "q3_k"),
        ("iq3_xxs iq2_s iq2_m", "", "iq3_s"),
        ("q3_k_m iq3_m", "", "q4_k"),
        ("q3_k_l", "", "q5_k"),
        ("iq1_s iq1_m", "", "iq2_xxs"),
    ),
    "down": (
        ("iq2_s iq2_m", "first", "iq3_s"),
        (_TINY, "first", "q2_k"),
        ("q2_k", "", "q3_k"),
        ("q2_k_s iq3_m", "first", "q4_k"),
        ("iq3_m", "eight, more", "q4_k"),
        ("q3_k_m", "begin", "q5_k"),
        ("q4_k_m", "falcon, begin", "q6_k"),
        ("q4_k_m", "falcon, more", "q5_k"),
        ("q3_k_m", "falcon, more", "q4_k"),
        ("q3_k_l", "falcon", "q4_k"),
        ("q3_k_m q4_k_m q4_k_s", "falcon", ""),
        ("q3_k_m", "", "q4_k"),
        ("q3_k_l", "", "q5_k"),
        ("q4_k_m q5_k_m", "more", "q6_k"),
        ("q4_k_s", "first", "q5_k"),
        ("q4_0", "first", "q4_1"),
    ),
    "up": (("iq3_xs", "middle", "iq3_xxs"),),
    "other": (),
}
"""Part -> file types (none: all), when (see `MixedLayers.words`), and the type (none: that of most
tensors); the first one that fits counts."""


_RAISED = {"q3_k": "q5_k", "q4_k": "q5_k"}
"""Type -> that of `v` in a model of 70 B."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedLayers:
    """What a mix of types depends on."""

    layers: int
    """Those of the model, or for `v` those that attend."""
    group: int
    """Heads of Q for one of K and V in the first layer, 0 if that does not attend."""
    experts: int
    falcon: bool = False
    is_70b: bool = False

    def words(self, layer: int) -> frozenset[str]:
        """Return the conditions of the rules that hold in a layer."""
        eighth, last = self.layers // 8, 7 * self.layers // 8
        more = layer < eighth or layer >= last or (layer - eighth) % 3 == 2
        holds = {
            "": True,
            "grouped": self.group >= 4,
            "several": self.experts >= 4,
            "eight": self.experts == 8,
            "two": layer < 2,
            "four": layer < 4,
            "begin": layer < self.layers // 16,
            "first": layer < eighth,
            "middle": eighth <= layer < last,
            "more": more,
            "eight, more": self.experts == 8 and more,
            "falcon": self.falcon,
            "falcon, begin": self.falcon and layer < self.layers // 16,
            "falcon, more": self.falcon and more,
        }
        return frozenset(word for word, held in holds.items() if held)


def planned_bits(
    format_: Format,
    of: MixedLayers,
    columns: int,
    part: Part,
    layer: int = 0,
    *,
    stacked: bool = False,
) -> float:
    """Return how many bits per weight a matrix with rows of `columns` weights gets in a file.

    `layer` counts those that have such a part; `stacked` says that the matrix is one of experts.
    """
    row = FILE_TYPES.get(format_.name)
    if row is None or (row.direct and row.name != "q8_0"):
        return format_.bits_per_weight
    if columns % _SMALL_BLOCK:
        return 16.0
    base = _base(row)
    if part == "head" and columns % TENSOR_TYPES[base].block:
        return _bits("q8_0")
    if row.name == EXPERTS_ONLY and not stacked:
        return _bits("q8_0")
    words = of.words(layer)
    kinds = (
        kind
        for names, when, kind in _RULES[part]
        if when in words and (not names or row.name in names.split())
    )
    kind = next(kinds, "") or base
    if part == "v" and of.is_70b and of.experts != _BUMPED and row.name not in _LOWEST:
        kind = _RAISED.get(kind, kind)
    if TENSOR_TYPES[kind].block == _BLOCK and columns % _BLOCK:
        kind = _INSTEAD.get(kind, "q4_0")
    return _bits(kind)


def _bits(kind: str) -> float:
    """Return the bits per weight of a type's blocks."""
    import gguf  # here to keep listing the formats fast

    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    return float(8 * size / weights)


def _base(row: FileType) -> str:
    found = _BASE.get(row.name, row.name)
    return found if found in TENSOR_TYPES else row.family
