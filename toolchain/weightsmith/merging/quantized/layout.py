"""Map the stored tensors of a quantized checkpoint to its weights; no torch, no dequantization."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import JsonValue
from weightsmith.merging.quantized.packed import (
    DTYPES,
    FLOAT8,
    HINT,
    Packed,
    ReadBytes,
    Tensors,
    modules,
    part,
    plain_dtype,
    some,
    undecodable,
)
from weightsmith.models.safetensors import TensorInfo


def compressed(
    config: Mapping[str, JsonValue], settings: Mapping[str, Any], tensors: Tensors, read: ReadBytes
) -> Iterator[Packed]:
    """Yield the weights that compressed-tensors stores."""
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise undecodable("sparse weights are not supported")
    dtype = plain_dtype(config)
    for module in modules(tensors, ".weight_packed"):
        packed = tensors[f"{module}.weight_packed"]
        scale = part(tensors, f"{module}.weight_scale")
        parts = {"weight": packed, "scale": scale}
        parts |= some(
            tensors,
            module,
            zeros="weight_zero_point",
            groups="weight_g_idx",
            global_scale="weight_global_scale",
            shape="weight_shape",
        )
        if packed.dtype == "I32":
            shape = _int64s(read(part(tensors, f"{module}.weight_shape")))
            bits = _bits(packed.shape[-1], shape[-1], module)
            yield Packed(
                name=f"{module}.weight",
                scheme="ct-packed",
                shape=shape,
                dtype=dtype,
                parts=parts,
                options={"bits": bits},
            )
        elif packed.dtype == "U8" and scale.dtype == "F8_E4M3" and "global_scale" in parts:
            shape = (*packed.shape[:-1], packed.shape[-1] * 2)
            yield Packed(
                name=f"{module}.weight", scheme="nvfp4", shape=shape, dtype=dtype, parts=parts
            )
        else:
            raise undecodable(f"{packed.name} has the unsupported packed dtype {packed.dtype}")
    for name, info in tensors.items():
        if name.endswith(".weight") and info.dtype in ("I8", *FLOAT8):
            yield _scaled(name, info, tensors, dtype, _block_structure(settings))


def _block_structure(settings: Mapping[str, Any]) -> Any:
    groups = (settings.get("config_groups") or {}).values()
    weights = [group.get("weights") or {} for group in groups if isinstance(group, Mapping)]
    return next((w["block_structure"] for w in weights if w.get("block_structure")), None)


def fp8(
    config: Mapping[str, JsonValue], settings: Mapping[str, Any], tensors: Tensors, _read: ReadBytes
) -> Iterator[Packed]:
    """Yield the weights stored as 8-bit floats."""
    block = settings.get("weight_block_size")
    for name, info in tensors.items():
        if info.dtype in FLOAT8:
            yield _scaled(name, info, tensors, plain_dtype(config), block)


def _scaled(name: str, info: TensorInfo, tensors: Tensors, dtype: str, block: Any = None) -> Packed:
    """Describe an 8-bit weight with a scale per tensor, row, group or block."""
    module = name.removesuffix(".weight")
    stem = f"{module}.weight" if name.endswith(".weight") else name
    parts = {"weight": info}
    for suffix in ("_scale_inv", "_scale"):
        if scale := tensors.get(f"{stem}{suffix}"):
            parts["scale"] = scale
            break
    else:
        raise undecodable(f"{name} ({info.dtype}) has no scale")
    parts |= some(tensors, module, zeros="weight_zero_point", groups="weight_g_idx")
    return Packed(
        name=name,
        scheme="scaled",
        shape=info.shape,
        dtype=dtype,
        parts=parts,
        options={"block": list(block) if block else None},
    )


def mxfp4(
    config: Mapping[str, JsonValue], _settings: Any, tensors: Tensors, _read: ReadBytes
) -> Iterator[Packed]:
    """Yield the experts stored as MXFP4."""
    for name in modules(tensors, "_blocks"):
        parts = {"weight": tensors[f"{name}_blocks"], "scale": part(tensors, f"{name}_scales")}
        shape = parts["weight"].shape
        if len(shape) != 4 or shape[:3] != parts["scale"].shape:
            raise undecodable(f"{name}_blocks has the unexpected shape {list(shape)}")
        # transformers stores experts as (expert, in, out).
        yield Packed(
            name=name,
            scheme="mxfp4",
            shape=(shape[0], shape[2] * shape[3] * 2, shape[1]),
            dtype=plain_dtype(config),
            parts=parts,
        )


def _bits(words: int, columns: int, module: str) -> int:
    """Return the bits per code of `columns` codes packed in 32-bit words without gaps."""
    for bits in range(2, 9):
        if words == -(-columns * bits // 32):
            return bits
    raise undecodable(f"{module}.weight_packed has {words} words for {columns} columns")


def _int64s(data: bytes) -> tuple[int, ...]:
    return tuple(
        int.from_bytes(data[i : i + 8], "little", signed=True) for i in range(0, len(data), 8)
    )


def gptq(
    config: Mapping[str, JsonValue], settings: Mapping[str, Any], tensors: Tensors, _read: ReadBytes
) -> Iterator[Packed]:
    """Yield the weights that GPTQ quantized."""
    bits = int(settings.get("bits", 4))
    form = str(settings.get("checkpoint_format", "gptq"))
    if form not in ("gptq", "gptq_v2"):
        raise undecodable(f"unsupported GPTQ format {form!r}, packed for one kernel")
    for module in modules(tensors, ".qweight"):
        parts = _integer_parts(tensors, module)
        if "groups" not in parts and settings.get("desc_act"):
            raise undecodable(f"{module} has no g_idx, but the configuration sets desc_act")
        rows, columns = parts["weight"].shape
        yield Packed(
            name=f"{module}.weight",
            scheme="gptq",
            shape=(columns, rows * 32 // bits),
            dtype=plain_dtype(config, parts["scale"].dtype),
            parts=parts,
            options={
                "bits": bits,
                "group_size": int(settings.get("group_size", -1)),
                # The first format stores zero points minus one.
                "zero_offset": 1 if form == "gptq" else 0,
            },
        )


def awq(
    config: Mapping[str, JsonValue], settings: Mapping[str, Any], tensors: Tensors, _read: ReadBytes
) -> Iterator[Packed]:
    """Yield the weights that AWQ quantized."""
    form, bits = str(settings.get("version", "gemm")).lower(), int(settings.get("bits", 4))
    if form not in ("gemm", "gemv") or bits != 4:
        raise undecodable(
            f"unsupported AWQ version {form!r} with {bits} bits, packed for one kernel"
        )
    group = int(settings.get("group_size", settings.get("q_group_size", -1)))
    for module in modules(tensors, ".qweight"):
        parts = _integer_parts(tensors, module)
        first, second = parts["weight"].shape
        shape = (second * 8, first) if form == "gemm" else (first, second * 8)
        size = group if group > 0 else shape[1]
        if form == "gemv" and (shape[1] % size or parts["scale"].shape[-1] < shape[1] // size):
            raise undecodable(
                f"{module} has {shape[1]} inputs, not a multiple of the group size {size}"
            )
        yield Packed(
            name=f"{module}.weight",
            scheme=f"awq-{form}",
            shape=shape,
            dtype=plain_dtype(config, parts["scale"].dtype),
            parts=parts,
            options={"bits": bits, "group_size": size},
        )


def _integer_parts(tensors: Tensors, module: str) -> dict[str, TensorInfo]:
    parts = {
        "weight": part(tensors, f"{module}.qweight"),
        "zeros": part(tensors, f"{module}.qzeros"),
        "scale": part(tensors, f"{module}.scales"),
    }
    if parts["weight"].dtype != "I32" or len(parts["weight"].shape) != 2:
        raise undecodable(f"{module}.qweight has dtype {parts['weight'].dtype}, not int32")
    groups = tensors.get(f"{module}.g_idx")
    return parts | ({"groups": groups} if groups else {})


def bitsandbytes(
    config: Mapping[str, JsonValue], _settings: Any, tensors: Tensors, read: ReadBytes
) -> Iterator[Packed]:
    """Yield the quantized weights."""
    mark = ".quant_state.bitsandbytes__"
    for name, info in tensors.items():
        if mark in name:
            yield _bnb_4bit(name.partition(mark)[0], info, tensors, read)
        elif name.endswith(".SCB"):
            module = name.removesuffix(".SCB")
            weight = part(tensors, f"{module}.weight")
            parts = {"weight": weight, "scale": info}
            if form := tensors.get(f"{module}.weight_format"):
                parts["format"] = form
                if any(read(form)[:1]):
                    raise undecodable(f"{module}.weight has another row order than plain int8")
            yield Packed(
                name=weight.name,
                scheme="bnb-int8",
                shape=weight.shape,
                dtype=plain_dtype(config, "F16"),
                parts=parts,
            )


def _bnb_4bit(name: str, state: TensorInfo, tensors: Tensors, read: ReadBytes) -> Packed:
    try:
        settings = parse(read(state))
        shape, dtype = tuple(int(n) for n in settings["shape"]), DTYPES[settings["dtype"]]
        options = {"kind": str(settings["quant_type"]), "blocksize": int(settings["blocksize"])}
    except (ValueError, KeyError, TypeError) as error:
        raise undecodable(f"{state.name} cannot be read: {error}") from error
    parts = {"weight": part(tensors, name), "state": state}
    parts |= {"absmax": part(tensors, f"{name}.absmax")}
    parts |= {"code": part(tensors, f"{name}.quant_map")}
    if "nested_blocksize" in settings:
        parts |= {
            "nested_absmax": part(tensors, f"{name}.nested_absmax"),
            "nested_code": part(tensors, f"{name}.nested_quant_map"),
        }
        options |= {
            "nested_blocksize": int(settings["nested_blocksize"]),
            "nested_offset": float(settings["nested_offset"]),
        }
    codes = parts["weight"].size * 2
    if codes - math.prod(shape) not in (0, 1) or options["kind"] not in ("nf4", "fp4"):
        raise undecodable(f"{name} has {codes} codes for shape {list(shape)}")
    return Packed(
        name=name,
        scheme="bnb-4bit",
        shape=shape,
        dtype=dtype,
        parts=parts,
        options=options,
    )


_ACTIVATION = ("input_scale", "activation_scale", "output_scale", "k_scale", "v_scale", "q_scale")
_ACTIVATION_MORE = ("input_zero_point", "input_global_scale", "input_scale_ub")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedLayout:
    """The quantized weights and unused tensors of a checkpoint."""

    method: str
    """Its name in config.json, such as `bitsandbytes`."""
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
        method = str(settings.get("quant_method", "")) if isinstance(settings, Mapping) else ""
        known = {"compressed_tensors": "compressed-tensors", "gptqmodel": "gptq"}
        if (
            not method
            and isinstance(settings, Mapping)
            and settings.get("load_in_4bit") is not None
        ):
            return "bitsandbytes"
        return known.get(method, method) or "unknown"
    for name, info in tensors.items():
        if ".quant_state." in name or name.endswith((".SCB", ".absmax", ".quant_map")):
            return "bitsandbytes"
        if name.endswith((".qweight", ".qzeros")):
            return "gptq or awq"
        if name.endswith(".weight_packed"):
            return "compressed-tensors"
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
    settings = config.get("quantization_config") or config.get("compression_config") or {}
    find = _FINDERS.get(method)
    if find is None:
        raise InputRefused(
            f"the base is quantized with {method!r}, which cannot be dequantized",
            hint=f"{HINT}; supported are {', '.join(sorted(_FINDERS))}",
        )
    found = {weight.name: weight for weight in find(config, settings, tensors, read)}
    used = {part.name for weight in found.values() for part in weight.parts.values()}
    unused = {
        name
        for name in tensors.keys() - used
        if name.rpartition(".")[2] in (*_ACTIVATION, *_ACTIVATION_MORE)
    }
    _check_rest(tensors, used | unused, found, method)
    return QuantizedLayout(method=method, packed=found, dropped=frozenset(unused))


def _check_rest(tensors: Tensors, used: set[str], found: Mapping[str, Packed], method: str) -> None:
    """Refuse tensors that look quantized but belong to no known weight."""
    for name, info in tensors.items():
        if name in used:
            continue
        quantized = info.dtype in ("F4", "F6_E2M3", "F6_E3M2", *FLOAT8, "I8", "U8", "I32")
        if quantized and len(info.shape) > 1:
            raise undecodable(f"{name} ({info.dtype}) is not part of a known {method} weight")
        if name in found:
            raise undecodable(f"{name} is stored twice, plain and quantized")


_Finder = Callable[[Mapping[str, Any], Any, Tensors, ReadBytes], Iterator[Packed]]
_FINDERS: dict[str, _Finder] = {
    "bitsandbytes": bitsandbytes,
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed,
    "fp8": fp8,
    "fbgemm_fp8": fp8,
    "mxfp4": mxfp4,
}
