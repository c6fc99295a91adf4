"""Weights of bitsandbytes: 4 bits with their state, and int8 (`functional.QuantState`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from weightsmith.core.safe_parse import parse
from weightsmith.merging.quantized.packed import (
    DTYPES,
    Packed,
    ReadBytes,
    Tensors,
    part,
    plain_dtype,
    undecodable,
)
from weightsmith.models.safetensors import TensorInfo


def bitsandbytes(
    config: Mapping[str, Any], _settings: Any, tensors: Tensors, read: ReadBytes
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
