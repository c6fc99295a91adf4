"""The formats that are rounded to compressed-tensors' layouts: one row each, as it defines them.

Layouts and names are those of compressed-tensors 0.20 (quantization/quant_scheme.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from weightsmith.core.values import FP8, Format, JsonValue
from weightsmith.quantizers.architectures import STACKED_MXFP4


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How a matrix [outputs, inputs] is stored: codes, scales, and what servers do with inputs."""

    format: Format
    layout: str
    """compressed-tensors' `format`, or `mxfp4` for OpenAI's layout of stacked experts."""
    codes: str
    """Safetensors dtype of the codes; U8 holds two 4-bit codes, the even column in the low bits."""
    scales: str
    """Safetensors dtype of the scales; U8 holds an exponent of 2 plus 127."""
    largest: float
    """Largest value of the code's type."""
    tile: tuple[int, int]
    """Outputs and inputs that share a scale; 0 inputs: all."""
    tops: tuple[float, ...] = ()
    """Values to which a tile's largest magnitude may be mapped: the one with the least squared
    error is, the first of equals. Empty: to `largest`."""
    fused_scale: bool = False
    """Whether matrices that engines fuse have a second scale in common, a float32."""
    weights: Mapping[str, JsonValue]
    inputs: Mapping[str, JsonValue] | None
    """What servers do with activations before they multiply; None: nothing."""

    @property
    def observed(self) -> bool:
        """Whether a matrix has a scale of its inputs, from calibration."""
        return bool(self.inputs) and "observer" in (self.inputs or {})

    @property
    def packed(self) -> bool:
        """Whether a byte holds two codes."""
        return self.codes == "U8"

    @property
    def in_c(self) -> bool:
        """Whether our kernels round it (`images/engines/kernels/rounding.h`)."""
        return not self.tops and (self.scales != "U8" or self.packed)

    @property
    def whole_tiles(self) -> bool:
        """Whether engines read rows of whole tiles only: all with a scale per group of inputs."""
        return self.tile[0] == 1 and self.tile[1] > 0

    def config(self, ignored: Sequence[str]) -> dict[str, JsonValue]:
        """Return the quantization_config; `ignored` modules stay in 16 bits."""
        if self.layout == "mxfp4":
            return {"quant_method": "mxfp4", "modules_to_not_convert": list(_NOT_EXPERTS)}
        group: dict[str, JsonValue] = {"targets": ["Linear"], "weights": dict(self.weights)}
        group["input_activations"] = dict(self.inputs) if self.inputs else None
        return {
            "quant_method": "compressed-tensors",
            "format": self.layout,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", *ignored],
        }


_NOT_EXPERTS = (
    "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
)  # fmt: skip
"""What stays in 16 bits, in the words of OpenAI's own checkpoints."""


def _eight(kind: str, **more: JsonValue) -> dict[str, JsonValue]:
    return {"num_bits": 8, "type": kind, "symmetric": True, **more}


def _groups(bits: int, strategy: str, group: int, scales: str) -> dict[str, JsonValue]:
    return {
        "num_bits": bits, "type": "float", "symmetric": True, "dynamic": False,
        "strategy": strategy, "group_size": group, "scale_dtype": scales, "zp_dtype": scales,
    }  # fmt: skip


_MXFP4 = _groups(4, "group", 32, "torch.uint8")
_MXFP8 = _groups(8, "group", 32, "torch.uint8")


_SCHEMES = (
    Scheme(
        format=FP8,
        layout="float-quantized",
        codes="F8_E4M3",
        scales="F32",
        largest=448.0,
        tile=(1, 0),
        weights=_eight("float", strategy="channel", dynamic=False),
        inputs=_eight("float", strategy="token", dynamic=True),
    ),
    Scheme(
        format=Format(name="w8a8", kind="compressed-tensors", bits_per_weight=8.0),
        layout="int-quantized",
        codes="I8",
        scales="F32",
        largest=127.0,  # symmetric: without -128
        tile=(1, 0),
        weights=_eight("int", strategy="channel", dynamic=False),
        inputs=_eight("int", strategy="token", dynamic=True),
    ),
    Scheme(
        format=Format(name="fp8-block", kind="fp8", bits_per_weight=8.0),
        layout="float-quantized",
        codes="F8_E4M3",
        scales="F32",
        largest=448.0,
        tile=(128, 128),
        weights=_eight("float", strategy="block", dynamic=False, block_structure=[128, 128]),
        inputs=_eight("float", strategy="group", dynamic=True, group_size=128),
    ),
    Scheme(
        format=Format(name="nvfp4a16", kind="nvfp4", bits_per_weight=4.5),
        layout="nvfp4-pack-quantized",
        codes="U8",
        scales="F8_E4M3",
        largest=6.0,
        tile=(1, 16),
        fused_scale=True,
        weights=_groups(4, "tensor_group", 16, "torch.float8_e4m3fn"),
        inputs=None,
    ),
    Scheme(
        format=Format(name="mxfp4a16", kind="mxfp4", bits_per_weight=4.25),
        layout="mxfp4-pack-quantized",
        codes="U8",
        scales="U8",
        largest=6.0,
        tile=(1, 32),
        weights=_MXFP4,
        inputs=None,
    ),
    Scheme(
        format=Format(name="mxfp4a8", kind="mxfp4", bits_per_weight=4.25),
        layout="mxfp4-pack-quantized",
        codes="U8",
        scales="U8",
        largest=6.0,
        tile=(1, 32),
        weights=_MXFP4,
        inputs={**_MXFP8, "dynamic": True},
    ),
    Scheme(
        format=Format(name="mxfp8", kind="mxfp8", bits_per_weight=8.25),
        layout="mxfp8-quantized",
        codes="F8_E4M3",
        scales="U8",
        largest=448.0,
        tile=(1, 32),
        weights=_MXFP8,
        inputs={**_MXFP8, "dynamic": True},
    ),
)
_FOUR_OVER_SIX = replace(
    next(one for one in _SCHEMES if one.format.name == "nvfp4a16"),
    format=Format(name="nvfp4a16-4o6", kind="nvfp4", bits_per_weight=4.5),
    tops=(6.0, 4.0),
)
"""Four over Six (arXiv 2512.02010): codes have no value between 4 and 6, so that a group whose
largest weight is mapped to 4 may lose less. Read as the other. The scale of the matrix is not made
smaller for it, as there and in ModelOpt: its largest groups can then only be mapped to 6, which
made no difference in the error of SmolLM2's matrices. llm-compressor 0.14 calls a search over 112
ranges by that name. The matrices lose 0.094 as NVFP4, 0.086 so, and 0.079 by that search; the
divergence on 800 tokens is the same, so this is not the default."""
SCHEMES: Mapping[str, Scheme] = MappingProxyType(
    {one.format.name: one for one in (*_SCHEMES, _FOUR_OVER_SIX)}
)
"""Those that need no calibration text, by the format's name."""
_STACKED = replace(SCHEMES["mxfp4a16"], layout="mxfp4")


def stored_as(scheme: Scheme, architecture: str) -> Scheme:
    """Return the scheme with the layout in which engines load this architecture."""
    stacked = architecture in STACKED_MXFP4 and scheme == SCHEMES["mxfp4a16"]
    return _STACKED if stacked else scheme


NVFP4 = replace(
    SCHEMES["nvfp4a16"],
    format=Format(name="nvfp4", kind="nvfp4", bits_per_weight=4.5),
    inputs={
        **_groups(4, "tensor_group", 16, "torch.float8_e4m3fn"),
        "dynamic": "local",
        "observer": "static_minmax",
    },
)
"""Servers round inputs, too: by a scale per 16 of them, and one from calibration for all."""
