"""Check a finished quantized checkpoint: complete, of the requested layout, near the original."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from weightsmith.core.errors import CheckFailed
from weightsmith.core.values import JsonValue
from weightsmith.models.facts import ModelFacts, read_facts
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers.checkpoints import LINEAR, is_kept
from weightsmith.quantizers.matrices import Floats, Matrix, matrices
from weightsmith.quantizers.packed import FLOAT4, PARTS, PackedLayout, PackedView, view_of
from weightsmith.quantizers.quantizer import QuantizeRequest

# Relative error of a matrix. Rounding to 4 bits in groups gives 0.07 to 0.14, GPTQ up to 0.26 and
# AWQ, which clips, up to 0.45 (measured on SmolLM2 and examples/tiny); a zeroed matrix gives 1, a
# permuted one more.
_MOST_ERROR = {2: 0.9, 3: 0.6, 4: 0.45, 5: 0.25, 8: 0.05}
_MOST_FLOAT4 = 0.2
"""For 4-bit floats: 0.09 to 0.13 with normally distributed weights."""
_EXPERT = re.compile(r".*\.experts\.\d+(?=\.)")
_BLOCK = 1 << 20
"""Weights, or bytes, compared at a time."""
_MOST_CLIPPED = 0.75
_MOST_KEPT = 0.01
"""For matrices kept in 16 bits, after rescaling; rounding to bfloat16 gives 0.002."""
_GAINS, _MAX_OFF = (0.4, 1.6), 0.05
"""Allowed gain of an output after clipping, and the fraction of outputs that may exceed it."""
_READ_ONCE = {
    "nvfp4-pack-quantized": ("weight_global_scale",),
    "modelopt-fp8": ("weight_scale",),
    "modelopt-nvfp4": ("weight_scale_2",),
}
"""Layout -> scales of which engines read one for matrices that they fuse."""
_BEFORE_A_MATRIX = ("v_proj", "up_proj", "w3")
"""Their outputs are another matrix's inputs, so AWQ may scale them."""
_HINT = "quantize it again; if it fails again, use another format"


def check_checkpoint(
    folder: Path,
    model: Path,
    expected: PackedLayout | Mapping[str, PackedLayout],
    keep: tuple[str, ...] = (),
) -> Mapping[str, JsonValue]:
    """Return a quantized checkpoint's facts for the report; raises CheckFailed if a check fails.

    Checks: the layout; exactly the matrices of the decoder layers, except those in `keep`, are
    quantized; scales are finite and positive; each matrix is near the original; the other tensors
    are finite and complete; the checkpoint is smaller.
    """
    rescaled = isinstance(expected, PackedLayout) and expected.rescaled
    view, source = view_of(folder, model, rescaled=rescaled), CheckpointTensors(model)
    if (view.layouts or view.layout) != expected:
        raise CheckFailed(
            f"{folder.name} has layout {view.layout}, expected {expected}"
            if isinstance(expected, PackedLayout)
            else f"{folder.name} has not the layouts that were chosen for its matrices",
            hint="check the quantizer's output",
        )
    known = matrices(source, model)
    _check_expected(source, model, known)
    found = {m.module: m for m in known if not is_kept(m.module, keep)}
    if view.modules != found.keys():
        odd = min(view.modules ^ found.keys())
        what = "is unexpectedly quantized" if odd in view.modules else "is not quantized"
        raise CheckFailed(f"{odd} {what}", hint=_HINT)
    if view.names != source.names:
        odd = min(view.names ^ source.names)
        raise CheckFailed(f"missing or extra tensor {odd}", hint=_HINT)
    errors = {}
    for module, matrix in sorted(found.items()):
        _check_scales(view, matrix)
        errors[module] = _check_near(view, source, matrix)
    _check_fused_scales(view, found.values())
    for name in sorted(source.names - {matrix.tensor for matrix in found.values()}):
        _check_rest(view, source, name)
    codes = {f"{module}.weight" for module in view.modules}
    parts = (n for n in view.tensors.names if n.endswith(PARTS) or n in codes)
    elements = sum(matrix.outputs * matrix.inputs for matrix in found.values())
    bits = sum(view.tensors.info(name).size for name in parts) * 8 / elements
    # A scale and a zero point per group or row, and an index per input in GPTQ's layout.
    layouts = [(view.of(module), matrix.inputs) for module, matrix in found.items()]
    most = max(one.bits + 32 / (one.group_size or row) for one, row in layouts) + 1
    if bits > most or view.tensors.size >= source.size:
        raise CheckFailed(
            f"the quantized matrices have {bits:.2f} bits per weight (limit {most:.2f}); the "
            f"checkpoint has {source.size} bytes, the result {view.tensors.size}",
            hint=_HINT,
        )
    worst = sorted(errors, key=lambda name: -errors[name])[:3]
    total = sum(math.prod(source.info(name).shape) for name in source.names)
    return {
        "layout": view.layout.method,
        "group_size": view.layout.group_size,
        "quantized": len(view.modules),
        "kept": len(source.names - {matrix.tensor for matrix in found.values()}),
        "size": view.tensors.size,
        "bits_per_weight": round(view.tensors.size * 8 / total, 3),
        "bits_per_quantized_weight": round(bits, 3),
        "weight_error": round(max(errors.values()), 4),
        "worst_weights": [{"name": name, "error": round(errors[name], 4)} for name in worst],
        **_worst_experts(errors),
        "warnings": [],
    }


def checked(request: QuantizeRequest, layout: PackedLayout, engine: str) -> dict[str, JsonValue]:
    """Return the facts of a step's finished checkpoint; raises CheckFailed if a check fails."""
    found = check_checkpoint(request.output, request.model, layout, request.keep)
    return {**found, "engine": engine}


def _check_expected(source: CheckpointTensors, model: Path, known: Iterable[Matrix]) -> None:
    """Raise CheckFailed if the writer's rule and the check's differ about this checkpoint."""
    wanted, written = expected(source, read_facts(model)), {matrix.tensor for matrix in known}
    if different := wanted ^ written:
        odd = min(different)
        what = "stays in 16 bits" if odd in wanted else "is quantized"
        raise CheckFailed(
            f"{odd} {what}, against what is known of this architecture",
            hint="this is a defect of weightsmith, not of the model: report it, and serve it in 16 "
            "bits (target vllm) until then",
        )


def _worst_experts(errors: Mapping[str, float]) -> Mapping[str, JsonValue]:
    """Return the experts of the largest errors, each by its worst matrix; {} without experts."""
    experts: dict[str, float] = {}
    for module, error in errors.items():
        if match := _EXPERT.match(module):
            experts[match[0]] = max(experts.get(match[0], 0.0), error)
    worst = sorted(experts, key=lambda name: (-experts[name], name))[:3]
    found: JsonValue = [{"name": name, "error": round(experts[name], 4)} for name in worst]
    return {"experts": len(experts), "worst_experts": found} if experts else {}


def _check_scales(view: PackedView, matrix: Matrix) -> None:
    module, layout = matrix.module, view.of(matrix.module)
    scales = view.scales(module)
    if not bool(np.isfinite(scales).all()) or bool((scales <= 0).any()):
        raise CheckFailed(f"{module} has scales that are not finite and positive", hint=_HINT)
    if layout.inputs:
        fixed = view.tensors.f32(f"{module}{layout.input_scale}")
        if fixed.size != 1 or not bool(np.isfinite(fixed).all()) or float(fixed.min()) <= 0:
            raise CheckFailed(f"{module} has no finite, positive input scale", hint=_HINT)
    if layout.method in {"awq", "gptq"}:
        groups, needed = [len(scales)], [matrix.inputs // layout.group_size]
    else:
        width = layout.group_size or matrix.inputs
        groups = list(scales.shape)
        needed = [-(-matrix.outputs // layout.outputs), -(-matrix.inputs // width)]
        if groups == [1, 1] and not layout.group_size:  # one for the whole matrix
            needed = groups
    if groups != needed:
        raise CheckFailed(
            f"{module} has {groups} groups for {matrix.inputs} inputs, but group_size is "
            f"{layout.group_size} in config.json",
            hint=_HINT,
        )


def _check_fused_scales(view: PackedView, found: Iterable[Matrix]) -> None:
    """Raise CheckFailed if fused matrices differ in the scale that engines read only once."""
    parts = [*_READ_ONCE.get(view.layout.method, ())]
    if parts and view.layout.inputs:
        parts.append(view.layout.input_scale.removeprefix("."))
    known: dict[tuple[str, str], tuple[str, float]] = {}
    for matrix in found:
        for part in parts:
            scale = float(view.tensors.f32(f"{matrix.module}.{part}").reshape(-1)[0])
            module, first = known.setdefault((matrix.fused, part), (matrix.module, scale))
            if scale != first:
                raise CheckFailed(
                    f"{module} and {matrix.module} have different global scales ({part}), and"
                    " engines fuse them",
                    hint=_HINT,
                )


def _check_near(view: PackedView, source: CheckpointTensors, matrix: Matrix) -> float:
    layout = view.of(matrix.module)
    if view.layout.moved:
        error, limit = _rescaled_error(view, source, matrix), _MOST_CLIPPED
    else:
        error = _error(view, source, matrix)
        limit = _MOST_FLOAT4 if layout.method in FLOAT4 else _MOST_ERROR[layout.bits]
    if not error <= limit:
        raise CheckFailed(
            f"{matrix.module} has a relative error of {error:.2f}, more than rounding to "
            f"{layout.bits} bits gives (limit {limit})",
            hint="the weights are damaged or packed in another order; " + _HINT,
        )
    return error


def _error(view: PackedView, source: CheckpointTensors, matrix: Matrix) -> float:
    """Return the relative error of a matrix, a few rows at a time where the layout allows it."""
    wrong = norm = 0.0
    layout = view.of(matrix.module)
    step = max(1, _BLOCK // matrix.inputs // layout.outputs) * layout.outputs
    if not layout.tiled:
        found, before = _values(view, source, matrix)
        norm = float(np.vdot(before, before))
        found -= before
        wrong = float(np.vdot(found, found))
    for start in range(0, matrix.outputs, step) if layout.tiled else ():
        stop = min(start + step, matrix.outputs)
        rows = matrix.stored(source, start, stop)
        try:
            off, size = view.tiles(matrix.module, start, stop).squares(rows)
        except ValueError as problem:
            raise CheckFailed(f"{matrix.module} has {problem}", hint=_HINT) from None
        wrong, norm = wrong + off, norm + size
    return math.sqrt(wrong / norm) if norm else math.sqrt(wrong)


def _rescaled_error(view: PackedView, source: CheckpointTensors, matrix: Matrix) -> float:
    """Return the relative error that remains after the best scale per input."""
    found, before = _values(view, source, matrix)
    free = matrix.module.endswith(_BEFORE_A_MATRIX)
    before = rescaled(before, found, outputs=free)
    if not free:  # nothing after the outputs would undo their scales
        power = (before * before).sum(1)
        there = power > 1e-30  # an output of zeros has no gain
        gains = (before * found).sum(1)[there] / power[there]
        off = float(((gains < _GAINS[0]) | (gains > _GAINS[1])).sum()) / len(power)
        if off > _MAX_OFF:
            raise CheckFailed(
                f"{matrix.module}: {off:.0%} of its outputs are scaled by less than {_GAINS[0]} or "
                f"more than {_GAINS[1]}",
                hint="its scales are in another order; " + _HINT,
            )
    norm = float(np.linalg.norm(before))
    return float(np.linalg.norm(found - before)) / norm if norm else float(np.abs(found).max())


def _values(view: PackedView, source: CheckpointTensors, matrix: Matrix) -> tuple[Floats, Floats]:
    """Return a whole matrix as it is read back, and as it was; raises CheckFailed."""
    found, before = view.matrix(matrix.module), matrix.rows(source, 0, matrix.outputs)
    if found.shape != before.shape:
        shapes = f"shape {found.shape}, not {before.shape}"
        raise CheckFailed(f"{matrix.module} has {shapes}", hint=_HINT)
    if not bool(np.isfinite(found).all()):
        raise CheckFailed(f"{matrix.module} has NaN or infinite weights", hint=_HINT)
    return found, before


def rescaled(before: Floats, found: Floats, *, outputs: bool) -> Floats:
    """Return the matrix with the scales per input that minimise its distance to `found`.

    AWQ moves such scales into the preceding norm or matrix (arXiv 2306.00978, section 3.2), whose
    `outputs` are then scaled too; the remaining distance is rounding. Two rounds of least squares;
    a zeroed matrix stays unchanged.
    """
    near = before
    for _ in range(2):
        for axis in (0, 1) if outputs else (0,):
            power = (near * near).sum(axis, keepdims=True)
            factor = (near * found).sum(axis, keepdims=True) / np.maximum(power, 1e-30)
            near = near * np.where(factor > 0, factor, 1.0)
    return np.asarray(near, np.float32)


def _check_rest(view: PackedView, source: CheckpointTensors, name: str) -> None:
    made, own = view.tensors, source.info(name)
    found = made.info(name)
    if (found.dtype, found.shape) != (own.dtype, own.shape):
        raise CheckFailed(
            f"{name} is {found.dtype} {found.shape}, not {own.dtype} {own.shape}", hint=_HINT
        )
    parts = (made.f32(one) for one in (name,))
    if len(own.shape) > 1:  # a few rows at a time
        step = max(1, _BLOCK // max(1, math.prod(own.shape[1:])))
        starts = range(0, own.shape[0], step)
        parts = (made.part(name, (slice(start, start + step),)) for start in starts)
    if not all(bool(np.isfinite(part).all()) for part in parts):
        raise CheckFailed(f"{name} has NaN or infinite weights", hint=_HINT)
    # AWQ moves scales into norms, biases and kept matrices. Embeddings and head must not change,
    # and with other engines no unquantized tensor.
    if all(
        np.array_equal(made.raw(name, at, at + _BLOCK), source.raw(name, at, at + _BLOCK))
        for at in range(0, own.size, _BLOCK)
    ):
        return
    may = view.layout.moved
    if may and ("norm" in name or name.endswith(".bias")):
        return
    if may and LINEAR.search(name):
        after, free = made.f32(name), name.removesuffix(".weight").endswith(_BEFORE_A_MATRIX)
        before = rescaled(source.f32(name), after, outputs=free)
        if float(np.linalg.norm(after - before)) <= _MOST_KEPT * float(np.linalg.norm(before)):
            return
    raise CheckFailed(f"{name} was unexpectedly changed", hint=_HINT)


_LAYER = re.compile(r"(?P<above>.*?)\blayers\.(?P<number>\d+)\.(?P<within>.+)")
_TOWERS = ("vision", "visual", "audio", "encoder", "mtp", "projector")
"""Parts of the names of what is not the language model."""
_STAYS = re.compile(
    r"(.*\.)?("
    r"gate|gate\.wg|router|router\.(layer|proj)|shared_expert_gate"  # of experts
    r"|q_a_proj|kv_a_proj_with_mqa|kv_b_proj"  # latent attention; vLLM absorbs the last
    r"|in_proj_(a|b|ba|qkv|qkvz|z)|conv1d|conv\.conv"  # of states
    r"|per_layer_input_gate|per_layer_projection"
    r")\.weight"
)
_ONLY_EXPERTS = frozenset({"GptOssForCausalLM"})


def expected(source: CheckpointTensors, model: ModelFacts) -> frozenset[str]:
    """Return the tensors of a 16-bit checkpoint that a quantizer without `keep` quantizes."""
    found = set[str]()
    for name in source.names:
        layer = _LAYER.fullmatch(name)
        if layer is None or any(part in layer["above"] for part in _TOWERS):
            continue
        if model.layers and int(layer["number"]) >= model.layers:
            continue  # predicts further tokens
        within, axes = layer["within"], len(source.info(name).shape)
        if model.architecture in _ONLY_EXPERTS and "experts." not in within:
            continue
        matrix = axes == 2 and within.endswith(".weight")
        stack = axes == 3 and not within.endswith("conv.weight")
        if (matrix or stack) and not _STAYS.fullmatch(within):
            found.add(name)
    return frozenset(found)
