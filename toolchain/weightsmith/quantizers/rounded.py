"""FP8 and int8 without calibration: weights are rounded with a scale per row, tensor by tensor.

The layouts are compressed-tensors 0.19's `float-quantized` and `int-quantized` with a scale per
output channel; servers scale activations per token (llm-compressor's FP8_DYNAMIC and W8A8 schemes).
The model is not loaded, so the checkpoint may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.checkpoints.tensors import CheckpointTensors, array_type
from weightsmith.quantizers.checkpoints import (
    DENSE,
    LINEAR,
    check_config,
    output_bytes,
    write_companions,
)
from weightsmith.quantizers.packed import Layout, view_of
from weightsmith.quantizers.packed_check import check_checkpoint
from weightsmith.quantizers.quantizer import Quantizer, QuantizeRequest, Step
from weightsmith.quantizers.running import python_step, read_settings
from weightsmith.quantizers.unquantized import keep_option, kept_modules
from weightsmith.quantizers.writing import Output, write_checkpoint
from weightsmith.values import FP8, Format, Json

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

W8A8 = Format(name="w8a8", kind="compressed-tensors", bits_per_weight=8.0)

_LARGEST = {"fp8": 448.0, "w8a8": 127.0}
"""Largest value of float8_e4m3fn (arXiv 2209.05433) and of int8 without -128."""
_TYPES = {"fp8": "F8_E4M3", "w8a8": "I8"}
_LAYOUTS = {"fp8": "float-quantized", "w8a8": "int-quantized"}


def options(_format: Format, requested: Mapping[str, Json]) -> Mapping[str, Json]:
    """Return the recipe's options that affect the output."""
    return {"keep": keep_option(requested)}


def steps(request: QuantizeRequest) -> tuple[Step, ...]:
    """Return the step, which runs this module."""
    name = request.format.name
    keep = request.options.get("keep", [])
    return (python_step(__name__, request, f"rounding to {name}", method=name, keep=keep),)


def check(request: QuantizeRequest) -> Mapping[str, Json]:
    """Check the finished checkpoint against the original; raises CheckFailed."""
    method = _LAYOUTS[request.format.name]
    layout = Layout(method=method, bits=8, group_size=0, symmetric=True)
    keep = tuple(request.options.get("keep", ()))
    return {**check_checkpoint(request.output, request.model, layout, keep), "engine": "rounded"}


def rounded(
    weight: npt.NDArray[np.float32], method: str
) -> tuple[npt.NDArray[Any], npt.NDArray[np.float32]]:
    """Return a matrix [out, in] in 8 bits and its scales [out, 1]: W = q s, ties to even.

    s is the row's largest magnitude divided by the type's largest value; 1 for a row of zeros.
    """
    import numpy as np

    most = _LARGEST[method]
    scale = np.abs(weight).max(1, keepdims=True) / np.float32(most)
    scale = np.where(scale > 0, scale, np.float32(1)).astype(np.float32)
    scaled = np.clip(weight / scale, -most, most)
    if method == "w8a8":
        scaled = np.rint(scaled)
    return scaled.astype(array_type(_TYPES[method])), scale


def quantization(method: str, ignored: list[str]) -> dict[str, Json]:
    """Return compressed-tensors' quantization_config."""
    kind = "float" if method == "fp8" else "int"
    common = {"num_bits": 8, "type": kind, "symmetric": True}
    weights = {**common, "strategy": "channel", "dynamic": False}
    activations = {**common, "strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": _LAYOUTS[method],
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": activations,
            }
        },
        "ignore": ["lm_head", *ignored],
    }


def main() -> None:
    """Run in the builder: quantize as set in the settings file of the command line."""
    settings = read_settings()
    method, model, out = settings["method"], Path(settings["model"]), Path(settings["out"])
    source, ignored = CheckpointTensors(model), kept_modules(model, settings["keep"])
    outputs: list[Output] = []
    for name in sorted(source.names):
        info = source.info(name)
        if LINEAR.search(name) and name.removesuffix(".weight") not in ignored:
            outputs += _quantized(source, name, method)
            continue
        outputs.append(Output(name, info.dtype, info.shape, partial(source.array, name)))
    write_checkpoint(out, outputs)
    write_companions(model, out, quantization(method, ignored))


def _quantized(source: CheckpointTensors, name: str, method: str) -> tuple[Output, Output]:
    rows, columns = source.info(name).shape
    return (
        Output(name, _TYPES[method], (rows, columns), lambda: rounded(source.f32(name), method)[0]),
        Output(name + "_scale", "F32", (rows, 1), lambda: rounded(source.f32(name), method)[1]),
    )


QUANTIZER = Quantizer(
    name="rounded",
    builder="merge",
    formats=(FP8, W8A8),
    recipe_number=1,
    check_input=lambda _format, model: check_config(model, DENSE),
    steps=steps,
    check=check,
    peak_disk=lambda size, kept, format_, _options: output_bytes(size, kept, format_),
    options=options,
    view=view_of,
)

if __name__ == "__main__":
    main()
