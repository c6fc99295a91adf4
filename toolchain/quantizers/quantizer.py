"""What a quantizer is: one frozen value per file of this folder, found by listing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from toolchain.values import Format, Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One command of a quantization, run in the builder without a shell."""

    title: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    writes: Mapping[Path, str] = field(default_factory=dict)
    """Small files that the command reads, written before it runs."""
    removes: tuple[Path, ...] = ()
    """Intermediate files deleted once the step succeeded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeRequest:
    """A checkpoint, the wanted format, and where the result goes."""

    model: Path
    format: Format
    output: Path
    """The folder that the result is written into."""
    name: str
    """The model's name, and the output file's without suffix."""
    tools: Path
    """Folder of the builder's own programs."""
    python: str
    """The builder's Python."""
    calibration: Path | None = None
    options: Mapping[str, Json]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantizer:
    """A family of formats made by one builder."""

    name: str
    builder: str
    formats: tuple[Format, ...]
    recipe_number: int
    """Raised whenever the same inputs would give other bytes; part of the store's key."""
    check_input: Callable[[Mapping[str, Json]], None]
    """(config.json) -> None; raises InputRefused for a model that it cannot quantize."""
    steps: Callable[[QuantizeRequest], tuple[Step, ...]]
    """The commands, in order; starts nothing and writes nothing."""
    check: Callable[[QuantizeRequest], Mapping[str, Json]]
    """Re-read the output and describe it; raises CheckFailed where it is not what was asked."""
    peak_disk: Callable[[int, Format], int]
    """(checkpoint bytes, format) -> bytes on disk at the worst moment, output included."""
