"""Check a finished quantized checkpoint: complete, of the requested layout, near the original."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.checkpoints.tensors import CheckpointTensors
from weightsmith.errors import CheckFailed
from weightsmith.quantizers.checkpoints import LINEAR
from weightsmith.quantizers.packed import PARTS, Layout, PackedView
from weightsmith.quantizers.unquantized import is_kept
from weightsmith.values import Json

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Relative error of a matrix. Rounding to 4 bits in groups gives 0.07 to 0.14, GPTQ up to 0.26 and
# AWQ, which clips, up to 0.45 (measured on SmolLM2 and examples/tiny); a zeroed matrix gives 1, a
# permuted one more.
_MOST_ERROR = {4: 0.45, 8: 0.05}
_MOST_CLIPPED = 0.75
_MOST_KEPT = 0.01
"""For matrices kept in 16 bits, after rescaling; rounding to bfloat16 gives 0.002."""
_GAINS, _MAX_OFF = (0.4, 1.6), 0.05
"""Allowed gain of an output after clipping, and the fraction of outputs that may exceed it."""
_MAY_RESCALE = frozenset({"awq", "pack-quantized"})
_BEFORE_A_MATRIX = ("v_proj", "up_proj")
"""Their outputs are another matrix's inputs, so AWQ may scale them."""
_HINT = "quantize it again; if it fails again, use another format"


def check_checkpoint(
    folder: Path, model: Path, expected: Layout, keep: tuple[str, ...] = ()
) -> Mapping[str, Json]:
    """Return a quantized checkpoint's facts for the report; raises CheckFailed if a check fails.

    Checks: the layout; exactly the matrices of the decoder layers, except those in `keep`, are
    quantized; scales are finite and positive; each matrix is near the original; the other tensors
    are finite and complete; the checkpoint is smaller.
    """
    view, source = PackedView(folder), CheckpointTensors(model)
    if view.layout != expected:
        raise CheckFailed(
            f"{folder.name} has layout {view.layout}, expected {expected}",
            hint="check the quantizer's output",
        )
    linear = {n.removesuffix(".weight") for n in source.names if LINEAR.search(n)}
    quantizable = {n for n in linear if not is_kept(n, keep)}
    if view.modules != quantizable:
        odd = min(view.modules ^ quantizable)
        what = "is unexpectedly quantized" if odd in view.modules else "is not quantized"
        raise CheckFailed(f"{odd} {what}", hint=_HINT)
    if view.names != source.names:
        odd = min(view.names ^ source.names)
        raise CheckFailed(f"missing or extra tensor {odd}", hint=_HINT)
    errors = {}
    for module in sorted(view.modules):
        _check_scales(view, module)
        errors[module] = _check_near(view, source, module, expected)
    for name in sorted(view.names - {f"{m}.weight" for m in view.modules}):
        _check_rest(view, source, name, expected)
    stored = sum(view.tensors.info(n).size for n in view.tensors.names if n.endswith(PARTS))
    stored += sum(
        view.tensors.info(f"{m}.weight").size
        for m in view.modules
        if f"{m}.weight" in view.tensors.names
    )
    elements = sum(_count(source, f"{module}.weight") for module in view.modules)
    bits = stored * 8 / elements
    _check_size(bits, view, source, expected)
    worst = sorted(errors, key=lambda name: -errors[name])[:3]
    total = sum(_count(source, name) for name in source.names)
    return {
        "layout": view.layout.method,
        "group_size": view.layout.group_size,
        "quantized": len(view.modules),
        "kept": len(view.names) - len(view.modules),
        "size": view.tensors.size,
        "bits_per_weight": round(view.tensors.size * 8 / total, 3),
        "bits_per_quantized_weight": round(bits, 3),
        "weight_error": round(max(errors.values()), 4),
        "worst_weights": [{"name": name, "error": round(errors[name], 4)} for name in worst],
        "warnings": [],
    }


def _count(tensors: CheckpointTensors, name: str) -> int:
    count = 1
    for length in tensors.info(name).shape:
        count *= length
    return count


def _check_scales(view: PackedView, module: str) -> None:
    import numpy as np

    end = ".scales" if view.layout.method in {"awq", "gptq"} else ".weight_scale"
    scales = view.tensors.f32(module + end)
    if not bool(np.isfinite(scales).all()) or bool((scales <= 0).any()):
        raise CheckFailed(f"{module} has scales that are not finite and positive", hint=_HINT)
    if view.layout.inputs:
        fixed = view.tensors.f32(f"{module}.input_scale")
        if fixed.size != 1 or not bool(np.isfinite(fixed).all()) or float(fixed.min()) <= 0:
            raise CheckFailed(f"{module} has no finite, positive input scale", hint=_HINT)
    if view.layout.group_size and view.layout.method != "pack-quantized":
        rows = scales.shape[0]
        inputs = view.tensors.info(f"{module}.qweight").shape[0]
        inputs *= 8 if view.layout.method == "gptq" else 1
        if rows * view.layout.group_size != inputs:
            raise CheckFailed(
                f"{module} has {rows} groups for {inputs} inputs, but group_size is "
                f"{view.layout.group_size} in config.json",
                hint=_HINT,
            )


def _check_near(view: PackedView, source: CheckpointTensors, module: str, layout: Layout) -> float:
    import numpy as np

    found, before = view.tensor(f"{module}.weight"), source.f32(f"{module}.weight")
    if found.shape != before.shape:
        raise CheckFailed(f"{module} has shape {found.shape}, not {before.shape}", hint=_HINT)
    if not bool(np.isfinite(found).all()):
        raise CheckFailed(f"{module} has NaN or infinite weights", hint=_HINT)
    if layout.method in _MAY_RESCALE:
        free = module.endswith(_BEFORE_A_MATRIX)
        before = rescaled(before, found, outputs=free)
        if not free:
            _check_gains(before, found, module)
    norm = float(np.linalg.norm(before))
    error = float(np.linalg.norm(found - before)) / norm if norm else float(np.abs(found).max())
    limit = _MOST_CLIPPED if layout.method in _MAY_RESCALE else _MOST_ERROR[layout.bits]
    if not error <= limit:
        raise CheckFailed(
            f"{module} has a relative error of {error:.2f}, more than rounding to {layout.bits} "
            f"bits gives (limit {limit})",
            hint="the weights are damaged or packed in another order; " + _HINT,
        )
    return error


def _check_gains(
    before: npt.NDArray[np.float32], found: npt.NDArray[np.float32], module: str
) -> None:
    """Raise CheckFailed if outputs were scaled, which nothing after them would undo."""
    import numpy as np

    power = np.maximum((before * before).sum(1), 1e-30)
    gains = (before * found).sum(1) / power
    off = float(((gains < _GAINS[0]) | (gains > _GAINS[1])).mean())
    if off > _MAX_OFF:
        raise CheckFailed(
            f"{module}: {off:.0%} of its outputs are scaled by less than {_GAINS[0]} or more than "
            f"{_GAINS[1]}",
            hint="its scales are in another order; " + _HINT,
        )


def rescaled(
    before: npt.NDArray[np.float32], found: npt.NDArray[np.float32], *, outputs: bool
) -> npt.NDArray[np.float32]:
    """Return the matrix with the scales per input that minimise its distance to `found`.

    AWQ moves such scales into the preceding norm or matrix (arXiv 2306.00978, section 3.2), whose
    `outputs` are then scaled too; the remaining distance is rounding. Two rounds of least squares;
    a zeroed matrix stays unchanged.
    """
    import numpy as np

    near = before
    for _ in range(2):
        for axis in (0, 1) if outputs else (0,):
            power = (near * near).sum(axis, keepdims=True)
            factor = (near * found).sum(axis, keepdims=True) / np.maximum(power, 1e-30)
            near = near * np.where(factor > 0, factor, 1.0)
    return np.asarray(near, np.float32)


def _check_rest(view: PackedView, source: CheckpointTensors, name: str, layout: Layout) -> None:
    import numpy as np

    found: Any = view.tensors.info(name)
    own = source.info(name)
    if (found.dtype, found.shape) != (own.dtype, own.shape):
        raise CheckFailed(
            f"{name} is {found.dtype} {found.shape}, not {own.dtype} {own.shape}", hint=_HINT
        )
    if not bool(np.isfinite(view.tensors.f32(name)).all()):
        raise CheckFailed(f"{name} has NaN or infinite weights", hint=_HINT)
    # AWQ moves scales into norms, biases and kept matrices. Embeddings and head must not change,
    # and with other engines no unquantized tensor.
    if bool((view.tensors.array(name) == source.array(name)).all()):
        return
    may = layout.method in _MAY_RESCALE
    if may and ("norm" in name or name.endswith(".bias")):
        return
    if may and LINEAR.search(name):
        before, after = source.f32(name), view.tensors.f32(name)
        before = rescaled(
            before, after, outputs=name.removesuffix(".weight").endswith(_BEFORE_A_MATRIX)
        )
        if float(np.linalg.norm(after - before)) <= _MOST_KEPT * float(np.linalg.norm(before)):
            return
    raise CheckFailed(f"{name} was unexpectedly changed", hint=_HINT)


def _check_size(bits: float, view: PackedView, source: CheckpointTensors, expected: Layout) -> None:
    # A scale and a zero point per group, and an index per input in GPTQ's layout.
    most = expected.bits + (32 / expected.group_size if expected.group_size else 0) + 1
    if bits > most or view.tensors.size >= source.size:
        raise CheckFailed(
            f"the quantized matrices have {bits:.2f} bits per weight (limit {most:.2f}); the "
            f"checkpoint has {source.size} bytes, the result {view.tensors.size}",
            hint=_HINT,
        )
