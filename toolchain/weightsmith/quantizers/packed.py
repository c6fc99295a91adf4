"""Dequantize packed checkpoints to float32, independently of the engines.

AutoAWQ's GEMM layout (awq/modules/linear/gemm.py of AutoAWQ 0.2.9), GPTQ's first layout
(qlinear/torch.py of GPTQModel 7.6), and compressed-tensors 0.20 (compressors/: pack-quantized,
int-quantized, float-quantized, nvfp4-pack-quantized, mxfp4-pack-quantized, mxfp8-quantized), and
OpenAI's layout of stacked experts in MXFP4 (convert_moe_packed_tensors in integrations/mxfp4.py of
transformers 5.24), and ModelOpt's (FP8QDQLinearMethod, NVFP4LinearMethod and
W4A16_AWQ_LinearMethod of TensorRT-LLM).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from weightsmith.core.errors import CheckFailed
from weightsmith.core.safe_parse import read_json
from weightsmith.core.values import PACKED, Json
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers.matrices import Floats, Matrix, matrices
from weightsmith.quantizers.schemes import Scheme
from weightsmith.quantizers.tiled import QuantizedTiles

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column (of eight) of nibble i of an int32."""
FLOAT4 = frozenset({"nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp4", "modelopt-nvfp4"})
"""Layouts of float4_e2m1, two codes per byte."""
MODELOPT: Mapping[str, str] = {
    "FP8": "modelopt-fp8", "NVFP4": "modelopt-nvfp4", "W4A16_AWQ": "modelopt-awq",
}  # fmt: skip
"""ModelOpt's `quant_algo` -> what its layout is called here."""
MIXED = "mixed-precision"
"""compressed-tensors' `format` of a checkpoint whose modules have several."""
PARTS = (
    ".qweight", ".qzeros", ".scales", ".g_idx",
    ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".input_scale",
    ".weight_global_scale", ".input_global_scale", ".weight_scale_2", ".pre_quant_scale",
    "_blocks", "_scales",
)  # fmt: skip
"""Suffixes of a quantized module's tensors, except `.weight`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayout:
    """Storage layout of a checkpoint's quantized modules."""

    method: str
    """`awq`, `gptq`, `mxfp4`, a compressed-tensors format, or one of `MODELOPT`'s."""
    bits: int
    group_size: int
    """Inputs per scale; 0: a whole row."""
    symmetric: bool
    inputs: bool = False
    """Whether each module has a fixed input scale."""
    outputs: int = 1
    """Outputs per scale."""
    rescaled: bool = field(default=False, compare=False)
    """Whether AWQ made it without zero points, which config.json does not say."""

    @classmethod
    def of_scheme(cls, scheme: Scheme) -> PackedLayout:
        """Return the layout of a format that needs no calibration."""
        return cls(
            method=scheme.layout,
            bits=4 if scheme.packed else 8,
            group_size=scheme.tile[1],
            symmetric=True,
            inputs=scheme.observed,
            outputs=scheme.tile[0],
        )

    @property
    def tiled(self) -> bool:
        """Whether codes have a byte or half of one, and scales are of tiles."""
        return self.method not in {*_INTEGERS, PACKED}

    @property
    def moved(self) -> bool:
        """Whether scales may have moved between tensors, as AWQ does."""
        integers = self.method == PACKED and (self.rescaled or not self.symmetric)
        return self.method in {"awq", "modelopt-awq"} or integers

    @property
    def input_scale(self) -> str:
        """Suffix of a module's fixed input scale."""
        own = self.method in FLOAT4 and self.codes == ".weight_packed"
        return ".input_global_scale" if own else ".input_scale"

    @property
    def codes(self) -> str:
        """Suffix of the tensor with a module's codes, one or two in a byte."""
        own = self.method in FLOAT4 and self.method not in MODELOPT.values()
        return ".weight_packed" if own else ".weight"

    @property
    def marker(self) -> str:
        """Suffix of a tensor that every quantized module has; of a whole stack in `mxfp4`."""
        if self.method in {"awq", "gptq"}:
            return ".qweight"
        if self.method == "mxfp4":
            return "_blocks"
        packed = self.method == PACKED or self.codes == ".weight_packed"
        return ".weight_packed" if packed else ".weight_scale"


def layout_of(config: Mapping[str, Json]) -> PackedLayout:
    """Return the layout in config.json; raise CheckFailed if it is missing or unknown."""
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method", "")
    if method in {"awq", "gptq"} and quantization.get("bits") == 4:
        symmetric = quantization.get("sym", True)
        if method == "awq":
            symmetric = not quantization.get("zero_point", True)
        size = max(0, int(quantization.get("group_size") or 0))
        return PackedLayout(method=method, bits=4, group_size=size, symmetric=bool(symmetric))
    if method == "mxfp4":
        return PackedLayout(method=method, bits=4, group_size=32, symmetric=True)
    if method == "modelopt" and quantization.get("quant_algo") in MODELOPT:
        found = MODELOPT[quantization["quant_algo"]]
        sizes = {"modelopt-nvfp4": 16, "modelopt-awq": int(quantization.get("group_size") or 0)}
        return PackedLayout(
            method=found,
            bits=4 if found in sizes else 8,
            group_size=sizes.get(found, 0),
            symmetric=True,
            inputs=found != "modelopt-awq",
        )
    if method == "compressed-tensors":
        (group,) = quantization["config_groups"].values()
        return _of_group(group, str(quantization["format"]))
    raise CheckFailed(
        f"config.json has the unexpected quant_method {method!r}",
        hint="check the engine's output",
    )


def layouts_of(config: Mapping[str, Json]) -> Mapping[str, PackedLayout]:
    """Return the layout of each module that config.json names; {} if all have the same."""
    quantization = config.get("quantization_config") or {}
    if quantization.get("format") != MIXED:
        return {}
    return {
        module: _of_group(group, "")
        for group in quantization["config_groups"].values()
        for module in group["targets"]
    }


def _of_group(group: Mapping[str, Json], format_: str) -> PackedLayout:
    """Return the layout of one of compressed-tensors' config_groups."""
    weights = group["weights"]
    outputs, columns = weights.get("block_structure") or (1, weights.get("group_size") or 0)
    return PackedLayout(
        method=str(group.get("format") or format_),
        bits=int(weights["num_bits"]),
        group_size=int(columns),
        symmetric=bool(weights["symmetric"]),
        inputs=(group.get("input_activations") or {}).get("dynamic") in (False, "local"),
        outputs=int(outputs),
    )


MIXTURE = PackedLayout(method=MIXED, bits=4, group_size=0, symmetric=True)
"""Stands for the layouts of a checkpoint whose modules have several."""


class PackedView:
    """A View of a quantized checkpoint."""

    def __init__(
        self, folder: Path, stacked: Iterable[Matrix] = (), *, rescaled: bool = False
    ) -> None:
        """Read config.json and the headers; `stacked` are parts of stacked tensors."""
        self.tensors = CheckpointTensors(folder)
        config = read_json(folder / "config.json")
        self.layouts = layouts_of(config)
        told = MIXTURE if self.layouts else layout_of(config)
        self.layout = replace(told, rescaled=rescaled)
        known = tuple(stacked)
        ends = {one.marker for one in (self.layouts.values() or (self.layout,))}
        marked = {
            n.removesuffix(end) for end in ends for n in self.tensors.names if n.endswith(end)
        }
        self._experts: dict[str, Matrix] = {}
        if self.layout.method == "mxfp4":
            self._experts = {m.module: m for m in known if m.tensor in marked}
            marked = marked - {m.tensor for m in known} | self._experts.keys()
        self.modules = frozenset(marked)
        self._stacks: dict[str, list[Matrix]] = {}
        for matrix in known:
            if matrix.module in self.modules:
                self._stacks.setdefault(matrix.tensor, []).append(matrix)

    def of(self, module: str) -> PackedLayout:
        """Return a module's layout."""
        return self.layouts.get(module, self.layout)

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the tensors, as in the original checkpoint."""
        parts = {matrix.module for stack in self._stacks.values() for matrix in stack}
        own = {f"{module}.weight" for module in self.modules - parts}
        rest = {n for n in self.tensors.names if not n.endswith(PARTS)}
        return frozenset(own | (rest - {f"{part}.weight" for part in parts}) | self._stacks.keys())

    def tensor(self, name: str) -> Floats:
        """Return one tensor as float32 in the original shape."""
        if name in self._stacks:
            return self._stack(self._stacks[name])
        module = name.removesuffix(".weight")
        return self.matrix(module) if module in self.modules else self.tensors.f32(name)

    def rows(self, name: str, start: int, stop: int) -> Floats:
        """Return some rows of such a tensor; only they are dequantized, unless it is a stack."""
        if name in self._stacks:
            return self._stack(self._stacks[name])[start:stop]
        module = name.removesuffix(".weight")
        if module in self.modules:
            return self.matrix(module, start, stop)
        return self.tensors.part(name, (slice(start, stop),))

    def kind(self, name: str) -> str:
        """Return the layout of a quantized matrix, or the type of another tensor.

        Returns "" for all of AWQ, which moves scales between tensors, and for integers of other
        sizes, whose errors have no limit of their own.
        """
        if self.layout.moved or (self.layout.method == PACKED and self.layout.bits != 4):
            return ""
        stack = self._stacks.get(name)
        module = stack[0].module if stack else name.removesuffix(".weight")
        if module in self.modules:
            return self.of(module).method
        return self.tensors.info(name).dtype.lower()

    def matrix(self, module: str, start: int = 0, stop: int | None = None) -> Floats:
        """Return a module's outputs from `start` to `stop` as float32 [outputs, inputs].

        Only these are dequantized.
        """
        layout = self.of(module)
        if layout.method == PACKED:
            return _packed(self.tensors, module, start, stop, layout.bits)
        if reader := _INTEGERS.get(layout.method):
            return reader(self.tensors, module, start, stop)
        skipped = start % layout.outputs
        return self.tiles(module, start - skipped, stop).rows()[skipped:]

    def tiles(self, module: str, start: int = 0, stop: int | None = None) -> QuantizedTiles:
        """Return codes and scales of outputs from `start`, which begins a tile, to `stop`.

        W[o, i] = q[o, i] s[tile of o, tile of i], with a common divisor of all s for NVFP4. In a
        stack, W[o, i] = code[e, o, i / 32, i % 32 / 2] 2^(scale[e, o, i / 32] - 127) of expert e.
        """
        tensors, layout = self.tensors, self.of(module)
        last = None if stop is None else -(-stop // layout.outputs)
        scales = self.scales(module, slice(start // layout.outputs, last))
        if module in self._experts:
            matrix = self._experts[module]
            blocks = tensors.array(f"{matrix.tensor}_blocks")[matrix.expert, start:stop]
            codes, dtype, tile = blocks.reshape(len(blocks), -1), "U8", (1, 2 * blocks.shape[-1])
        else:
            name = f"{module}{layout.codes}"
            dtype, codes = tensors.info(name).dtype, tensors.array(name)[start:stop]
            high = max(1, len(codes)) if len(scales) == 1 else layout.outputs  # 1: one for all
            tile = high, layout.group_size or codes.shape[1]
        return QuantizedTiles(dtype=dtype, codes=codes.view(np.uint8), scales=scales, tile=tile)

    def scales(self, module: str, where: slice = slice(None)) -> Floats:
        """Return what a module's codes are multiplied by: [tiles of outputs, tiles of inputs].

        `where` picks tiles of outputs. AWQ and GPTQ have groups of inputs first, and all of them.
        """
        tensors, method, name = self.tensors, self.of(module).method, f"{module}.weight_scale"
        if method in {"awq", "gptq"}:
            return tensors.f32(f"{module}.scales")
        if module in self._experts:
            matrix = self._experts[module]
            stored = tensors.array(f"{matrix.tensor}_scales")[matrix.expert, where]
            return _powers_of_two(stored).reshape(len(stored), -1)
        if method in {"mxfp4-pack-quantized", "mxfp8-quantized"}:
            return _powers_of_two(tensors.array(name)[where])
        if math.prod(tensors.info(name).shape) == 1:
            where = slice(None)  # one for the whole matrix
        scales = tensors.part(name, (where,)) if tensors.info(name).shape else tensors.f32(name)
        scales = scales.reshape(len(scales) if scales.ndim else 1, -1)
        if method == "nvfp4-pack-quantized":
            return np.asarray(scales / tensors.f32(f"{module}.weight_global_scale"), np.float32)
        if method == "modelopt-nvfp4":
            return np.asarray(scales * tensors.f32(f"{module}.weight_scale_2"), np.float32)
        return scales

    def _stack(self, parts: Sequence[Matrix]) -> Floats:
        """Return all experts as one tensor, as the checkpoint has them."""
        experts = 1 + max(part.expert for part in parts)
        outputs = max(part.first + part.outputs for part in parts)
        made = np.empty((experts, outputs, parts[0].inputs), np.float32)
        for part in parts:
            span = slice(part.first, part.first + part.outputs)
            made[part.expert, span] = self.matrix(part.module)
        if parts[0].transposed:
            return np.ascontiguousarray(made.transpose(0, 2, 1))
        return made


def view_of(folder: Path, model: Path, *, rescaled: bool = False) -> PackedView:
    """Return a finished folder's View for the quality gate, with the tensors of `model`.

    With `rescaled`, integers without zero points are AWQ's.
    """
    found = matrices(CheckpointTensors(model), model)
    stacked = [matrix for matrix in found if matrix.expert >= 0]
    return PackedView(folder, stacked, rescaled=rescaled)


def nibbles(packed: npt.NDArray[np.generic]) -> npt.NDArray[np.int32]:
    """Return [rows, columns, 8]: the eight 4-bit values of each int32, lowest bits first."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    words = np.ascontiguousarray(packed).view(np.uint32)
    return ((words[:, :, None] >> shifts) & 15).astype(np.int32)


def _words(start: int, stop: int | None) -> tuple[slice, slice]:
    """Return the int32 that have these values, eight in each, and where the values are in them."""
    first = start // 8
    last, end = (None, None) if stop is None else (-(-stop // 8), stop - 8 * first)
    return slice(first, last), slice(start - 8 * first, end)


def _in_awq_order(packed: npt.NDArray[np.generic]) -> npt.NDArray[np.int32]:
    found = np.empty((*packed.shape, 8), np.int32)
    found[:, :, _AWQ_ORDER] = nibbles(packed)
    return found.reshape(packed.shape[0], -1)


def _awq(tensors: CheckpointTensors, module: str, start: int, stop: int | None) -> Floats:
    """W[i, o] = (q - z[g]) s[g]; g counts groups of inputs."""
    words, inside = _words(start, stop)
    values = _in_awq_order(tensors.array(f"{module}.qweight")[:, words])[:, inside]
    zeros = _in_awq_order(tensors.array(f"{module}.qzeros")[:, words])[:, inside]
    scales = tensors.f32(f"{module}.scales")[:, start:stop]
    group = values.shape[0] // scales.shape[0]
    centred = (values - np.repeat(zeros, group, 0)).astype(np.float32)
    return np.ascontiguousarray((centred * np.repeat(scales, group, 0)).T)


def _gptq(tensors: CheckpointTensors, module: str, start: int, stop: int | None) -> Floats:
    """W[i, o] = (q - z[g(i)]) s[g(i)]; zero points are stored minus one."""
    words, inside = _words(start, stop)
    packed = tensors.array(f"{module}.qweight")[:, start:stop]
    values = nibbles(packed).transpose(0, 2, 1).reshape(-1, packed.shape[1])
    stored = tensors.array(f"{module}.qzeros")[:, words]
    zeros = nibbles(stored).reshape(stored.shape[0], -1)[:, inside][:, : values.shape[1]] + 1
    scales = tensors.f32(f"{module}.scales")[:, start:stop]
    name = f"{module}.g_idx"
    inputs = np.arange(values.shape[0])
    group = inputs // (values.shape[0] // scales.shape[0])
    if name in tensors.names:
        group = tensors.array(name).astype(np.int64)
    return np.ascontiguousarray(((values - zeros[group]).astype(np.float32) * scales[group]).T)


def _packed(
    tensors: CheckpointTensors, module: str, start: int, stop: int | None, bits: int
) -> Floats:
    """W[o, i] = (q - z[g]) s[g]; q and z are stored plus 2^(bits - 1), z is packed along outputs.

    A row's codes follow each other from the lowest bit on, also across words.
    """
    _, columns = (int(n) for n in tensors.array(f"{module}.weight_shape"))
    packed = tensors.array(f"{module}.weight_packed")[start:stop]
    if bits == 4:
        values = nibbles(packed).reshape(packed.shape[0], -1)[:, :columns] - 8
    else:
        values = _dense(packed, bits, columns) - (1 << bits - 1)
    scales = tensors.part(f"{module}.weight_scale", (slice(start, stop),))
    group = columns // scales.shape[1]
    name = f"{module}.weight_zero_point"
    if name in tensors.names:
        words, inside = _words(start, stop)
        stored = tensors.array(name)[words]
        zeros = nibbles(stored).transpose(0, 2, 1).reshape(-1, stored.shape[1])[inside] - 8
        values = values - np.repeat(zeros[: len(values)], group, 1)
    return np.ascontiguousarray(values.astype(np.float32) * np.repeat(scales, group, 1))


def _modelopt_awq(tensors: CheckpointTensors, module: str, start: int, stop: int | None) -> Floats:
    """W[o, i] = q[o, i] s[o, g] p[i]; a byte has outputs 2n and 2n + 1, and p may be missing."""
    first, last = start // 2, None if stop is None else -(-stop // 2)
    packed = tensors.array(f"{module}.weight")[first:last].view(np.uint8)
    pairs = np.stack([packed & 15, packed >> 4], 1).reshape(-1, packed.shape[1]).astype(np.int32)
    codes = ((pairs ^ 8) - 8)[start - 2 * first :][: None if stop is None else stop - start]
    scales = tensors.part(f"{module}.weight_scale", (slice(start, stop),))
    found = codes.astype(np.float32) * np.repeat(scales, codes.shape[1] // scales.shape[1], 1)
    name = f"{module}.pre_quant_scale"
    return found * tensors.f32(name) if name in tensors.names else found


_INTEGERS = {"awq": _awq, "gptq": _gptq, "modelopt-awq": _modelopt_awq}


def _dense(packed: npt.NDArray[np.generic], bits: int, columns: int) -> npt.NDArray[np.int32]:
    """Return a row's first integers of `bits` bits: each bit is one of the row's in order."""
    words = np.ascontiguousarray(packed).astype("<i4", copy=False)
    every = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little", count=columns * bits)
    found = np.zeros((len(words), columns), np.int32)
    for bit in range(bits):
        found |= every[:, bit::bits].astype(np.int32) << bit
    return found


def _powers_of_two(stored: npt.NDArray[np.generic]) -> Floats:
    """Return the powers whose exponents, plus 127, are stored."""
    return np.ldexp(np.float32(1), stored.astype(np.int32) - 127).astype(np.float32)
