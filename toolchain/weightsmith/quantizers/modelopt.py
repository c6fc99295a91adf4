"""FP8 and NVFP4 as NVIDIA's ModelOpt exports them, which is what TensorRT-LLM reads.

Each matrix has one scale, and another of its inputs, from calibration: the largest magnitude
divided by the largest number, 448 or 6 * 448. Matrices that engines fuse share both. With scales of
their own, TensorRT-LLM would round FP8 codes once more (FP8QDQLinearMethod.rescale_fused_weights in
its _torch/modules/linear.py), and from inputs it takes the largest scale anyway. NVFP4 has a third
per 16 weights.

Names, shapes and both configurations are those that ModelOpt 0.47 writes (export/quant_utils.py,
convert_hf_config.py). Of three architectures its NVFP4 has the same bytes. Its FP8 has a scale for
each of the fused matrices, and of 16 bits other codes in places, because it rounds the quotient to
these first. Scales of an 8-bit cache are not written: ModelOpt raises them to at least 1, which
is what TensorRT-LLM takes without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from weightsmith.core.errors import InputRefused
from weightsmith.core.values import Format
from weightsmith.forward.libraries import import_for_good
from weightsmith.models.facts import ModelFacts
from weightsmith.models.tensors import CheckpointTensors, array_type
from weightsmith.quantizers import checkpoints, running, writing
from weightsmith.quantizers.architectures import LLAMAS
from weightsmith.quantizers.matrices import Matrix, matrices, unquantized
from weightsmith.quantizers.modelopt_files import FP8, GROUP, NVFP4, write_companions
from weightsmith.quantizers.packed import PackedLayout, view_of
from weightsmith.quantizers.packed_check import checked
from weightsmith.quantizers.quantizer import Quantizer
from weightsmith.quantizers.rounded import FusedRows, options, shared_inputs
from weightsmith.quantizers.rounding import to_float8, to_nvfp4
from weightsmith.quantizers.schemes import SCHEMES

ARCHITECTURES = LLAMAS | {"MixtralForCausalLM", "Qwen3MoeForCausalLM"}
"""Those of WALKED for which TensorRT-LLM 1.2 has a model of its own that reads these names."""
_SCHEME = SCHEMES["fp8"]
"""For its blocks of rows."""
_LARGEST = {FP8.name: np.float32(448), NVFP4.name: np.float32(6 * 448)}
"""448 is float8_e4m3fn's (arXiv 2209.05433), 6 that of float4_e2m1."""


def scale_of(format_: Format, most: float) -> np.float32:
    """Return the scale that maps a largest magnitude to the largest number; 1 for zeros."""
    found = np.float32(most) / _LARGEST[format_.name]
    return found if found > 0 else np.float32(1)


def quantize(
    format_: Format, model: Path, out: Path, keep: Sequence[str], inputs: Mapping[str, float]
) -> None:
    """Write a model's checkpoint in one of ModelOpt's formats, except the matrices in `keep`.

    `inputs` has the largest magnitude of each module's inputs. Raises InputRefused for weights that
    are not finite, rows that NVFP4's groups do not divide, and what `without_kept` refuses.
    """
    source = CheckpointTensors(model)
    known = matrices(source, model)
    found = checkpoints.without_kept(known, keep)
    for matrix in found:
        if format_ == NVFP4 and matrix.inputs % GROUP:
            raise InputRefused(
                f"{matrix.module} has {matrix.inputs} inputs, no multiple of {GROUP}",
                hint="choose fp8-modelopt, which has a scale per matrix",
            )
    rows = FusedRows(source, _SCHEME, found, {})
    works = [_work(format_, matrix, rows) for matrix in found]
    for module, most in shared_inputs(found, inputs).items():
        works.append(_scalar(f"{module}.input_scale", scale_of(format_, most)))
    quantized = {matrix.tensor for matrix in found}
    works += [writing.copied(source, name) for name in source.names - quantized]
    writing.write_checkpoint(out, works)
    ignored = ["lm_head", *unquantized(source, known, found)]
    write_companions(format_, model, out, ignored)


def _work(format_: Format, matrix: Matrix, rows: FusedRows) -> writing.TensorGroup:
    """Return the work for a matrix: its codes and its scales."""
    name, four = f"{matrix.module}.weight", format_ == NVFP4
    count, width = matrix.outputs, matrix.inputs
    own, groups = f"{name}_scale_2" if four else f"{name}_scale", (count, width // GROUP)
    outputs = [
        writing.OutputTensor(name, "U8" if four else "F8_E4M3", (count, width // (1 + four))),
        writing.OutputTensor(own, "F32", ()),
    ]
    if four:
        outputs.append(writing.OutputTensor(f"{name}_scale", "F8_E4M3", groups))

    def blocks() -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
        scale = scale_of(format_, rows.most(matrix))
        yield own, np.array(scale, array_type("F32"))
        for block in rows.blocks(matrix):
            try:
                if four:
                    codes, scales = to_nvfp4(block, scale)
                    yield f"{name}_scale", scales
                    yield name, codes
                else:
                    yield name, to_float8(block, scale)
            except ValueError:
                raise checkpoints.not_finite(matrix.tensor) from None

    return writing.TensorGroup(tuple(outputs), blocks, matrix.fused)


def _scalar(name: str, value: np.float32) -> writing.TensorGroup:
    return writing.whole(name, "F32", (), partial(np.array, value, array_type("F32")))


def _check_input(format_: Format, model: ModelFacts) -> None:
    checkpoints.check_config(model, ARCHITECTURES)
    if format_ == NVFP4:
        checkpoints.check_rounded(replace(SCHEMES["nvfp4a16"], format=NVFP4), model)


def main() -> None:
    """Run in the builder: quantize as set in the settings file of the command line."""
    settings = running.read_settings()
    import_for_good()
    from weightsmith.quantizers.layerwise.maxima import input_maxima

    with running.refusals():
        found = matrices(CheckpointTensors(settings.model), settings.model)
        inputs = input_maxima(settings.model, running.texts(settings.calibration), found)
        format_ = NVFP4 if settings.method == NVFP4.name else FP8
        quantize(format_, settings.model, settings.out, settings.keep, inputs)


LAYOUTS = {
    FP8.name: PackedLayout(
        method="modelopt-fp8", bits=8, group_size=0, symmetric=True, inputs=True
    ),
    NVFP4.name: PackedLayout(
        method="modelopt-nvfp4", bits=4, group_size=GROUP, symmetric=True, inputs=True
    ),
}

QUANTIZER = Quantizer(
    name="modelopt",
    builder="merge",
    formats=(FP8, NVFP4),
    recipe_number=1,
    check_input=_check_input,
    steps=lambda request: running.python_step(
        __name__,
        request,
        f"rounding to {request.format.instead_of} in ModelOpt's layout, with scales of inputs",
        method=request.format.name,
    ),
    check=lambda request: checked(request, LAYOUTS[request.format.name], "modelopt"),
    peak_disk=lambda size, kept, format_, _options: checkpoints.output_bytes(size, kept, format_),
    options=options,
    check_options=checkpoints.check_kept,
    calibrated=lambda _format, _options: True,
    view=view_of,
    by_layer=True,
)

if __name__ == "__main__":
    main()
