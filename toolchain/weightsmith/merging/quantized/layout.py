"""Map the stored tensors of a quantized checkpoint to its weights; no torch, no dequantization."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import Json, JsonValue
from weightsmith.models.safetensors import TensorInfo

Tensors = Mapping[str, TensorInfo]
ReadBytes = Callable[[TensorInfo], bytes]
"""Reads a small tensor's bytes."""

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
FLOAT8 = ("F8_E4M3", "F8_E5M2")
MX_GROUP = 32
"""Columns that share a scale in the OCP Microscaling Formats."""
HINT = "merge onto the original 16-bit checkpoint instead"
_ACTIVATION = (
    *("input_scale", "activation_scale", "output_scale", "k_scale", "v_scale", "q_scale"),
    *("input_zero_point", "input_global_scale", "input_scale_ub"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One quantized weight."""

    name: str
    """Its name in an unquantized checkpoint."""
    scheme: str
    """A key of `decode.DECODERS`."""
    shape: tuple[int, ...]
    dtype: str
    """Safetensors dtype of the dequantized weight."""
    parts: Mapping[str, TensorInfo]
    """Part -> stored tensor; `weight` has the codes, and its position in the file is used."""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    config: Mapping[str, JsonValue]
    settings: Mapping[str, Any]
    """The `quantization_config`."""
    tensors: Tensors
    read: ReadBytes

    def modules(self, suffix: str) -> list[str]:
        return [name.removesuffix(suffix) for name in self.tensors if name.endswith(suffix)]

    def part(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise _undecodable(f"{name} is missing")
        return self.tensors[name]

    def some(self, module: str, **names: str) -> dict[str, TensorInfo]:
        found = {part: self.tensors.get(f"{module}.{name}") for part, name in names.items()}
        return {part: info for part, info in found.items() if info}

    def dtype(self, fallback: str = "BF16") -> str:
        text = self.config.get("text_config")
        nested = text.get("dtype", text.get("torch_dtype")) if isinstance(text, Mapping) else None
        stated = self.config.get("dtype", self.config.get("torch_dtype", nested))
        return DTYPES.get(str(stated).removeprefix("torch."), fallback)

    def packed(
        self,
        name: str,
        scheme: str,
        shape: tuple[int, ...],
        parts: Mapping[str, TensorInfo],
        options: Mapping[str, object] = MappingProxyType({}),
        fallback: str = "BF16",
    ) -> Packed:
        dtype = self.dtype(fallback)
        return Packed(
            name=name, scheme=scheme, shape=shape, dtype=dtype, parts=parts, options=options
        )


def _undecodable(what: str) -> InputRefused:
    return InputRefused(f"the quantized base cannot be dequantized: {what}", hint=HINT)


def _compressed(stored: _Stored) -> Iterator[Packed]:
    settings, tensors = stored.settings, stored.tensors
    groups = (settings.get("config_groups") or {}).values()
    given = [group.get("weights") for group in groups if isinstance(group, Mapping)]
    weights = [each for each in given if isinstance(each, Mapping)]
    told = [int(bits) for w in weights if isinstance(bits := w.get("num_bits"), int)]
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise _undecodable("sparse weights are not supported")
    for module in stored.modules(".weight_packed"):
        packed = tensors[f"{module}.weight_packed"]
        scale = stored.part(f"{module}.weight_scale")
        parts = {"weight": packed, "scale": scale}
        parts |= stored.some(
            module,
            zeros="weight_zero_point",
            groups="weight_g_idx",
            global_scale="weight_global_scale",
            shape="weight_shape",
        )
        if packed.dtype == "I32":
            data = stored.read(stored.part(f"{module}.weight_shape"))
            shape = struct.unpack(f"<{len(data) // 8}q", data[: len(data) // 8 * 8])
            bits = {"bits": _bits(packed.shape[-1], shape[-1], module, told)}
            yield stored.packed(f"{module}.weight", "ct-packed", shape, parts, bits)
        elif packed.dtype == "U8" and scale.dtype == "F8_E4M3" and "global_scale" in parts:
            shape = (*packed.shape[:-1], packed.shape[-1] * 2)
            yield stored.packed(f"{module}.weight", "nvfp4", shape, parts)
        elif packed.dtype == "U8" and scale.dtype == "U8":
            shape = (*packed.shape[:-1], packed.shape[-1] * 2)
            if shape[-1:] != tuple(count * MX_GROUP for count in scale.shape[-1:]):
                raise _undecodable(f"{packed.name} has not 4 bits per weight, as MXFP4 has")
            yield stored.packed(f"{module}.weight", "ct-mxfp4", shape, parts)
        else:
            raise _undecodable(f"{packed.name} has the unsupported packed dtype {packed.dtype}")
    block = next((w["block_structure"] for w in weights if w.get("block_structure")), None)
    for name, info in tensors.items():
        if name.endswith(".weight") and info.dtype in ("I8", *FLOAT8):
            yield _scaled(name, info, stored, block)


def _bits(words: int, columns: int, module: str, told: list[int]) -> int:
    """Return the bits per code of `columns` codes packed in 32-bit words without gaps.

    Fewer than 32 columns may fit several numbers, of which one that the configuration has is taken.
    """
    for bits in (*told, *range(2, 9)):
        if words == -(-columns * bits // 32):
            return int(bits)
    raise _undecodable(f"{module}.weight_packed has {words} words for {columns} columns")


def _fp8(stored: _Stored) -> Iterator[Packed]:
    for name, info in stored.tensors.items():
        if info.dtype in FLOAT8:
            yield _scaled(name, info, stored, stored.settings.get("weight_block_size"))


def _scaled(
    name: str, info: TensorInfo, stored: _Stored, block: Sequence[int] | None = None
) -> Packed:
    """Describe an 8-bit weight with a scale per tensor, row, group or block."""
    module = name.removesuffix(".weight")
    stem = f"{module}.weight" if name.endswith(".weight") else name
    scales = (stored.tensors.get(f"{stem}{suffix}") for suffix in ("_scale_inv", "_scale"))
    scale = next(filter(None, scales), None)
    if scale is None:
        raise _undecodable(f"{name} ({info.dtype}) has no scale")
    more = stored.some(module, zeros="weight_zero_point", groups="weight_g_idx")
    parts = {"weight": info, "scale": scale} | more
    return stored.packed(
        name, "scaled", info.shape, parts, {"block": list(block) if block else None}
    )


def _modelopt(stored: _Stored) -> Iterator[Packed]:
    """Find ModelOpt's weights: export/quant_utils.py to_quantized_weight in its version 0.47."""
    algorithm = stored.settings.get("quant_algo", "FP8")  # without one, tensors say which it is
    if algorithm not in ("FP8", "NVFP4"):
        raise _undecodable(f"ModelOpt's {algorithm!r} is not supported, only FP8 and NVFP4")
    if modules := stored.modules(".pre_quant_scale"):
        raise _undecodable(f"{modules[0]} has a pre_quant_scale, which moves scales to its inputs")
    for module in stored.modules(".weight_scale_2"):
        names = {"weight": "weight", "scale": "weight_scale", "scale_2": "weight_scale_2"}
        parts = {part: stored.part(f"{module}.{name}") for part, name in names.items()}
        weight = parts["weight"]
        if weight.dtype != "U8" or parts["scale"].dtype != "F8_E4M3":
            raise _undecodable(f"{weight.name} has the unsupported packed dtype {weight.dtype}")
        shape = (*weight.shape[:-1], weight.shape[-1] * 2)
        yield stored.packed(weight.name, "modelopt-nvfp4", shape, parts)
    for name, info in stored.tensors.items():
        if name.endswith(".weight") and info.dtype in FLOAT8:
            yield _scaled(name, info, stored)


def _mxfp4(stored: _Stored) -> Iterator[Packed]:
    for name in stored.modules("_blocks"):
        weight, scale = stored.tensors[f"{name}_blocks"], stored.part(f"{name}_scales")
        shape = weight.shape
        if len(shape) != 4 or shape[:3] != scale.shape:
            raise _undecodable(f"{name}_blocks has the unexpected shape {list(shape)}")
        # transformers stores experts as (expert, in, out).
        whole = (shape[0], shape[2] * shape[3] * 2, shape[1])
        yield stored.packed(name, "mxfp4", whole, {"weight": weight, "scale": scale})


def _gptq(stored: _Stored) -> Iterator[Packed]:
    settings, bits = stored.settings, int(stored.settings.get("bits", 4))
    form = str(settings.get("checkpoint_format", "gptq"))
    if form not in ("gptq", "gptq_v2"):
        raise _undecodable(f"unsupported GPTQ format {form!r}, packed for one kernel")
    options = {
        "bits": bits,
        "group_size": int(settings.get("group_size", -1)),
        # The first format stores zero points minus one.
        "zero_offset": 1 if form == "gptq" else 0,
    }
    for module in stored.modules(".qweight"):
        parts = _integer_parts(stored, module)
        if "groups" not in parts and settings.get("desc_act"):
            raise _undecodable(f"{module} has no g_idx, but the configuration sets desc_act")
        rows, columns = parts["weight"].shape
        shape, fallback = (columns, rows * 32 // bits), parts["scale"].dtype
        yield stored.packed(f"{module}.weight", "gptq", shape, parts, options, fallback)


def _awq(stored: _Stored) -> Iterator[Packed]:
    settings, bits = stored.settings, int(stored.settings.get("bits", 4))
    form = str(settings.get("version", "gemm")).lower()
    if form not in ("gemm", "gemv") or bits != 4:
        raise _undecodable(
            f"unsupported AWQ version {form!r} with {bits} bits, packed for one kernel"
        )
    group = int(settings.get("group_size", settings.get("q_group_size", -1)))
    for module in stored.modules(".qweight"):
        parts = _integer_parts(stored, module)
        first, second = parts["weight"].shape
        shape = (second * 8, first) if form == "gemm" else (first, second * 8)
        size = group if group > 0 else shape[1]
        if form == "gemv" and (shape[1] % size or parts["scale"].shape[-1] < shape[1] // size):
            raise _undecodable(
                f"{module} has {shape[1]} inputs, not a multiple of the group size {size}"
            )
        options, fallback = {"bits": bits, "group_size": size}, parts["scale"].dtype
        yield stored.packed(f"{module}.weight", f"awq-{form}", shape, parts, options, fallback)


def _integer_parts(stored: _Stored, module: str) -> dict[str, TensorInfo]:
    weight = stored.part(f"{module}.qweight")
    zeros, scale = stored.part(f"{module}.qzeros"), stored.part(f"{module}.scales")
    if weight.dtype != "I32" or len(weight.shape) != 2:
        raise _undecodable(f"{module}.qweight has dtype {weight.dtype}, not int32")
    more = stored.some(module, groups="g_idx")
    return {"weight": weight, "zeros": zeros, "scale": scale} | more


def _bitsandbytes(stored: _Stored) -> Iterator[Packed]:
    mark = ".quant_state.bitsandbytes__"
    for name, info in stored.tensors.items():
        if mark in name:
            yield _bnb_4bit(name.partition(mark)[0], info, stored)
        elif name.endswith(".SCB"):
            module = name.removesuffix(".SCB")
            weight = stored.part(f"{module}.weight")
            form = stored.some(module, format="weight_format")
            if form and any(stored.read(form["format"])[:1]):
                raise _undecodable(f"{module}.weight has another row order than plain int8")
            parts = {"weight": weight, "scale": info} | form
            yield stored.packed(weight.name, "bnb-int8", weight.shape, parts, fallback="F16")


def _bnb_4bit(name: str, state: TensorInfo, stored: _Stored) -> Packed:
    try:
        settings = parse(stored.read(state))
        shape, dtype = tuple(int(n) for n in settings["shape"]), DTYPES[settings["dtype"]]
        options = {"kind": str(settings["quant_type"]), "blocksize": int(settings["blocksize"])}
    except (ValueError, KeyError, TypeError) as error:
        raise _undecodable(f"{state.name} cannot be read: {error}") from error
    names = {"weight": name, "absmax": f"{name}.absmax", "code": f"{name}.quant_map"}
    if "nested_blocksize" in settings:
        names |= {"nested_absmax": f"{name}.nested_absmax"}
        names |= {"nested_code": f"{name}.nested_quant_map"}
        options |= {
            "nested_blocksize": int(settings["nested_blocksize"]),
            "nested_offset": float(settings["nested_offset"]),
        }
    parts = {part: stored.part(each) for part, each in names.items()} | {"state": state}
    codes = parts["weight"].size * 2
    if codes - math.prod(shape) not in (0, 1) or options["kind"] not in ("nf4", "fp4"):
        raise _undecodable(f"{name} has {codes} codes for shape {list(shape)}")
    return Packed(
        name=name, scheme="bnb-4bit", shape=shape, dtype=dtype, parts=parts, options=options
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedLayout:
    """The quantized weights and unused tensors of a checkpoint."""

    packed: Mapping[str, Packed]
    """Weight -> how it is stored."""
    dropped: frozenset[str]
    """Stored tensors used only in quantized inference, such as activation scales."""

    def owners(self) -> dict[str, str]:
        """Return the weight that each stored tensor belongs to."""
        return {
            part.name: weight.name
            for weight in self.packed.values()
            for part in weight.parts.values()
        }


def quantization_of(config: Mapping[str, JsonValue], tensors: Tensors) -> str:
    """Return the quantization method from the configuration, else from the tensors; "" if none.

    An unknown method is returned by its name.
    """
    settings = config.get("quantization_config") or config.get("compression_config")
    if settings:
        if not isinstance(settings, Mapping):
            return "unknown"
        method = str(settings.get("quant_method", ""))
        if not method and settings.get("load_in_4bit") is not None:
            return "bitsandbytes"
        known = {"compressed_tensors": "compressed-tensors", "gptqmodel": "gptq"}
        return known.get(method, method) or "unknown"
    for name, info in tensors.items():
        if ".quant_state." in name or name.endswith((".SCB", ".absmax", ".quant_map")):
            return "bitsandbytes"
        if name.endswith((".qweight", ".qzeros")):
            return "gptq or awq"
        if name.endswith(".weight_packed"):
            return "compressed-tensors"
        if name.endswith(".weight_scale_2"):  # what ModelOpt wrote beside hf_quant_config.json
            return "modelopt"
        if info.dtype in FLOAT8:
            return "fp8"
    return ""


def read_layout(
    config: Mapping[str, JsonValue], tensors: Tensors, read: ReadBytes
) -> QuantizedLayout:
    """Return how each quantized weight is stored, and which tensors a plain checkpoint omits.

    Raises InputRefused for unsupported methods and variants, and for missing parts.
    """
    method = quantization_of(config, tensors)
    settings: Json = config.get("quantization_config") or config.get("compression_config") or {}
    if method not in _FINDERS:
        raise InputRefused(
            f"the base is quantized with {method!r}, which cannot be dequantized",
            hint=f"{HINT}; supported are {', '.join(sorted(_FINDERS))}",
        )
    stored = _Stored(config=config, settings=settings, tensors=tensors, read=read)
    found = {weight.name: weight for weight in _FINDERS[method](stored)}
    used = {part.name for weight in found.values() for part in weight.parts.values()}
    unused = {name for name in tensors.keys() - used if name.rpartition(".")[2] in _ACTIVATION}
    known = used | unused
    # Nothing may be left that looks quantized but belongs to no known weight.
    for name, info in tensors.items():
        if name in known:
            continue
        quantized = info.dtype in ("F4", "F6_E2M3", "F6_E3M2", *FLOAT8, "I8", "U8", "I32")
        if quantized and len(info.shape) > 1:
            raise _undecodable(f"{name} ({info.dtype}) is not part of a known {method} weight")
        if name in found:
            raise _undecodable(f"{name} is stored twice, plain and quantized")
    return QuantizedLayout(packed=found, dropped=frozenset(unused))


_FINDERS: dict[str, Callable[[_Stored], Iterator[Packed]]] = {
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
}
