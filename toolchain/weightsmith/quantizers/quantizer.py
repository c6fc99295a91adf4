"""The interface of a quantizer: one frozen value per file of this folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from weightsmith.core.values import Format, Json, JsonValue
from weightsmith.models.facts import ModelFacts
from weightsmith.models.tensors import View

Options: TypeAlias = Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuilderCommand:
    """A command of a quantization, run in the builder without a shell."""

    title: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    writes: Mapping[Path, str] = field(default_factory=dict)
    """Small input files, written before the command runs."""
    removes: tuple[Path, ...] = ()
    """Intermediate files to delete after success; names may be glob patterns."""
    makes: Path | None = None
    """A GGUF file of float32 that must be whole at the end: some programs end well without it."""
    finds: Mapping[str, str] = field(default_factory=dict)
    """`{name}` in argv -> glob pattern in the output whose first match replaces it."""
    reads: str = ""
    """The input that a Python program converts, such as `the model`: if the program fails, except
    for lack of memory or disk, the error says that it cannot read this input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeRequest:
    """A checkpoint, the requested format, and the output folder."""

    model: Path
    format: Format
    output: Path
    """The folder to write the result to."""
    name: str
    """The model's name, and the output file's stem."""
    tools: Path
    """Folder of the builder's programs."""
    python: str
    """The builder's Python interpreter."""
    calibration: Path | None = None
    """JSON Lines `{text, tokens}`: rendered text and its number of tokens."""
    texts: tuple[Mapping[str, Json], ...] = ()
    """Calibration texts as they were given."""
    measured_on: Path | None = None
    """The checkpoint that importance is measured on, if it is another one."""
    measured: bool = False
    """The output already has the calibration statistics (`Quantizer.statistics`)."""
    weighed: bool = False
    """The output already has the losses by which types are chosen (`Quantizer.losses`)."""
    options: Mapping[str, Json]
    siblings: tuple[QuantizeRequest, ...] = ()
    """More formats of the same model, to be made in the same steps."""

    @property
    def keep(self) -> tuple[str, ...]:
        """Ends of the names of matrices that stay in 16 bits."""
        return tuple(self.options.get("keep", ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantizer:
    """A family of formats made by one builder."""

    name: str
    builder: str
    formats: tuple[Format, ...]
    recipe_number: int
    """Increased if the same inputs would give other bytes; part of the store's key."""
    check_input: Callable[[Format, ModelFacts], None]
    """(format, model) -> None; raises InputRefused for a model that it cannot quantize so."""
    check_files: Callable[[Path, ModelFacts], None] = lambda _folder, _model: None
    """(folder with the tokenizer's files, model) -> None; raises InputRefused for files that it
    cannot read."""
    steps: Callable[[QuantizeRequest], tuple[BuilderCommand, ...]]
    """Returns the steps in order; has no side effects."""
    check: Callable[[QuantizeRequest], Options]
    """Reads the output and returns its facts; raises CheckFailed if a check fails."""
    peak_disk: Callable[[int, int, Format, Options], int]
    """(checkpoint bytes, bytes of them that stay in 16 bits, format, options) -> peak disk usage in
    bytes, including the output."""
    options: Callable[[Format, Options], Options] = lambda _format, _requested: {}
    """(format, the recipe's `quantize`) -> options that affect the output; raises UsageError."""
    options_of_model: Callable[[ModelFacts], Options] = lambda _model: {}
    """(model) -> further options, which nobody chooses, such as a part that only some models have.
    """
    check_options: Callable[[ModelFacts, Options], None] = lambda _model, _options: None
    """(model, options) -> None; raises InputRefused for options that do not fit the model."""
    calibrated: Callable[[Format, Options], bool] = lambda _format, _options: False
    """(format, options) -> whether it needs calibration text."""
    one_pass: Callable[[Format, Options, Format, Options], bool] = lambda *_: False
    """(format, options, another format, its options) -> whether the steps of the first can make the
    other as well (`QuantizeRequest.siblings`)."""
    view: Callable[[Path, Path], View] | None = None
    """(artifact folder, checkpoint folder) -> View for the quality gate; raises Unmeasurable for
    an unsupported architecture. None: no quality gate."""
    statistics: str = ""
    """Name of the output file with calibration statistics, which is stored separately for use by
    other formats of the same checkpoint."""
    walked: Callable[[Options], bool] = lambda _options: False
    """(options) -> whether our own walk over the layers measures these statistics."""
    losses: str = ""
    """Name of the output file with what each type of each matrix loses, which is stored separately
    for other budgets."""
    weighs: Callable[[Options], bool] = lambda _options: False
    """(options) -> whether types are chosen by these losses."""
    variants: Callable[[Format, Options], tuple[Options, ...]] = lambda *_: ({},)
    """(format, the recipe's `quantize`) -> values of `quantize` with which the target `auto` tries
    it, one candidate each; () for a format that it does not try."""
    beside_adapters: Callable[[Format, Options], Options] = lambda _format, chosen: chosen
    """(format, options) -> options for a base that unmerged adapters lie beside: it must leave the
    inputs and outputs of each matrix as they were. Raises UsageError if it cannot."""
    legacy: str = ""
    """Why one should choose another format, or empty."""
    default: str = ""
    """The format of an engine's bare name, if the engine does not load plain checkpoints."""
    computed: bool = False
    """Whether it reads a few rows at a time, so that they may be computed from base and adapters.
    """
    data_free: bool = False
    """Whether a matrix's bytes depend on its own weights alone, or with `fused_scales`, on those of
    the matrices that engines fuse with it, too."""
    fused_scales: Callable[[Format], bool] = lambda _format: False
    """(format) -> whether matrices that engines fuse have a scale in common."""
    streams: bool = False
    """Whether it needs memory for a few rows only, however large the model is."""
    by_layer: bool = False
    """Whether it has only one decoder layer in memory, with its statistics."""
    compensated: bool = False
    """Whether errors of a weight are spread to others, by Gram matrices of the inputs."""
    check_imports: tuple[str, ...] = ()
    """Modules that `check` needs; they are imported while the steps run."""
    check_statistics: Callable[[Path, ModelFacts], None] | None = None
    """(file, model) -> None; raises InputRefused for statistics of another model."""
