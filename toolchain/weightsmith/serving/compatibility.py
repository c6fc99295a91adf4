"""Which engine loads which quantized format on which hardware, before anything is made.

Each row names the file of the engine's package that says so, and a test fails when `bases.lock`
changes. A first table, from memory, was wrong in both directions; the engines' support pages lag
behind their code.
"""

from __future__ import annotations

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.values import Format
from weightsmith.models.facts import ModelFacts
from weightsmith.serving.devices import AMX, GPUS, is_cpu
from weightsmith.serving.engine import Engine, Support
from weightsmith.serving.machine import can_split

_AMD = (0, 0)
"""The compute capability of GPUs that have none."""
_TILES = {
    "fp8-block": 128,
    "nvfp4a16": 16,
    "nvfp4a16-4o6": 16,
    "nvfp4": 16,
    "nvfp4-modelopt": 16,
    "mix-compressed": 32,
    "mxfp4a16": 32,
    "mxfp4a8": 32,
    "mxfp8": 32,
}
"""Format -> weights along the axis that tensor parallelism divides: a GPU has whole tiles.

Of integers whose group size can be chosen, that is the tile.
"""
_MIX, _WIDE, _ALL_WIDE = "mix-compressed", 128, 1024
"""A mix has groups of 128, too, where rows are multiples of 1024 (quantizers/compressed_mix.py)."""
_LEAST_GROUP = 32
"""Smallest group to which vLLM cuts those of experts in AWQ's and GPTQ's own layouts."""
_SMALLER_GROUPS = (64, 32)

_PADDED = frozenset({"GptOssForCausalLM"})
"""Architectures whose experts vLLM pads to whole tiles (models/gpt_oss.py: _load_weights_mxfp4)."""
_WITH_AMX = "serve.gpu: cpu-amx if it is served by an Intel Xeon from the 4th generation on, "


def check_support(
    engine: Engine, format_: Format, device: str, model: ModelFacts | None = None
) -> None:
    """Refuse a format that the engine cannot load on a device: a CPU's name or a GPU's.

    Of some formats a CPU build loads models without experts only; `model` says which it is. What
    the engine's rows do not name is left to its plan. Raises InputRefused.
    """
    row = engine.support.get(format_.name) or engine.support.get(format_.kind)
    if row is None:
        return
    rows, on_cpu = engine.support, is_cpu(device)
    pinned = engine.support_versions.get("cpu" if on_cpu else "gpu", engine.support_versions["gpu"])
    version = f"{engine.name} {pinned}"
    takes = on_cpu and device != AMX and not (_lacks(row, AMX) or _lacks_experts(row, AMX, model))
    amx = _WITH_AMX if takes else ""
    if lacks := _lacks(row, device):
        good = sorted(kind for kind, other in rows.items() if not _lacks(other, device))
        formats = f"{' or '.join(good)}, " if good else ""
        raise InputRefused(
            f"{format_.name} weights: {version} {lacks} ({row.source})",
            hint=f"choose {amx}{formats}another GPU with serve.gpu, or 16 bits"
            f" (target {engine.name})",
        )
    if lacks := _lacks_experts(row, device, model):
        good = sorted(
            kind
            for kind, other in rows.items()
            if other.amx_experts
            and not (_lacks(other, device) or _lacks_experts(other, device, model))
        )
        formats = f"{' or '.join(good)}, " if good else ""
        raise InputRefused(
            f"{format_.name} weights of a model with experts: {version} {lacks}"
            f" ({row.cpu_experts})",
            hint=f"choose {amx}{formats}a GPU with serve.gpu, 16 bits (target {engine.name}),"
            " or GGUF",
        )


def check_adapters(engine: Engine, format_: Format, device: str, model: ModelFacts) -> None:
    """Refuse unmerged adapters that the engine's layers do not take on a device, beside a base.

    Raises InputRefused.
    """
    if not (format_.unmerged and is_cpu(device)):
        return
    base = format_.without_adapters
    row = engine.support.get(base.name) or engine.support.get(base.kind)
    what, source = f"beside {base.name} weights", row.cpu_adapters if row else ""
    if engine.expert_adapters and model.matrices.experts:
        what, source = "beside a model with experts", engine.expert_adapters
    if source:
        raise InputRefused(
            f"adapters {what}: {engine.name} {engine.support_versions['cpu']} has no layers for "
            f"them on a CPU ({source})",
            hint="choose another format of the base, a GPU with serve.gpu, or llama.cpp, or merge"
            " the adapters",
        )


def _lacks(row: Support, device: str) -> str:
    """Return what an engine lacks or needs on a device, or nothing where it loads the format."""
    card = GPUS.get(device)
    if is_cpu(device):
        there = row.cpu or (row.amx and device == AMX)
        return "" if there else "has no kernel for it on a CPU"
    if card is None:
        return ""
    if card.compute_capability == _AMD:
        return "" if row.amd else f"has no kernel for it on AMD's GPUs, such as {device}"
    if row.capability <= card.compute_capability < row.before:
        return ""
    needed, has = (".".join(map(str, one)) for one in (row.capability, card.compute_capability))
    if card.compute_capability >= row.before:
        return f"has no kernel for it on compute capability {has}, which {device} has"
    return f"needs compute capability {needed} for it, and {device} has {has}"


def _lacks_experts(row: Support, device: str, model: ModelFacts | None) -> str:
    """Return the same of a model's experts, of which only CPU builds lack kernels."""
    if not (is_cpu(device) and row.cpu_experts and model and model.matrices.experts):
        return ""
    if device != AMX or row.amx_experts is None:
        return "has no kernel for them on a CPU"
    kernel = row.amx_experts
    if model.architecture not in kernel.architectures:
        return f"has no kernel for the way in which {model.architecture} chooses experts"
    hidden, width = model.shape.hidden, model.matrices.expert_width or model.shape.intermediate
    if hidden % kernel.hidden or width % kernel.width:
        return (
            f"has no kernel for experts of {width} x {hidden}, only for multiples of"
            f" {kernel.width} x {kernel.hidden}"
        )
    return ""


def check_blocks(model: ModelFacts, format_: Format, gpus: int, group_size: int = 0) -> None:
    """Refuse tensor parallelism that would cut through the blocks or groups of a format.

    `group_size` is that of integers that will be made, in inputs per scale; 0 for other formats.
    Source: validate_fp8_block_shape, verify_group_size_divides_partition, GroupQuantScaleParameter,
    and of experts MoeWNA16Method.create_weights, of vLLM 0.33, and the same checks in SGLang
    0.5.23. Raises UsageError with the nearest that works.
    """
    size = group_size or _packed_tile(model) or _TILES.get(format_.name, 0)
    if gpus < 2 or model.architecture in _PADDED:
        return
    cut = _cut(model, format_, size, gpus)
    if cut is None:
        return
    name, length, tile = cut
    split = [
        n for n in range(2, gpus) if can_split(model.shape, n) and not _cut(model, format_, size, n)
    ]
    ways = [f"set serve.tensor_parallel_size to {max(split, default=1)}"]
    smaller = (n for n in _SMALLER_GROUPS if n < group_size)
    if group := next((n for n in smaller if not _cut(model, format_, n, gpus)), 0):
        ways.append(f"set quantize.group_size to {group}")
    raise UsageError(
        f"{format_.name} has blocks of {tile} weights, and {gpus} GPUs would share the"
        f" {length} of {name}: no whole number of blocks each",
        hint=f"{', '.join(ways)}, or choose fp8, which has a scale per row",
    )


def _packed_tile(model: ModelFacts) -> int:
    """Return the inputs per scale of weights that are packed already; 0 for a scale per row."""
    packing = model.packing
    return max(0, packing.block[-1] if packing.block else packing.group_size) if packing else 0


def _cut(model: ModelFacts, format_: Format, size: int, gpus: int) -> tuple[str, int, int] | None:
    """Return the first matrix that GPUs cannot share by whole tiles: name, length and tile."""
    if not size:
        return None
    packing = model.packing
    own = (packing.method if packing else format_.kind) in {"awq", "gptq"}
    for name, length in _divided(model, format_, gpus).items():
        tile = size
        if own and name == _EXPERT:
            tile = min(size, _LEAST_GROUP)
        elif format_.name == _MIX and length % _ALL_WIDE == 0:
            tile = _WIDE
        if length % (tile * gpus):
            return name, length, tile
    return None


_EXPERT = "an expert's down_proj"


def _divided(model: ModelFacts, format_: Format, gpus: int) -> dict[str, int]:
    """Return the matrices that tensor parallelism divides along their tiles, with the length."""
    shape, more, packing = model.shape, model.matrices, model.packing
    parts = {"o_proj": shape.heads * (shape.v_head_dim or shape.head_dim)}
    by_block = format_.name == "fp8-block" or bool(packing and packing.block)
    if by_block and not shape.kv_lora_rank:
        parts["k_proj"] = max(shape.kv_heads // gpus, 1) * shape.head_dim * gpus
    if not more.experts or more.sparse_layers < shape.layers:
        parts["down_proj"] = shape.intermediate
    if more.experts:
        parts[_EXPERT] = more.expert_width or shape.intermediate
        if shared := more.shared_experts * parts[_EXPERT] + more.shared_width:
            parts["the shared expert's down_proj"] = shared
    return parts
