"""Which engine loads which quantized format on which hardware, before anything is made.

Each row names the file of the engine's package that says so, and a test fails when `bases.lock`
changes. A first table, from memory, was wrong in both directions; the engines' support pages lag
behind their code.
"""

from __future__ import annotations

from weightsmith.core.errors import InputRefused
from weightsmith.core.values import Format
from weightsmith.models.facts import ModelFacts
from weightsmith.serving.devices import AMX, is_cpu
from weightsmith.serving.engine import Engine, ExpertKernel, Support
from weightsmith.serving.gpus import GPUS

_AMD = (0, 0)
"""The compute capability of GPUs that have none."""
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
    version = f"{engine.name} {_version(engine, device)}"
    amx = "" if device == AMX or not is_cpu(device) or _lacks_with_amx(row, model) else _WITH_AMX
    if lacks := _lacks(row, device):
        raise InputRefused(
            f"{format_.name} weights: {version} {lacks} ({row.source})",
            hint=f"choose {amx}{_ways_out(engine, device)}",
        )
    if lacks := _lacks_for_experts(row, device, model):
        others = sorted(_with_experts(engine, device, model))
        formats = f"{' or '.join(others)}, " if others else ""
        raise InputRefused(
            f"{format_.name} weights of a model with experts: {version} {lacks}"
            f" ({row.cpu_experts})",
            hint=f"choose {amx}{formats}a GPU with serve.gpu, 16 bits (target {engine.name}),"
            " or GGUF",
        )


def _version(engine: Engine, device: str) -> str:
    """Return the version of an engine's build for a device."""
    versions = engine.support_versions
    return versions.get("cpu" if is_cpu(device) else "gpu", versions["gpu"])


def _lacks(row: Support, device: str) -> str:
    """Return what an engine lacks or needs on a device, or nothing where it loads the format."""
    card = GPUS.get(device)
    if is_cpu(device):
        has = row.cpu or (row.amx and device == AMX)
        return "" if has else "has no kernel for it on a CPU"
    if card is None:
        return ""
    if card.compute_capability == _AMD:
        return "" if row.amd else f"has no kernel for it on AMD's GPUs, such as {device}"
    if card.compute_capability >= row.capability:
        return ""
    return (
        f"needs compute capability {_dotted(row.capability)} for it, and {device} has "
        f"{_dotted(card.compute_capability)}"
    )


def _lacks_for_experts(row: Support, device: str, model: ModelFacts | None) -> str:
    """Return the same of a model's experts, of which only CPU builds lack kernels."""
    if not (is_cpu(device) and row.cpu_experts and model and model.matrices.experts):
        return ""
    if device != AMX or row.amx_experts is None:
        return "has no kernel for them on a CPU"
    return _does_not_take(row.amx_experts, model)


def _does_not_take(kernel: ExpertKernel, model: ModelFacts) -> str:
    """Return why a kernel for experts does not take a model's; "" if it does."""
    if model.architecture not in kernel.architectures:
        return f"has no kernel for the way in which {model.architecture} chooses experts"
    hidden, width = model.shape.hidden, model.matrices.expert_width or model.shape.intermediate
    if hidden % kernel.hidden or width % kernel.width:
        return (
            f"has no kernel for experts of {width} x {hidden}, only for multiples of"
            f" {kernel.width} x {kernel.hidden}"
        )
    return ""


def _lacks_with_amx(row: Support, model: ModelFacts | None) -> str:
    return _lacks(row, AMX) or _lacks_for_experts(row, AMX, model)


def _with_experts(engine: Engine, device: str, model: ModelFacts | None) -> list[str]:
    """Return the formats in which the engine loads a model with experts there."""
    return [
        kind
        for kind, row in engine.support.items()
        if row.amx_experts
        if not (_lacks(row, device) or _lacks_for_experts(row, device, model))
    ]


def _ways_out(engine: Engine, device: str) -> str:
    """Return the formats that the engine does load there, and what else there is."""
    good = sorted(kind for kind, row in engine.support.items() if not _lacks(row, device))
    formats = f"{' or '.join(good)}, " if good else ""
    return f"{formats}another GPU with serve.gpu, or 16 bits (target {engine.name})"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
