"""Dequantize packed checkpoints to float32, independently of the engines.

AutoAWQ's GEMM layout (awq/modules/linear/gemm.py of AutoAWQ 0.2.9), GPTQ's first layout
(qlinear/torch.py of GPTQModel 7.6), and compressed-tensors 0.19 (compressors/: pack-quantized,
int-quantized, float-quantized).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.checkpoints.tensors import CheckpointTensors
from weightsmith.errors import CheckFailed
from weightsmith.foreign import read_json
from weightsmith.values import Json

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column (of eight) of nibble i of an int32."""
PARTS = (
    ".qweight", ".qzeros", ".scales", ".g_idx",
    ".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".input_scale",
)  # fmt: skip
"""Suffixes of a quantized module's tensors, except `.weight`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Storage layout of a checkpoint's quantized modules."""

    method: str
    """`awq`, `gptq` or a compressed-tensors format."""
    bits: int
    group_size: int
    """Inputs per scale; 0: a whole row."""
    symmetric: bool
    inputs: bool = False
    """Whether each module has a fixed input scale."""

    @property
    def marker(self) -> str:
        """Suffix of a tensor that every quantized module has."""
        if self.method in {"awq", "gptq"}:
            return ".qweight"
        return ".weight_packed" if self.method == "pack-quantized" else ".weight_scale"


def layout_of(config: Mapping[str, Json]) -> Layout:
    """Return the layout in config.json; raise CheckFailed if it is missing or unknown."""
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method", "")
    if method in {"awq", "gptq"} and quantization.get("bits") == 4:
        symmetric = (
            quantization.get("sym", True)
            if method == "gptq"
            else not quantization.get("zero_point", True)
        )
        group = int(quantization.get("group_size") or 0)
        return Layout(method=method, bits=4, group_size=max(0, group), symmetric=bool(symmetric))
    if method == "compressed-tensors":
        (group,) = quantization["config_groups"].values()
        weights = group["weights"]
        return Layout(
            method=str(group.get("format") or quantization["format"]),
            bits=int(weights["num_bits"]),
            group_size=int(weights.get("group_size") or 0),
            symmetric=bool(weights["symmetric"]),
            inputs=(group.get("input_activations") or {}).get("dynamic") is False,
        )
    raise CheckFailed(
        f"config.json has the unexpected quant_method {method!r}",
        hint="check the engine's output",
    )


class PackedView:
    """A View of a quantized checkpoint, dequantized one tensor at a time."""

    def __init__(self, folder: Path) -> None:
        """Read config.json and the headers."""
        self.tensors = CheckpointTensors(folder)
        self.layout = layout_of(read_json(folder / "config.json"))
        end = self.layout.marker
        self.modules = frozenset(
            name.removesuffix(end) for name in self.tensors.names if name.endswith(end)
        )

    @property
    def names(self) -> frozenset[str]:
        """Names of the tensors, as in the original checkpoint."""
        own = {f"{module}.weight" for module in self.modules}
        return frozenset(own | {n for n in self.tensors.names if not n.endswith(PARTS)})

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """Return one tensor as float32 in the original shape."""
        module = name.removesuffix(".weight")
        return self._module(module) if module in self.modules else self.tensors.f32(name)

    def _module(self, module: str) -> npt.NDArray[np.float32]:
        if self.layout.method == "awq":
            return _awq(self.tensors, module)
        if self.layout.method == "gptq":
            return _gptq(self.tensors, module)
        if self.layout.method == "pack-quantized":
            return _packed(self.tensors, module)
        scale = self.tensors.f32(f"{module}.weight_scale")
        weight = self.tensors.f32(f"{module}.weight")
        found: npt.NDArray[np.float32] = weight * scale.reshape(-1, 1)
        return found


def view_of(folder: Path, _model: Path) -> PackedView:
    """Return a finished folder's View for the quality gate."""
    return PackedView(folder)


def nibbles(packed: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Return [rows, columns, 8]: the eight 4-bit values of each int32, lowest bits first."""
    import numpy as np

    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    words = np.ascontiguousarray(packed).view(np.uint32)
    return ((words[:, :, None] >> shifts) & 15).astype(np.int32)


def _in_awq_order(packed: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    import numpy as np

    found = np.empty((*packed.shape, 8), np.int32)
    found[:, :, _AWQ_ORDER] = nibbles(packed)
    return found.reshape(packed.shape[0], -1)


def _awq(tensors: CheckpointTensors, module: str) -> npt.NDArray[np.float32]:
    """W[i, o] = (q - z[g]) s[g]; g counts groups of inputs."""
    import numpy as np

    values = _in_awq_order(tensors.array(f"{module}.qweight"))
    zeros = _in_awq_order(tensors.array(f"{module}.qzeros"))
    scales = tensors.f32(f"{module}.scales")
    group = values.shape[0] // scales.shape[0]
    centred = (values - np.repeat(zeros, group, 0)).astype(np.float32)
    return np.ascontiguousarray((centred * np.repeat(scales, group, 0)).T)


def _gptq(tensors: CheckpointTensors, module: str) -> npt.NDArray[np.float32]:
    """W[i, o] = (q - z[g(i)]) s[g(i)]; zero points are stored minus one."""
    import numpy as np

    packed = tensors.array(f"{module}.qweight")
    values = nibbles(packed).transpose(0, 2, 1).reshape(-1, packed.shape[1])
    stored = tensors.array(f"{module}.qzeros")
    zeros = nibbles(stored).reshape(stored.shape[0], -1) + 1
    scales = tensors.f32(f"{module}.scales")
    name = f"{module}.g_idx"
    inputs = np.arange(values.shape[0])
    group = inputs // (values.shape[0] // scales.shape[0])
    if name in tensors.names:
        group = tensors.array(name).astype(np.int64)
    return np.ascontiguousarray(((values - zeros[group]).astype(np.float32) * scales[group]).T)


def _packed(tensors: CheckpointTensors, module: str) -> npt.NDArray[np.float32]:
    """W[o, i] = (q - z[g]) s[g]; q and z are stored plus eight, z is packed along the outputs."""
    import numpy as np

    rows, columns = (int(n) for n in tensors.array(f"{module}.weight_shape"))
    packed = tensors.array(f"{module}.weight_packed")
    values = nibbles(packed).reshape(packed.shape[0], -1)[:rows, :columns] - 8
    scales = tensors.f32(f"{module}.weight_scale")
    group = columns // scales.shape[1]
    name = f"{module}.weight_zero_point"
    if name in tensors.names:
        stored = tensors.array(name)
        zeros = nibbles(stored).transpose(0, 2, 1).reshape(-1, stored.shape[1])[:rows] - 8
        values = values - np.repeat(zeros, group, 1)
    return np.ascontiguousarray(values.astype(np.float32) * np.repeat(scales, group, 1))
