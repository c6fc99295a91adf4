"""Which engine loads which quantized format on which hardware, before anything is made."""

from __future__ import annotations

from weightsmith.checkpoints.facts import ModelFacts
from weightsmith.errors import InputRefused
from weightsmith.serving.engine import Engine, Support
from weightsmith.serving.gpus import GPUS
from weightsmith.values import Format

_AMD = (0, 0)
"""The compute capability of GPUs that have none."""


def check_support(
    engine: Engine, format_: Format, device: str, model: ModelFacts | None = None
) -> None:
    """Refuse a format that the engine cannot load on a device: `cpu` or a GPU's name.

    Of some formats a CPU build loads models without experts only; `model` says which it is. What
    the engine's rows do not name is left to its plan. Raises InputRefused.
    """
    row = engine.support.get(format_.name) or engine.support.get(format_.kind)
    if row is None:
        return
    if lacks := _lacks(row, device):
        raise InputRefused(
            f"{format_.name} weights: {engine.name} {_version(engine, device)} {lacks}"
            f" ({row.source})",
            hint=f"choose {_ways_out(engine, device)}",
        )
    if device == "cpu" and row.cpu_experts and model and model.matrices.experts:
        raise InputRefused(
            f"{format_.name} weights of a model with experts: {engine.name}"
            f" {_version(engine, device)} has no kernel for them on a CPU ({row.cpu_experts})",
            hint=f"choose a GPU with serve.gpu, 16 bits (target {engine.name}), or GGUF",
        )


def _version(engine: Engine, device: str) -> str:
    """Return the version of an engine's build for a device."""
    versions = engine.support_versions
    return versions.get("cpu" if device == "cpu" else "gpu", versions["gpu"])


def _lacks(row: Support, device: str) -> str:
    """Return what an engine lacks or needs on a device, or nothing where it loads the format."""
    card = GPUS.get(device)
    if device == "cpu":
        return "" if row.cpu else "has no kernel for it on a CPU"
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


def _ways_out(engine: Engine, device: str) -> str:
    """Return the formats that the engine does load there, and what else there is."""
    good = sorted(kind for kind, row in engine.support.items() if not _lacks(row, device))
    formats = f"{' or '.join(good)}, " if good else ""
    return f"{formats}another GPU with serve.gpu, or 16 bits (target {engine.name})"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
