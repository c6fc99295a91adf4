"""Checkpoint -> Artifact: quantize the merged weights to the target's format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from weightsmith.checkpoints.facts import ModelFacts, read_facts
from weightsmith.destinations import Destination, moved
from weightsmith.job_inputs import Input, Virtual
from weightsmith.jobs import Beside, QuantizeJob
from weightsmith.outcome import Outcome, Timer
from weightsmith.quantizers import of_format
from weightsmith.quantizers.calibration import Texts
from weightsmith.quantizers.known import has_projector
from weightsmith.quantizers.quantizer import Quantizer
from weightsmith.resources import builder_pins
from weightsmith.time_limits import GGUF_PER_GB, PACKING_PER_GB, ROUNDING_PER_GB, job_seconds
from weightsmith.tools import Tools
from weightsmith.trees import discard
from weightsmith.values import (
    SAFETENSORS,
    Artifact,
    Checkpoint,
    Digest,
    Format,
    Json,
    StageInputs,
)

WALK_BUILDER = "gguf"
"""It has the kernels that a walk multiplies with, and they are in its pins."""
WALK_RECIPE_NUMBER = 2

_STREAMING = 2 << 30
"""Memory limit of a quantizer that streams; a fifth of a gigabyte was measured."""
_OF_THE_JOB = ("builder_image", "network_in_jobs")
"""Facts that a runner adds to a job's result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """The user's options for one artifact; `options` are those that its format takes."""

    name: str
    """The model's name in the file's metadata."""
    format: Format
    options: Mapping[str, Json] = field(default_factory=dict)
    texts: Texts | None = None
    """Calibration text; None if the format needs none."""
    statistics: Input | None = None
    """An existing measurement, such as the user's importance matrix."""


def inputs(checkpoint: Digest, options: QuantizeOptions) -> StageInputs:
    """Return everything that the quantized artifact depends on."""
    quantizer, texts = of_format(options.format.name), options.texts
    walk = (
        walked_inputs(checkpoint, texts).key if texts and quantizer.walked(options.options) else ""
    )
    return StageInputs(
        stage="quantize",
        recipe_number=quantizer.recipe_number,
        inputs={
            "checkpoint": checkpoint,
            "quantizer": quantizer.name,
            "format": options.format.name,
            "name": options.name,
            "options": dict(options.options),
            "calibration": texts.calibration_digest if texts else "",
            **({"importance": walk} if walk else {}),
            "builder": builder_pins(quantizer.builder),
        },
    )


def statistics_inputs(checkpoint: Digest, texts: Texts, quantizer: Quantizer) -> StageInputs:
    """Return what the calibration depends on; the same for all formats of a family."""
    return StageInputs(
        stage="statistics",
        recipe_number=quantizer.recipe_number,
        inputs={
            "checkpoint": checkpoint,
            "quantizer": quantizer.name,
            "calibration": texts.calibration_digest,
            "builder": builder_pins(quantizer.builder),
        },
    )


def walked_inputs(checkpoint: Digest, texts: Texts) -> StageInputs:
    """Return what importance depends on that our own walk measures."""
    return StageInputs(
        stage="importance",
        recipe_number=WALK_RECIPE_NUMBER,
        inputs={
            "checkpoint": checkpoint,
            "calibration": texts.calibration_digest,
            "builder": builder_pins(WALK_BUILDER),
        },
    )


def quantize(
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    to: Destination,
    tools: Tools,
    *,
    beside: Sequence[QuantizeOptions] = (),
) -> Outcome[Artifact]:
    """Return the checkpoint quantized to a format in its builder, and read back.

    Formats `beside` it, which will be asked for next, are made in the same pass where that is
    possible, and stored. Raises InputRefused if the quantizer cannot read the model, CheckFailed if
    the output does not match the request.
    """
    format_ = options.format
    timer = Timer("quantize", format_.name, tools)
    if format_ == SAFETENSORS:
        artifact = Artifact(format=format_, tree=checkpoint.tree)
        return timer.done(artifact, cached=True)
    made = _made_together(checkpoint, options, to, tools, beside)
    files = to.files(
        lambda: inputs(checkpoint.digest, options),
        lambda folder: _run(folder, checkpoint, options, to, tools, ()),
        resume=True,
    )
    for text in files.meta.get("warnings", ()):
        tools.progress.warn(text)
    artifact = Artifact(format=format_, tree=files.tree, details=files.meta)
    return timer.done(artifact, cached=files.cached and not made)


def kept_bytes(checkpoint_bytes: int, format_: Format, model: ModelFacts | None) -> int:
    """Return the bytes that stay in 16 bits in a packed checkpoint: embeddings, head and tower.

    Beside a GGUF file, that is the projector.
    """
    if model is None:
        return 0
    if format_.suffix == ".gguf":
        return min(checkpoint_bytes, projector_bytes(model))
    tables = 1 if model.tied_embeddings else 2
    weights = tables * model.shape.vocab * model.shape.hidden + model.matrices.vision.weights
    return min(checkpoint_bytes, 2 * weights)


def projector_bytes(model: ModelFacts) -> int:
    """Return about how large a model's projector for llama.cpp is; 0 if it has none."""
    return max(1, 2 * model.matrices.vision.weights) if has_projector(model) else 0


def _run(
    folder: Path,
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    to: Destination,
    tools: Tools,
    beside: Sequence[QuantizeOptions],
) -> Mapping[str, Json]:
    quantizer = of_format(options.format.name)
    others = _others(checkpoint, options, beside, to)
    keeps = options.format.suffix != ".gguf" or "projector" in options.options
    model = read_facts(checkpoint.tree.texts) if keeps else None
    kept = kept_bytes(checkpoint.tree.size, options.format, model)
    peak = quantizer.peak_disk(checkpoint.tree.size, kept, options.format, options.options)
    # What one format needs while it is made, the others share.
    peak += sum(quantizer.peak_disk(checkpoint.tree.size, kept, one.format, {}) for one in others)
    tools.store.require_room(peak, f"quantizing to {options.format.name}")
    texts = options.texts
    if not (texts and quantizer.statistics):
        result = _quantized(folder, checkpoint, options, others, tools)
        return _kept(folder, checkpoint, others, to, result)
    known = statistics_inputs(checkpoint.digest, texts, quantizer)
    if quantizer.walked(options.options):
        known = walked_inputs(checkpoint.digest, texts)
    if earlier := to.find(lambda: known):
        given = Input.file(earlier, quantizer.statistics)
        options = replace(options, texts=None, statistics=given)
    result = _quantized(folder, checkpoint, options, others, tools)
    measured = folder / quantizer.statistics
    if measured.is_file():
        to.keep(lambda: known, measured)
    measured.unlink(missing_ok=True)
    return _kept(folder, checkpoint, others, to, result)


def _made_together(
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    to: Destination,
    tools: Tools,
    beside: Sequence[QuantizeOptions],
) -> bool:
    """Make a format and the missing ones beside it in one pass, if that is possible.

    The pass holds its first format's lock in the store while it stores the others. All builds take
    the locks in the order of `_rank`, so that no two of them wait for each other.
    """
    group = [options, *_others(checkpoint, options, beside, to)]
    if len(group) == 1 or to.find(partial(inputs, checkpoint.digest, options)):
        return False
    first, *others = sorted(group, key=_rank)
    files = to.files(
        partial(inputs, checkpoint.digest, first),
        lambda folder: _run(folder, checkpoint, first, to, tools, others),
        resume=True,
    )
    return not files.cached


def _rank(options: QuantizeOptions) -> tuple[bool, str]:
    """Return what sorts formats with statistics first: their pass can make the others, too."""
    return options.texts is None and options.statistics is None, options.format.name


def _others(
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    beside: Sequence[QuantizeOptions],
    to: Destination,
) -> list[QuantizeOptions]:
    """Return the formats that are missing and can be made in the same pass."""
    quantizer = of_format(options.format.name)

    def together(first: QuantizeOptions, other: QuantizeOptions) -> bool:
        return quantizer.together(first.format, first.options, other.format, other.options)

    return [
        one
        for one in beside
        if of_format(one.format.name) == quantizer
        and one.format != options.format
        and together(*sorted((options, one), key=_rank))
        and not to.find(partial(inputs, checkpoint.digest, one))
    ]


def _kept(
    folder: Path,
    checkpoint: Checkpoint,
    others: Sequence[QuantizeOptions],
    to: Destination,
    result: Mapping[str, Json],
) -> Mapping[str, Json]:
    """Store what was made beside the first format; return the first one's facts."""
    facts = {key: value for key, value in result.items() if key != "beside"}
    about = {key: facts[key] for key in _OF_THE_JOB if key in facts}
    for one in others:
        made = folder / _beside(one).folder
        found = {**result["beside"][one.format.name], **about}
        to.files(partial(inputs, checkpoint.digest, one), moved(made, found))
        discard(made)
    return facts


def _quantized(
    folder: Path,
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    others: Sequence[QuantizeOptions],
    tools: Tools,
) -> Mapping[str, Json]:
    tools.runner.prepare(of_format(options.format.name).builder, tools.progress)
    job = job_of(Input.checkpoint(checkpoint), checkpoint.tree.size, options, folder)
    job = replace(
        job,
        virtual=Virtual.of(checkpoint),
        beside=tuple(map(_beside, others)),
        seconds=job.seconds * (1 + len(others)),
    )
    return tools.runner.run(job, tools.progress)


def _beside(options: QuantizeOptions) -> Beside:
    return Beside(format=options.format.name, options=options.options)


def memory_limit(size: int, options: QuantizeOptions) -> int:
    """Return the memory that a job may use for a checkpoint of `size` bytes.

    GGUF is made tensor by tensor, in float32 where the converter changes a tensor, so the largest
    count: a quarter of the model is more than any known one has in its stacked experts.
    llama-imatrix maps the whole 16-bit file; our walk holds a layer in float32, and the states of
    its text, beside the converter. Other engines load the model, unless they stream it.
    """
    if of_format(options.format.name).streams:
        return _STREAMING
    if options.format.suffix != ".gguf":
        return (4 << 30) + 2 * size
    writing = (2 << 30) + size // 4
    if not options.texts:
        return writing
    walked = of_format(options.format.name).walked(options.options)
    return writing + ((4 << 30) + 2 * size if walked else size)


def job_of(model: Input, size: int, options: QuantizeOptions, folder: Path) -> QuantizeJob:
    """Return the job that quantizes a checkpoint of `size` bytes into a folder."""
    quantizer = of_format(options.format.name)
    texts = options.texts.calibration if options.texts else ()
    per_gb = ROUNDING_PER_GB if quantizer.streams else PACKING_PER_GB
    if options.format.suffix == ".gguf":
        per_gb = GGUF_PER_GB
    return QuantizeJob(
        builder=quantizer.builder,
        model=model,
        quantizer=quantizer.name,
        format=options.format.name,
        name=options.name,
        options=options.options,
        texts=texts,
        statistics=options.statistics,
        output=folder,
        memory_bytes=memory_limit(size, options),
        seconds=job_seconds(size, per_gb=per_gb, tokens=sum(len(str(row)) for row in texts)),
    )
