"""FP8 as NVIDIA's ModelOpt exports it, which is what TensorRT-LLM reads: rounded after a walk.

Each matrix has one scale, and another of its inputs, from calibration: the largest magnitude
divided by 448. Matrices that engines fuse share both. With scales of their own, TensorRT-LLM would
round their codes once more (FP8QDQLinearMethod.rescale_fused_weights in its
_torch/modules/linear.py), and from inputs it takes the largest scale anyway.

Names, shapes and both configurations are those that ModelOpt 0.47 writes (export/quant_utils.py,
convert_hf_config.py). Its codes differ in rare cases, because it rounds a quotient to the weights'
16 bits first. Scales of an 8-bit cache are not written: ModelOpt raises them to at least 1, which
is what TensorRT-LLM takes without them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from weightsmith.core.values import Format, JsonValue
from weightsmith.forward.libraries import import_for_good
from weightsmith.models.facts import ModelFacts
from weightsmith.models.tensors import CheckpointTensors, array_type
from weightsmith.quantizers import checkpoints, running, writing
from weightsmith.quantizers.architectures import LLAMAS
from weightsmith.quantizers.matrices import Matrix, matrices, unquantized
from weightsmith.quantizers.packed import PackedLayout, view_of
from weightsmith.quantizers.packed_check import checked
from weightsmith.quantizers.quantizer import Quantizer
from weightsmith.quantizers.rounded import FusedRows, options, shared_inputs
from weightsmith.quantizers.rounding import to_float8
from weightsmith.quantizers.schemes import SCHEMES

FORMAT = Format(name="fp8-modelopt", kind="modelopt-fp8", bits_per_weight=8.0, instead_of="fp8")
ARCHITECTURES = LLAMAS | {"MixtralForCausalLM", "Qwen3MoeForCausalLM"}
"""Those of WALKED for which TensorRT-LLM 1.2 has a model of its own that reads these names."""
_SCHEME = SCHEMES["fp8"]
"""For its blocks of rows."""
_LARGEST = np.float32(448)
"""Of float8_e4m3fn (arXiv 2209.05433)."""


def config(ignored: Sequence[str]) -> dict[str, JsonValue]:
    """Return config.json's quantization_config; `ignored` modules stay in 16 bits."""
    eight: JsonValue = {"num_bits": 8, "type": "float", "dynamic": False}
    group: JsonValue = {"targets": ["Linear"], "weights": eight, "input_activations": eight}
    return {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "config_groups": {"group_0": group},
        "ignore": list(ignored),
        "producer": _PRODUCER,
    }


_PRODUCER: Mapping[str, JsonValue] = {"name": "modelopt", "version": "weightsmith"}
"""Readers look for that name, which stands for the layout."""


def hf_quant_config(ignored: Sequence[str]) -> dict[str, JsonValue]:
    """Return hf_quant_config.json, from which TensorRT-LLM knows how a checkpoint is quantized."""
    told: JsonValue = {
        "quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": list(ignored),
    }  # fmt: skip
    return {"producer": _PRODUCER, "quantization": told}


def scale_of(most: float) -> np.float32:
    """Return the scale that maps a largest magnitude to the largest code; 1 for zeros."""
    found = np.float32(most) / _LARGEST
    return found if found > 0 else np.float32(1)


def quantize(model: Path, out: Path, keep: Sequence[str], inputs: Mapping[str, float]) -> None:
    """Write a model's checkpoint in ModelOpt's FP8, except the matrices in `keep`.

    `inputs` has the largest magnitude of each module's inputs. Raises InputRefused for weights that
    are not finite, and what `without_kept` refuses.
    """
    source = CheckpointTensors(model)
    known = matrices(source, model)
    found = checkpoints.without_kept(known, keep)
    rows = FusedRows(source, _SCHEME, found, {})
    works = [_work(matrix, rows) for matrix in found]
    for module, most in shared_inputs(found, inputs).items():
        works.append(_scalar(f"{module}.input_scale", most))
    quantized = {matrix.tensor for matrix in found}
    works += [writing.copied(source, name) for name in source.names - quantized]
    writing.write_checkpoint(out, works)
    ignored = ["lm_head", *unquantized(source, known, found)]
    checkpoints.write_companions(model, out, config(ignored))
    text = json.dumps(hf_quant_config(ignored), indent=2, sort_keys=True) + "\n"
    (out / "hf_quant_config.json").write_text(text, encoding="utf-8")


def _work(matrix: Matrix, rows: FusedRows) -> writing.TensorGroup:
    """Return the work for a matrix: its codes and its scale."""
    name = f"{matrix.module}.weight"
    outputs = (
        writing.OutputTensor(name, "F8_E4M3", (matrix.outputs, matrix.inputs)),
        writing.OutputTensor(f"{name}_scale", "F32", ()),
    )

    def blocks() -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
        scale = scale_of(rows.most(matrix))
        yield f"{name}_scale", np.array(scale, array_type("F32"))
        for block in rows.blocks(matrix):
            try:
                yield name, to_float8(block, scale)
            except ValueError:
                raise checkpoints.not_finite(matrix.tensor) from None

    return writing.TensorGroup(outputs, blocks, matrix.fused)


def _scalar(name: str, most: float) -> writing.TensorGroup:
    return writing.whole(name, "F32", (), partial(np.array, scale_of(most), array_type("F32")))


def _check_input(_format: Format, model: ModelFacts) -> None:
    checkpoints.check_config(model, ARCHITECTURES)


def main() -> None:
    """Run in the builder: quantize as set in the settings file of the command line."""
    settings = running.read_settings()
    import_for_good()
    from weightsmith.quantizers.layerwise.maxima import input_maxima

    with running.refusals():
        found = matrices(CheckpointTensors(settings.model), settings.model)
        inputs = input_maxima(settings.model, running.texts(settings.calibration), found)
        quantize(settings.model, settings.out, settings.keep, inputs)


LAYOUT = PackedLayout(method="modelopt-fp8", bits=8, group_size=0, symmetric=True, inputs=True)

QUANTIZER = Quantizer(
    name="modelopt",
    builder="merge",
    formats=(FORMAT,),
    recipe_number=1,
    check_input=_check_input,
    steps=lambda request: running.python_step(
        __name__, request, "rounding to FP8 in ModelOpt's layout, with scales of inputs"
    ),
    check=lambda request: checked(request, LAYOUT, "modelopt"),
    peak_disk=lambda size, kept, format_, _options: checkpoints.output_bytes(size, kept, format_),
    options=options,
    check_options=checkpoints.check_kept,
    calibrated=lambda _format, _options: True,
    view=view_of,
    by_layer=True,
)

if __name__ == "__main__":
    main()
