"""Mixes for vLLM: each matrix has 4-bit integers, FP8 or 16 bits, within a budget.

They are compressed-tensors' config_groups, each with the modules that it names and its own layout
(`mixed-precision`). What vLLM fuses into one matrix has one type: q, k and v; gate and up; and all
matrices of a layer's experts (0.33, compressed_tensors.py get_scheme_dict and
compressed_tensors_moe.py get_moe_method). Losses are llamacpp-mix's, of these types. Errors of
integers are made up for as GPTQ does (`layerwise/quantizing.py`).

128 inputs share a scale only where up to eight GPUs have whole groups of them. A matrix without
measured losses has FP8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.safe_parse import read_json
from weightsmith.core.values import Format, JsonValue
from weightsmith.forward.libraries import OFFLINE
from weightsmith.models.facts import ModelFacts
from weightsmith.models.safetensors import BITS
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers import checkpoints, mixing, running
from weightsmith.quantizers.architectures import MEASURED, ROUNDED, STACKED_MXFP4
from weightsmith.quantizers.gguf_check import IMATRIX, LOSSES
from weightsmith.quantizers.gguf_importance import WITHOUT_WALK
from weightsmith.quantizers.gguf_mix import Losses, budget_options, check_layers
from weightsmith.quantizers.matrices import Matrix, matrices
from weightsmith.quantizers.packed import MIXED, PackedLayout, view_of
from weightsmith.quantizers.packed_check import check_checkpoint
from weightsmith.quantizers.quantizer import (
    BuilderCommand,
    Options,
    Quantizer,
    QuantizeRequest,
)
from weightsmith.quantizers.schemes import SCHEMES, Scheme

MIX = Format(name="mix-compressed", kind="mix", bits_per_weight=4.5)
FEWEST = 4.125
"""Bits per weight of the smallest type."""
PLAIN = "16bit"
"""The type of a matrix that stays as it is."""


def _integers(group: int, *, zeros: bool = False) -> Scheme:
    name, more = (f"int4-{group}-zeros", 4) if zeros else (f"int4-{group}", 0)
    return Scheme(
        format=Format(name=name, kind="mix", bits_per_weight=4 + (16 + more) / group),
        layout="pack-quantized",
        codes="I32",
        scales="",  # the checkpoint's own type
        largest=7.0,
        tile=(1, group),
        weights={
            "num_bits": 4, "type": "int", "symmetric": not zeros, "dynamic": False,
            "strategy": "group", "group_size": group,
        },
        inputs=None,
    )  # fmt: skip


FP8 = SCHEMES["fp8"]
_INTEGERS = (_integers(128), _integers(32), _integers(32, zeros=True), FP8)
TYPES: Mapping[str, Scheme] = {one.format.name: one for one in _INTEGERS}
"""Name -> how a matrix is stored; `PLAIN` is beside them."""
KINDS = (*TYPES, PLAIN)
_BUDGETS = (5.0, 6.0, 8.0)
"""Bits per weight of the mixes that `auto` tries."""
_SHARDS = 8
_BOTH = 2.0
"""FP8 rounds inputs as it rounds weights, to the same number of digits, so a product's expected
error is that of the weights twice."""
_NAMES: Mapping[str, str] = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "qkv_proj": "attn_qkv",
    "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up",
    "gate_up_proj": "ffn_up", "down_proj": "ffn_down", "w1": "ffn_gate", "w3": "ffn_up",
    "w2": "ffn_down",
}  # fmt: skip
"""Name of a matrix -> llama.cpp's, by which importance and losses are stored."""
_LAYER, _EXPERT = re.compile(r"\blayers\.(\d+)\."), re.compile(r"\.experts\.\d+\..*")
NOTHING = "choose the target vllm, or a smaller budget"
"""What to do where nothing would be quantized."""
_HEADER = 160
"""Bytes that a tensor takes in a file's header, at most."""


def types_of(inputs: int, outputs: int = 32, *, experts: bool = False) -> tuple[str, ...]:
    """Return the types that a matrix may have, but for 16 bits."""
    if inputs % 32 or outputs % 32:  # vLLM's kernels for 4 bits (mixed_precision/cpu.py)
        return ("fp8",)
    wide = ("int4-128",) if inputs % (128 * _SHARDS) == 0 else ()
    # Which kernels take experts with zero points depends on the GPU; none was tried.
    zeros = () if experts else ("int4-32-zeros",)
    return (*wide, "int4-32", *zeros, "fp8")


def fewest_bits(model: ModelFacts) -> float:
    """Return the bits per weight that no matrix of a model can be below."""
    every = [types_of(inputs)[0] for inputs in checkpoints.row_lengths(model).values()]
    return min((TYPES[kind].format.bits_per_weight for kind in every), default=FEWEST)


def has_zeros(kind: str) -> bool:
    """Return whether groups of a type have zero points."""
    return TYPES[kind].weights["symmetric"] is False


def tensor_of(matrix: Matrix) -> str:
    """Return llama.cpp's name of a matrix's tensor; "" for one that it is not known of."""
    layer, name = _LAYER.search(matrix.module), _NAMES.get(matrix.module.rpartition(".")[2], "")
    if not layer or not name:
        return ""
    more = "_exps" if _EXPERT.search(matrix.module) else ""
    more = "_shexp" if "shared_expert" in matrix.module else more
    return f"blk.{layer[1]}.{name}{more}.weight"


def unit_of(matrix: Matrix) -> str:
    """Return the name of what vLLM fuses a matrix with: all of that has one type."""
    return _EXPERT.sub(".experts", matrix.module) if _EXPERT.search(matrix.module) else matrix.fused


def units_of(found: Iterable[Matrix]) -> dict[str, list[Matrix]]:
    """Return the matrices by the unit that they are in."""
    units: dict[str, list[Matrix]] = {}
    for matrix in found:
        units.setdefault(unit_of(matrix), []).append(matrix)
    return units


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenMix:
    """The types of a checkpoint's units."""

    types: Mapping[str, str]
    """Unit -> type."""
    loss: float | None = None
    """What they are expected to lose, in nats per token; None for types that were given."""
    bound: float | None = None
    """No mix of the same budget loses less."""


def choose(
    wanted: Mapping[str, JsonValue], source: CheckpointTensors, model: Path, losses: Losses
) -> ChosenMix:
    """Return the types that `budget_options` asks for.

    Raises InputRefused for a budget below the smallest types, for one in which nothing is
    quantized, and for the mix of another model.
    """
    units = units_of(matrices(source, model))
    if not units:
        checkpoints.without_kept((), ())
    if isinstance(given := wanted.get("mix"), dict):
        return ChosenMix(types=_given(given, units))
    choices = {unit: _choices(found, losses, source) for unit, found in units.items()}
    inside = {matrix.tensor for found in units.values() for matrix in found}
    fixed = sum(source.info(name).size for name in source.names - inside)
    weights = sum(int(np.prod(source.info(name).shape)) for name in source.names)
    tensors = len(source.names) + 3 * sum(map(len, units.values()))
    if bits := wanted.get("bits"):
        whole, before = int(float(str(bits)) * weights / 8), 0
    else:
        whole, before = int(str(wanted["size"])), _HEADER * tensors
    left, least = whole - before - fixed, mixing.smallest(choices)
    if left < least:
        smallest, size = (least + fixed) * 8 / weights, least + fixed + _HEADER * tensors
        raise InputRefused(
            f"no mix is that small: the smallest has {smallest:.3f} bits per weight, "
            f"{-(-size // 10**6)}MB, with embeddings and head in 16 bits",
            hint=f"set quantize.bits to {int(smallest * 1000 + 1) / 1000:g}, or quantize.size to "
            f"{-(-size // 10**6)}MB",
        )
    found = mixing.choose(choices, left)
    if {*found.kinds.values()} == {PLAIN}:
        raise InputRefused(
            "the budget has room for all weights in 16 bits: nothing would be quantized",
            hint=NOTHING,
        )
    bound = min(found.bound, found.loss)
    return ChosenMix(
        types=found.kinds, loss=float(f"{found.loss:.6g}"), bound=float(f"{bound:.6g}")
    )


def _types_of(matrix: Matrix) -> tuple[str, ...]:
    experts = bool(_EXPERT.search(matrix.module))
    return types_of(matrix.inputs, matrix.outputs, experts=experts)


def _choices(
    found: Sequence[Matrix], losses: Losses, source: CheckpointTensors
) -> list[mixing.Choice]:
    kinds = [_types_of(one) for one in found]
    names = {tensor_of(one) for one in found}
    common = [kind for kind in TYPES if all(kind in each for each in kinds)]
    known = [kind for kind in common if all(kind in losses.get(name, {}) for name in names)]
    if not known:
        return [mixing.Choice("fp8", _bytes(found, "fp8"), 0.0)]
    made = [
        mixing.Choice(
            kind,
            _bytes(found, kind),
            sum(losses[name][kind] for name in sorted(names)) * (_BOTH if kind == "fp8" else 1),
        )
        for kind in known
    ]
    # It is copied, so that float32 stays float32.
    weights = ((one.outputs * one.inputs, source.info(one.tensor).dtype) for one in found)
    plain = sum(count * BITS[dtype] // 8 for count, dtype in weights)
    return [*made, mixing.Choice(PLAIN, plain, 0.0)]


def _bytes(found: Iterable[Matrix], kind: str) -> int:
    size = 0
    for one in found:
        weights = one.outputs * one.inputs
        if kind == "fp8":
            size += weights + 4 * one.outputs
        else:
            groups = weights // TYPES[kind].tile[1]
            size += weights // 2 + 2 * groups + groups // 2 * has_zeros(kind) + 16
    return size


def _given(types: Mapping[str, str], units: Mapping[str, Sequence[Matrix]]) -> dict[str, str]:
    """Return the types of a mix's file; raise InputRefused unless it is one of this model."""
    hint = "give the mix of a model with the same layers and widths, or a budget"
    if {*types.values()} == {PLAIN}:
        raise InputRefused(
            "the mix leaves every matrix in 16 bits: nothing would be quantized", hint=NOTHING
        )
    if odd := sorted(types.keys() ^ units.keys()):
        what = "is not in this one" if odd[0] in types else "has no type"
        raise InputRefused(f"the mix is of another model: {odd[0]} {what}", hint=hint)
    for unit, found in units.items():
        for one in found:
            if types[unit] != PLAIN and types[unit] not in _types_of(one):
                raise InputRefused(
                    f"{one.module} cannot have the type {types[unit]}: it has {one.outputs} outputs"
                    f" and {one.inputs} inputs",
                    hint=hint,
                )
    return dict(types)


def config_of(modules: Mapping[str, str]) -> dict[str, JsonValue]:
    """Return the quantization_config of the quantized `modules`, each with its type."""
    groups: dict[str, JsonValue] = {}
    for kind, scheme in TYPES.items():
        targets = sorted(one for one, own in modules.items() if own == kind)
        if targets:
            groups[f"group_{len(groups)}"] = {
                "targets": list(targets),
                "format": scheme.layout,
                "weights": dict(scheme.weights),
                "input_activations": dict(scheme.inputs) if scheme.inputs else None,
                "output_activations": None,
            }
    return {
        "quant_method": "compressed-tensors",
        "format": MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
    }


def layout_of_type(kind: str) -> PackedLayout:
    """Return how a matrix of a type is stored."""
    scheme = TYPES[kind]
    return PackedLayout(
        method=scheme.layout,
        bits=8 if scheme is FP8 else 4,
        group_size=scheme.tile[1],
        symmetric=scheme is FP8 or not has_zeros(kind),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MixSettings:
    """What the program is told that makes a mix."""

    model: str
    out: str
    texts: str
    """JSON Lines of calibration texts."""
    matrix: str
    """The importance matrix: measured if it is not there; "" for none."""
    losses: str
    """Likewise; "" for types that are given."""
    wanted: Mapping[str, JsonValue]
    measured_on: str


def _steps(request: QuantizeRequest) -> tuple[BuilderCommand, ...]:
    file, texts = request.output / ".settings.json", request.output / ".texts.jsonl"
    chosen = request.options
    measures = not (request.measured and (request.weighed or not _needs_losses(chosen)))
    settings = MixSettings(
        model=str(request.model),
        out=str(request.output),
        texts=str(texts),
        matrix=str(request.output / IMATRIX) if chosen["imatrix"] != "off" else "",
        losses=str(request.output / LOSSES) if _needs_losses(chosen) else "",
        wanted={key: chosen[key] for key in ("bits", "size", "mix") if key in chosen},
        measured_on=str(request.measured_on or request.model),
    )
    return (
        BuilderCommand(
            title=f"{'measuring losses and ' if measures else ''}calibrating a mix, layer by layer",
            argv=(request.python, "-m", "weightsmith.worker.quantize_mixed", str(file)),
            env={**OFFLINE, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
            writes={
                file: json.dumps(asdict(settings), sort_keys=True),
                texts: "".join(json.dumps(dict(row)) + "\n" for row in request.texts),
            },
            removes=(file, texts),
        ),
    )


def _check(request: QuantizeRequest) -> Options:
    told = request.output / running.FACTS
    mix = read_json(told)
    source = CheckpointTensors(request.model)
    found = {one.module: mix["types"][unit_of(one)] for one in matrices(source, request.model)}
    kept = tuple(sorted(module for module, kind in found.items() if kind == PLAIN))
    layouts = {one: layout_of_type(kind) for one, kind in found.items() if kind != PLAIN}
    facts = check_checkpoint(request.output, request.model, layouts, kept)
    told.unlink()
    kinds = [*found.values()]
    foreseen = {key: mix[key] for key in ("loss", "bound") if mix[key] is not None}
    return {
        **facts,
        **mix["walk"],
        "engine": "weightsmith",
        "tensor_types": dict(sorted(mix["types"].items())),
        "types": {kind: kinds.count(kind) for kind in KINDS if kind in kinds},
        **({"mix": foreseen} if foreseen else {}),
    }


def _options(_format: Format, requested: Options) -> Options:
    for name in ("keep", "tensor_types"):
        if requested.get(name):
            raise UsageError(
                f"{name} is not supported by a mix",
                hint="remove it; quantize.mix takes a file with the type of each matrix",
            )
    imatrix = str(requested.get("imatrix") or "walk")
    return {
        "imatrix": "walk" if imatrix == "auto" else imatrix,
        **budget_options(requested, FEWEST, name="mix"),
    }


def _needs_losses(chosen: Options) -> bool:
    return "bits" in chosen or "size" in chosen


def _check_input(_format: Format, model: ModelFacts) -> None:
    checkpoints.check_config(model, ROUNDED & (MEASURED - WITHOUT_WALK) - STACKED_MXFP4)


QUANTIZER = Quantizer(
    name="compressed_mix",
    builder="gguf",
    formats=(MIX,),
    recipe_number=2,
    check_input=_check_input,
    check_options=check_layers,
    steps=_steps,
    check=_check,
    peak_disk=lambda size, kept, format_, _options: checkpoints.output_bytes(size, kept, format_),
    options=_options,
    variants=lambda *_: tuple({"bits": bits} for bits in _BUDGETS),
    calibrated=lambda _format, _chosen: True,
    walked=lambda chosen: chosen["imatrix"] == "walk",
    statistics=IMATRIX,
    losses=LOSSES,
    weighs=_needs_losses,
    view=view_of,
    computed=True,
    by_layer=True,
    compensated=True,
)
