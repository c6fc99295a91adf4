"""What a quantizer is: one frozen value per file of this folder, found by listing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from weightsmith.checkpoints.facts import ModelFacts
from weightsmith.values import Format, Json

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One command of a quantization, run in the builder without a shell."""

    title: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    writes: Mapping[Path, str] = field(default_factory=dict)
    """Small files that the command reads, written before it runs."""
    removes: tuple[Path, ...] = ()
    """Intermediate files deleted once the step succeeded; a name may be a pattern."""
    digests: Mapping[str, Path] = field(default_factory=dict)
    """`{name}` in argv -> the file that an earlier step made, whose sha256 takes its place."""
    finds: Mapping[str, str] = field(default_factory=dict)
    """`{name}` in argv -> pattern of files in the output; the first of them takes its place."""
    reads: str = ""
    """The input that a Python program converts, such as `the model`: an exception that ends it, but
    for memory and disk, says that it cannot read that."""


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
    """JSON Lines `{text, tokens}`: the chat template is applied, `tokens` is their number."""
    measured: bool = False
    """What calibration measures lies in the output already, under `Quantizer.statistics`."""
    options: Mapping[str, Json]


class View(Protocol):
    """A quantized model seen as the checkpoint it was made from, one tensor at a time."""

    @property
    def names(self) -> frozenset[str]:
        """The checkpoint's tensors that it holds, by their names there."""

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """Return one tensor as float32 in the checkpoint's shape and order."""


def _no_options(_format: Format, _wanted: Mapping[str, Json]) -> Mapping[str, Json]:
    return {}


def _any_options(_model: ModelFacts, _options: Mapping[str, Json]) -> None:
    """Find nothing wrong."""


def _never(_format: Format, _options: Mapping[str, Json]) -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantizer:
    """A family of formats made by one builder."""

    name: str
    builder: str
    formats: tuple[Format, ...]
    recipe_number: int
    """Raised whenever the same inputs would give other bytes; part of the store's key."""
    check_input: Callable[[Format, ModelFacts], None]
    """(format, model) -> None; raises InputRefused for a model that it cannot quantize so."""
    steps: Callable[[QuantizeRequest], tuple[Step, ...]]
    """The commands, in order; starts nothing and writes nothing."""
    check: Callable[[QuantizeRequest], Mapping[str, Json]]
    """Re-read the output and describe it; raises CheckFailed where it is not what was asked."""
    peak_disk: Callable[[int, int, Format], int]
    """(checkpoint bytes, those of them that stay in 16 bits, format) -> bytes on disk at the worst
    moment, output included."""
    options: Callable[[Format, Mapping[str, Json]], Mapping[str, Json]] = _no_options
    """(format, the recipe's `quantize`) -> those that change this format's bytes; UsageError."""
    check_options: Callable[[ModelFacts, Mapping[str, Json]], None] = _any_options
    """(model, options) -> None; raises InputRefused for options that do not fit the model."""
    calibrated: Callable[[Format, Mapping[str, Json]], bool] = _never
    """(format, options) -> whether it measures activations on calibration text."""
    view: Callable[[Path, Path], View] | None = None
    """(artifact folder, checkpoint folder) -> its tensors for the quality gate; Unmeasurable
    for an architecture whose tensors it cannot bring back. None: the gate is left out."""
    statistics: str = ""
    """Name of the file in the output that calibration measured: kept in the store by itself, so
    that the next format of the same checkpoint need not measure again."""
    default: str = ""
    """The format that an engine's bare name stands for, where it loads no plain checkpoint."""
    check_statistics: Callable[[Path, ModelFacts], None] | None = None
    """(file, model) -> None; raises InputRefused for statistics of another model."""
