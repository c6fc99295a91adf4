"""Settings of the program that quantizes to GGUF, as a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from weightsmith.core.json_objects import JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class PassFile(JsonObject):
    """One file to write; paths are absolute or relative to the program's folder."""

    out: str
    format: str
    direct: bool
    """The converter writes this type itself."""
    tensor_types: Mapping[str, str] = field(default_factory=dict)
    importance: str = ""
    """File of the importance matrix; empty: none."""
    overrides: Mapping[str, str] = field(default_factory=dict)
    """Keys to set, such as the licence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportanceWalk(JsonObject):
    """What our walk measures first, as far as no interrupted run has; paths are absolute."""

    model: str
    """The checkpoint's folder."""
    texts: str
    """JSON Lines: calibration texts as they were given."""
    out: str
    """The importance matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassSettings(JsonObject):
    """What to quantize, and how; paths are absolute or relative to the program's folder."""

    convert: tuple[str, ...]
    """The converter and its arguments but for a file's name and type; empty: `middle` has its
    output already."""
    middle: str
    """The unquantized file, or the stem of its parts; empty if all files are `direct`."""
    between: str
    """The unquantized file's type."""
    quantize: str
    """llama-quantize."""
    threads: int
    """0: one per CPU."""
    split: bool
    """Write parts, as many as the unquantized file has."""
    files: tuple[PassFile, ...]
    """What to write, all in one pass over the weights."""
    walk: ImportanceWalk | None = None
    """What measures the files' importance; None: nothing does, or it lies there."""
    projectors: tuple[str, ...] = ()
    """Where the converter's projector for pictures belongs; empty: none."""
    allow_text_only: bool = False
    """Whether there may be none because it cannot be converted."""
