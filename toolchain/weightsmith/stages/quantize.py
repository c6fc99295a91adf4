"""Checkpoint -> Artifact: quantize the merged weights to the target's format."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.jobs import Input, QuantizeJob, SiblingFormat, Virtual
from weightsmith.core.resources import builder_pins
from weightsmith.core.time_limits import GGUF_PER_GB, PACKING_PER_GB, ROUNDING_PER_GB, job_seconds
from weightsmith.core.trees import discard
from weightsmith.core.values import (
    SAFETENSORS,
    Artifact,
    Checkpoint,
    Digest,
    Format,
    JsonValue,
    Snapshot,
    Sources,
    StageInputs,
    Tree,
    Writable,
)
from weightsmith.forward.memory import UNKNOWN
from weightsmith.models.facts import ModelFacts, read_facts
from weightsmith.provenance.labels import public_name
from weightsmith.quantizers import compressed_mix, formats, of_format
from weightsmith.quantizers.calibration import Texts, texts_of
from weightsmith.quantizers.checkpoints import check_plain, in_groups_of
from weightsmith.quantizers.compressed_mix import KINDS, NOTHING, TYPES
from weightsmith.quantizers.compressed_mix import MIX as COMPRESSED_MIX
from weightsmith.quantizers.gguf_importance import IMATRIX_WORDS, WALK_TOKENS, measured_by
from weightsmith.quantizers.gguf_mix import LOSS_TOKENS, UNMIXED, guessed_type, read_mix
from weightsmith.quantizers.gguf_types import FILE_TYPES, MIX
from weightsmith.quantizers.quantizer import Quantizer
from weightsmith.recipe.file import RecipeFile
from weightsmith.recipe.schema import Base, Quantize
from weightsmith.recipe.sources import without_pin
from weightsmith.serving.engine import Engine
from weightsmith.serving.fitting import WeightRoom
from weightsmith.serving.memory import human, parse_size
from weightsmith.serving.speculation import Speculation
from weightsmith.steps.destinations import Destination, InStore, moved
from weightsmith.steps.serve_options import serve_options
from weightsmith.steps.sizes import (
    calibration_memory,
    disk_peak,
    estimated_bytes,
    expected_projector,
    fewest_mixed_bits,
    kept_bytes,
)
from weightsmith.steps.stage_result import StageResult, Timer
from weightsmith.steps.step import (
    WEIGHTS,
    Foreseen,
    ForeseenWeights,
    Foresight,
    Results,
    State,
    Step,
    TargetStep,
)
from weightsmith.steps.tools import Tools

WALK_BUILDER = "gguf"
"""It has the kernels that a walk multiplies with, and they are in its pins."""
WALK_RECIPE_NUMBER = 2
LOSSES_RECIPE_NUMBER = 2

_STREAMING = 2 << 30
"""Memory limit of a quantizer that streams; a fifth of a gigabyte was measured."""
_PACKING = 4 << 30
"""Beside the checkpoint that a quantizer of packed checkpoints loads."""
_STREAMED = 512 << 20
"""For a few rows and the scales of one matrix."""
_GGUF = 1 << 30
_PROJECTOR = 1.02
"""Room for a projector, whose size is an estimate until it is made."""
_DRAFT = 1.02
"""Room for a draft that is not made yet; its file also has the vocabulary."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder with one of them has a tokenizer of its own."""
_MIXES = frozenset({MIX.name, COMPRESSED_MIX.name})
"""Formats with a budget."""
_OF_THE_JOB = ("builder_image", "network_in_jobs")
"""Facts that a runner adds to a job's result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """The user's options for one artifact; `options` are those that its format takes."""

    name: str
    """The model's name in the file's metadata."""
    format: Format
    options: Mapping[str, JsonValue] = field(default_factory=dict)
    texts: Texts | None = None
    """Calibration text; None if the format needs none."""
    statistics: Input | None = None
    """An existing measurement, such as the user's importance matrix."""
    measured_on: Tree | None = None
    """The checkpoint that importance is measured on, if it is another one: the base."""
    losses: Input | None = None
    """An existing measurement of what each type of each matrix loses."""


def inputs(checkpoint: Digest, options: QuantizeOptions) -> StageInputs:
    """Return everything that the quantized artifact depends on."""
    quantizer, texts = of_format(options.format.name), options.texts
    measured = options.measured_on.digest if options.measured_on else checkpoint
    walk = walked_inputs(measured, texts).key if texts and quantizer.walked(options.options) else ""
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


def losses_inputs(
    checkpoint: Digest, texts: Texts, options: Mapping[str, JsonValue], quantizer: Quantizer
) -> StageInputs:
    """Return what the losses by which a mix is chosen depend on; not on its budget."""
    return StageInputs(
        stage="losses",
        recipe_number=LOSSES_RECIPE_NUMBER,
        inputs={
            "checkpoint": checkpoint,
            "calibration": texts.calibration_digest,
            "importance": options.get("imatrix", "off"),
            "low": bool(options.get("low")),
            "types": quantizer.name,
            "builder": builder_pins(WALK_BUILDER),
        },
    )


def quantize(
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    to: Destination,
    tools: Tools,
    *,
    siblings: Sequence[QuantizeOptions] = (),
) -> StageResult[Artifact]:
    """Return the checkpoint quantized to a format in its builder, and read back.

    The `siblings`, formats that will be asked for next, are made in the same pass where that is
    possible, and stored. Raises InputRefused if the quantizer cannot read the model, CheckFailed if
    the output does not match the request.
    """
    format_ = options.format
    timer = Timer("quantize", format_.name, tools)
    if format_ == SAFETENSORS:
        artifact = Artifact(format=format_, tree=checkpoint.tree)
        return timer.done(artifact, cached=True)
    wanted, together = partial(inputs, checkpoint.digest, options), None
    group = [options, *_others(checkpoint, options, siblings, to)]
    if len(group) > 1 and not to.find(wanted):
        # The pass holds its first format's lock in the store while it stores the others. All builds
        # take the locks in the order of `_rank`, so that no two of them wait for each other.
        first, *others = sorted(group, key=_rank)
        together = to.files(
            partial(inputs, checkpoint.digest, first),
            partial(_run, checkpoint, first, others, to, tools),
            resume=True,
        )
    files = to.files(wanted, partial(_run, checkpoint, options, (), to, tools), resume=True)
    for text in files.meta.get("warnings", ()):
        tools.progress.warn(text)
    artifact = Artifact(format=format_, tree=files.tree, details=files.meta)
    return timer.done(artifact, cached=files.cached and (together is None or together.cached))


def _run(
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    siblings: Sequence[QuantizeOptions],
    to: Destination,
    tools: Tools,
    folder: Path,
) -> Mapping[str, JsonValue]:
    quantizer, size = of_format(options.format.name), checkpoint.tree.size
    others = _others(checkpoint, options, siblings, to)
    keeps = options.format.suffix != ".gguf" or "projector" in options.options
    model = read_facts(checkpoint.tree.texts) if keeps else None
    kept = kept_bytes(size, options.format, model)
    format_ = options.format
    if format_.name in _MIXES:
        weights = checkpoint.tree.weight_bytes
        format_ = nominal(options, weights, read_facts(checkpoint.tree.texts))
    peak = quantizer.peak_disk(size, kept, format_, options.options)
    # What one format needs while it is made, the others share.
    peak += sum(quantizer.peak_disk(size, kept, one.format, {}) for one in others)
    tools.store.require_room(peak, f"quantizing to {options.format.name}")
    texts = options.texts
    measures: dict[str, StageInputs] = {}  # by the name of the file
    if texts and quantizer.statistics and not options.statistics:
        if quantizer.walked(options.options):
            measured_on = options.measured_on or checkpoint.tree
            measures[quantizer.statistics] = walked_inputs(measured_on.digest, texts)
        elif not quantizer.weighs(options.options):
            own = statistics_inputs(checkpoint.digest, texts, quantizer)
            measures[quantizer.statistics] = own
    if texts and quantizer.weighs(options.options):
        measures[quantizer.losses] = losses_inputs(
            checkpoint.digest, texts, options.options, quantizer
        )
    given = {
        name: Input.file(earlier, name)
        for name, key in measures.items()
        if (earlier := to.find(partial(_same, key)))
    }
    if measures and given.keys() == measures.keys() and not quantizer.compensated:
        options = replace(options, texts=None)
    options = replace(
        options,
        statistics=given.get(quantizer.statistics, options.statistics),
        losses=given.get(quantizer.losses),
    )
    tools.runner.prepare(quantizer.builder, tools.progress)
    job = job_of(Input.checkpoint(checkpoint), size, options, folder)
    made_too = tuple(SiblingFormat(format=o.format.name, options=o.options) for o in others)
    job = replace(
        job,
        virtual=Virtual.of(checkpoint),
        siblings=made_too,
        seconds=job.seconds * (1 + len(others)),
    )
    facts: dict[str, Any] = dict(tools.runner.run(job, tools.progress))
    for name, key in measures.items():
        measured = folder / name
        if measured.is_file():
            to.keep(partial(_same, key), measured)
        measured.unlink(missing_ok=True)
    results = facts.pop("siblings", {})
    about = {key: facts[key] for key in _OF_THE_JOB if key in facts}
    for one, sibling in zip(others, made_too, strict=True):
        made = folder / sibling.folder
        found = {**results[one.format.name], **about}
        to.files(partial(inputs, checkpoint.digest, one), moved(made, found))
        discard(made)
    return facts


def _same(key: StageInputs) -> StageInputs:
    return key


def _rank(options: QuantizeOptions) -> tuple[bool, str]:
    """Return what sorts formats with statistics first: their pass can make the others, too."""
    return options.texts is None and options.statistics is None, options.format.name


def _others(
    checkpoint: Checkpoint,
    options: QuantizeOptions,
    siblings: Sequence[QuantizeOptions],
    to: Destination,
) -> list[QuantizeOptions]:
    """Return the formats that are missing and can be made in the same pass."""
    quantizer = of_format(options.format.name)

    def one_pass(first: QuantizeOptions, other: QuantizeOptions) -> bool:
        return quantizer.one_pass(first.format, first.options, other.format, other.options)

    return [
        one
        for one in siblings
        if of_format(one.format.name) == quantizer
        and one.format != options.format
        and one_pass(*sorted((options, one), key=_rank))
        and not to.find(partial(inputs, checkpoint.digest, one))
    ]


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
    walked = _is_walked(options)
    return writing + ((4 << 30) + 2 * size if walked else size)


def _is_walked(options: QuantizeOptions) -> bool:
    quantizer = of_format(options.format.name)
    return quantizer.walked(options.options) or quantizer.weighs(options.options)


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
        measured_on=Input.tree(options.measured_on) if options.measured_on else None,
        losses=options.losses,
        output=folder,
        memory_bytes=memory_limit(size, options),
        seconds=job_seconds(size, per_gb=per_gb, tokens=sum(len(str(row)) for row in texts)),
    )


def quantize_memory(model: ModelFacts, size: int, options: QuantizeOptions) -> int:
    """Return the peak of quantizing a checkpoint of `size` bytes, without mapped files.

    A GGUF file is written tensor by tensor, experts stacked, at most twice in float32; quantizers
    of packed checkpoints load the model, unless they stream it.
    """
    limit = memory_limit(size, options)
    if of_format(options.format.name).streams:
        return _STREAMED
    if options.texts and of_format(options.format.name).by_layer:
        compensated = of_format(options.format.name).compensated
        return min(calibration_memory(model, size, options.texts, compensated=compensated), limit)
    if options.format.suffix != ".gguf":
        return min(_PACKING + size, limit)
    try:
        shape, experts = model.shape, model.matrices.experts * model.matrices.expert_width
    except InputRefused:
        return min(UNKNOWN, limit)
    # Embeddings and heads are read a few rows at a time by every converter.
    largest = shape.hidden * max(shape.intermediate, experts)
    writing = min(_GGUF + 2 * 4 * largest, limit)
    if not _is_walked(options):
        return writing
    # One layer in float32, and the states of as many tokens as run together, while the converter
    # starts.
    walking = _GGUF + 2 * size // max(1, model.layers) + 4 * shape.hidden * WALK_TOKENS
    if of_format(options.format.name).weighs(options.options):  # states in front of all layers
        walking += 2 * shape.hidden * LOSS_TOKENS * model.layers
    return max(writing, walking + _GGUF)


def _recipe_options(
    file: RecipeFile,
    format_: Format,
    base: Snapshot,
    tools: Tools,
    *,
    unmerged: bool,
    fitting: int = 0,
) -> QuantizeOptions:
    """Return the options of a format; raises UsageError, or InputRefused for its files.

    A base that adapters lie beside (`unmerged`) has its own name, so that all recipes share it.
    `fitting` are the bytes that `quantize.fit` stands for.
    """
    if format_.name not in formats():  # the checkpoint itself, or a format made elsewhere
        return QuantizeOptions(name=file.recipe.name, format=format_)
    scheme, _, place = base.source.partition("://")
    if scheme == "hf":
        owner, _, name = place.partition("@")[0].rpartition("/")
        url = f"https://huggingface.co/{owner}/{name}"
        origin = {"name": name, "organization": owner, "repo_url": url}
    elif scheme == "pypi":
        name, _, version = place.partition("==")
        url = f"https://pypi.org/project/{name}/"
        origin = {"name": name, "version": version, "repo_url": url}
    else:  # of a folder, without its path
        origin = {"name": public_name(without_pin(base.source))}
    about: dict[str, JsonValue] = {"base_models": [origin]}
    if file.recipe.base.license:
        about["license"] = file.recipe.base.license
    settings = file.recipe.quantize.model_dump()
    if fitting:
        settings |= {"fit": "", "size": f"{fitting}B"}
    if settings["imatrix"] not in IMATRIX_WORDS:
        settings["imatrix"] = str(file.folder / settings["imatrix"])
    if settings["mix"]:
        settings["mix"] = str(file.folder / settings["mix"])
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", origin["name"]).strip("-.") or "base"
    name = name if unmerged else file.recipe.name
    found = format_options(name, format_, settings, about, base.tree, tools)
    if unmerged:
        chosen = of_format(format_.name).beside_adapters(format_, found.options)
        found = replace(found, options=chosen)
    if not needs_text(found):
        return found
    shared = found.options.get("shared_layers") and not unmerged
    return replace(found, texts=texts_of(file), measured_on=base.tree if shared else None)


def format_options(
    name: str,
    format_: Format,
    settings: Mapping[str, JsonValue],
    about: Mapping[str, JsonValue],
    model: Tree,
    tools: Tools,
) -> QuantizeOptions:
    """Return the options that a format takes, with the digest of an importance matrix.

    `model` is the checkpoint, or the base that it will be merged from.
    """
    given = str(settings.get("imatrix", ""))
    path = None if given in IMATRIX_WORDS else Path(given).absolute()
    if path is not None and not path.is_file():
        raise InputRefused(
            f"{path}: no such importance matrix", hint="give auto, walk, off or a file"
        )
    quantizer, facts = of_format(format_.name), read_facts(model.texts)
    if format_.name in _MIXES:
        settings = _with_budget(settings, format_)
    options = {**quantizer.options(format_, settings), **quantizer.options_of_model(facts)}
    if "imatrix" in options and facts.task.kind != "generate":
        options["imatrix"] = _without_importance(format_, options["imatrix"], given, facts)
    if options.get("imatrix") == "auto" and not given:
        options["imatrix"] = measured_by(facts, model.weight_bytes)
    statistics = None
    if path is not None and options.get("imatrix", "off") not in IMATRIX_WORDS:
        entry = tools.store.digest_file(path)
        statistics = Input.file(Tree(root=path.parent, files=(entry,)), entry.path)
        options["imatrix"] = entry.digest
    if about:
        options["about"] = dict(about)
    return QuantizeOptions(name=name, format=format_, options=options, statistics=statistics)


def _with_budget(settings: Mapping[str, JsonValue], format_: Format) -> Mapping[str, JsonValue]:
    """Return settings with a mix's size in bytes, and what its file says instead of its path.

    Raises UsageError for a size of nothing.
    """
    size, mix = str(settings.get("size") or ""), str(settings.get("mix") or "")
    kinds = KINDS if format_.name == COMPRESSED_MIX.name else ()
    if size and not parse_size(size):
        raise UsageError(
            f"quantize.size: no weights have {size}",
            hint="set it to what the file may have, such as 8GB",
        )
    return {
        **settings,
        **({"size": parse_size(size)} if size else {}),
        **({"mix": read_mix(Path(mix).absolute(), kinds)} if mix else {}),
    }


def _smallest_mix(weights: int, format_: Format, model: ModelFacts, *, low: bool) -> int:
    """Return about the bytes of the smallest mix of a checkpoint of `weights` bytes, or fewer."""
    if format_.name == COMPRESSED_MIX.name:  # embeddings and head stay
        least = replace(format_, bits_per_weight=compressed_mix.fewest_bits(model))
        return estimated_bytes(weights, least, model)
    return int(_in_16_bits(weights, format_, model) * fewest_mixed_bits(model, low=low) / 16)


def _in_16_bits(weights: int, format_: Format, model: ModelFacts) -> int:
    return estimated_bytes(weights, replace(format_, bits_per_weight=16.0), model)


def nominal(options: QuantizeOptions, weights: int, model: ModelFacts) -> Format:
    """Return the format with the bits per weight that groups of the chosen size or a mix will have.

    They are those of the weights that do not stay in 16 bits; of a mix about, and of one that is
    given, the mean over its matrices, whatever their sizes. `weights` are the checkpoint's in
    bytes. Raises InputRefused for a budget that no mix can have.
    """
    format_, chosen = options.format, options.options
    whole, low = _in_16_bits(weights, format_, model), bool(chosen.get("low"))
    size, bits = int(str(chosen.get("size") or 0)), float(str(chosen.get("bits") or 0))
    if isinstance(mix := chosen.get("mix"), dict):
        each = (_bits_of(str(kind), format_) for kind in mix.values())
        return replace(format_, bits_per_weight=fmean(each))
    if not (size or bits):
        return in_groups_of(format_, model, chosen)
    # A weight less than the smallest type has is refused here, the rest once headers are known.
    wanted, least = size or int(whole * bits / 16), _smallest_mix(weights, format_, model, low=low)
    if least > wanted:
        key = "quantize.size" if size else "quantize.bits"
        more = min(17.6 * least / whole, 16)
        near = f"{-(-least * 11 // 10) // 10**6 + 1}MB" if size else f"{more:.2f}"
        raise InputRefused(
            f"{key}: no mix of this model has {human(wanted)}: its weights have "
            f"{human(least)} with the smallest types",
            hint=f"set {key} to {near} or more"
            + (
                ""
                if low or format_.name != MIX.name
                else ", or quantize.allow_low_bits for smaller types"
            ),
        )
    if format_.name == MIX.name:  # a larger budget is not used up
        largest = estimated_bytes(weights, formats()[UNMIXED], model)
        return replace(format_, bits_per_weight=16 * min(wanted, largest) / whole)
    if wanted >= weights:
        raise InputRefused(
            "the budget has room for all weights in 16 bits: nothing would be quantized",
            hint=NOTHING,
        )
    kept = kept_bytes(whole, format_, model)
    return replace(format_, bits_per_weight=min(16.0, 16 * (wanted - kept) / max(1, whole - kept)))


def _bits_of(kind: str, format_: Format) -> float:
    """Return about how many bits a weight has in a type of a mix."""
    if format_.name == COMPRESSED_MIX.name:
        return TYPES[kind].format.bits_per_weight if kind in TYPES else 16.0
    return FILE_TYPES[kind if kind in FILE_TYPES else guessed_type([kind])].bits


def _without_importance(
    format_: Format, chosen: JsonValue, given: str, model: ModelFacts
) -> JsonValue:
    """Return the importance matrix of a model that does not chat: only one that is given.

    llama-imatrix and our walk measure on texts that a model continues. Raises UsageError where one
    of them is asked for, or the format needs one.
    """
    if chosen not in ("auto", "walk"):
        return chosen
    if given or format_.name in _MIXES or FILE_TYPES[format_.name].needs_imatrix:
        wanted = f"quantize.imatrix {given}" if given else format_.name
        raise UsageError(
            f"{wanted}: {model.architecture} {model.task.does}, and importance is measured on texts"
            " that a model continues",
            hint="choose q4_k_m or more bits without imatrix, or give the file of a matrix",
        )
    return "off"


def needs_text(options: QuantizeOptions) -> bool:
    """Return whether the format needs calibration text."""
    return of_format(options.format.name).calibrated(options.format, options.options)


def check_model(options: QuantizeOptions, model: ModelFacts) -> None:
    """Raise InputRefused if the quantizer does not support the model; reads only its config."""
    quantizer = of_format(options.format.name)
    quantizer.check_input(options.format, model)
    quantizer.check_options(model, options.options)
    if options.measured_on and (base := read_facts(options.measured_on.texts)):
        check_plain(base)
        if base.layers != model.layers:
            raise InputRefused(
                f"the base has {base.layers} layers and the merged model {model.layers}, so "
                "importance measured on the base is not that of its layers",
                hint="leave quantize.shared_layers out, or give an importance matrix",
            )
    if options.statistics and quantizer.check_statistics:
        quantizer.check_statistics(options.statistics.path, model)


@dataclass(frozen=True, eq=False, kw_only=True)
class QuantizeStep(TargetStep[Artifact, ForeseenWeights]):
    """Makes a checkpoint's weights in a format; gives the checkpoint where that packs nothing."""

    name = WEIGHTS
    in_every_plan = True
    prefetched = True

    sources: Step[Sources, Sources]
    checkpoint: Step[Checkpoint, ForeseenWeights]
    format: Format
    in_one_pass: tuple[Format, ...] = ()
    """Formats that the build's other targets need, and that may be made in the same pass."""

    @property
    def options(self) -> Writable:
        """The format, and how it is made."""
        recipe = self.file.recipe
        calibration = recipe.calibration and recipe.calibration.model_dump(mode="json")
        found: list[Writable] = [
            self.format.name,
            recipe.quantize.model_dump(mode="json"),
            calibration,
        ]
        if self._fits(self.format):
            found.append([self.of.target.engine.name, recipe.serve.model_dump(mode="json")])
        return found

    def foresee(self, seen: Foresight) -> Foreseen[ForeseenWeights]:
        """Return the weights as they will be; refuses what the quantizer would, by its config."""
        checkpoint, tools, format_ = seen[self.checkpoint], seen.tools, self.format
        model, size = checkpoint.model, checkpoint.size
        if not format_.packed:
            return Foreseen(value=checkpoint)
        if format_.name not in formats():
            estimate = estimated_bytes(checkpoint.weight_bytes, format_, model)
            value = ForeseenWeights(model=model, size=estimate, weight_bytes=estimate)
            state = State(cached=False, why=f"no installed quantizer makes {format_.name}")
            return Foreseen(value=value, rows=(self.row(state, read=size),))
        options = self._asked(format_, seen[self.sources], tools, model, checkpoint.weight_bytes)
        note = self._note(options)
        format_ = nominal(options, checkpoint.weight_bytes, model)
        estimate = estimated_bytes(checkpoint.weight_bytes, format_, model)
        value = ForeseenWeights(
            model=model, size=estimate, weight_bytes=estimate, planned=estimate, note=note
        )
        state = State(cached=False, why=checkpoint.missing)
        if checkpoint.tree:
            stage = inputs(checkpoint.tree.digest, options)
            state, entry = seen.state(self, stage), tools.store.find(stage.key)
            if entry:
                tree = entry.tree
                value = replace(value, size=tree.size, weight_bytes=tree.weight_bytes, tree=tree)
            else:
                state = replace(state, why=f"{state.why} ({of_format(format_.name).name})")
        row = self.row(
            state,
            read=size,
            write=estimated_bytes(size, format_, model),
            memory=quantize_memory(model, size, options),
            disk=disk_peak(size, format_, model, options.options),
        )
        return Foreseen(value=value, rows=(row,))

    def _asked(
        self, format_: Format, sources: Sources, tools: Tools, model: ModelFacts, size: int
    ) -> QuantizeOptions:
        """Return the options of a format for a checkpoint of `size` bytes."""
        unmerged, base = self.of.target.format.unmerged, sources.base
        fits = self._fits(format_)
        fitting = self._fitting(format_, model, size, sources.draft) if fits else 0
        return _recipe_options(self.file, format_, base, tools, unmerged=unmerged, fitting=fitting)

    def _fits(self, format_: Format) -> bool:
        """Return whether a format's budget is what the GPU has room for, and nothing else."""
        given = self.file.recipe.quantize
        others = given.bits or given.size or given.mix
        return format_.name in _MIXES and bool(given.fit) and not others

    def _fitting(
        self, format_: Format, model: ModelFacts, size: int, draft: Snapshot | None
    ) -> int:
        """Return the bytes that the GPU has room for; raises UsageError where no mix fits."""
        if self.of.target.format.unmerged:
            raise UsageError(
                f"quantize.fit: {self.of.target.name} has adapters beside its weights, whose room "
                "on the GPU is not planned here",
                hint="give the budget as quantize.size, or merge the adapters",
            )
        projector = expected_projector(self.of.target, model)
        beside = int(projector.size * _PROJECTOR) if projector else 0
        serve = self.file.recipe.serve
        options = replace(serve_options(serve), format=format_, projector_bytes=beside)
        if draft and options.speculation:
            options = replace(options, speculation=self._drafting(options.speculation, draft))
        room = WeightRoom.of(self.of.target.engine, model, options)
        low = self.file.recipe.quantize.allow_low_bits
        least = beside + _smallest_mix(size, format_, model, low=low)
        if (found := room.bytes) >= least:
            return found - beside
        shorter, gpu = room.longest(least), serve.gpu or "the GPU"
        raise UsageError(
            f"quantize.fit: {room.tokens} tokens of {room.options.max_num_seqs} requests leave"
            f" {human(found)} for weights on {gpu}, and the smallest mix of this model has about"
            f" {human(least)}",
            hint=(f"set serve.max_model_len to {shorter}, or " if shorter else "")
            + "choose fewer requests, serve.kv_cache_dtype: fp8 or a larger GPU",
        )

    def _drafting(self, wanted: Speculation, draft: Snapshot) -> Speculation:
        """Return what drafts with the room that its weights will take."""
        drafts, tree = read_facts(draft.tree.texts), draft.tree
        made = draft_format(self.of.target.engine)
        size = int(estimated_bytes(tree.weight_bytes, made, drafts) * _DRAFT) if made.packed else 0
        return replace(wanted, draft=drafts, weight_bytes=size or tree.weight_bytes)

    def _note(self, options: QuantizeOptions) -> str:
        """Return what a plan says of a budget that was worked out."""
        if not self._fits(options.format):
            return ""
        serve = self.file.recipe.serve
        many = serve.max_num_seqs if serve.max_num_seqs != "auto" else 1
        return (
            f"quantize.fit: {human(int(str(options.options['size'])))} for the weights are what "
            f"{serve.gpu or 'the GPU'} has left beside {many} request{'s' * (many != 1)} of"
            f" {serve.max_model_len} tokens"
        )

    def permit(self, seen: Foresight) -> None:
        """Raise InputRefused if the quantizer does not support the model."""
        if self.format.packed and self.format.name in formats():
            checkpoint = seen[self.checkpoint]
            model, size = checkpoint.model, checkpoint.weight_bytes
            sources = seen[self.sources]
            options = self._asked(self.format, sources, seen.tools, model, size)
            check_model(options, model)
            folders = [sources.base.tree.texts]
            if not self.of.target.format.unmerged:  # the last one's counts (merging/companions.py)
                folders += [adapter.snapshot.tree.texts for adapter in sources.adapters]
            own = [one for one in folders if any((one / n).is_file() for n in _TOKENIZERS)]
            if own:
                of_format(self.format.name).check_files(own[-1], model)

    def run(self, have: Results, tools: Tools) -> StageResult[Artifact]:
        """Return the weights; raises as `quantize` does."""
        sources, tree = have[self.sources], have[self.checkpoint].tree
        made = read_facts(tree.texts), tree.weight_bytes
        options = self._asked(self.format, sources, tools, *made)
        others = [
            self._asked(one, sources, tools, *made)
            for one in dict.fromkeys(self.in_one_pass)
            if one != self.format
        ]
        return quantize(
            have[self.checkpoint], options, InStore(tools.store), tools, siblings=others
        )

    def inputs(self, have: Results, tools: Tools) -> StageInputs | None:
        """Return what the weights depended on."""
        if not self.format.packed:
            return None
        checkpoint = have[self.checkpoint]
        model, size = read_facts(checkpoint.tree.texts), checkpoint.tree.weight_bytes
        options = self._asked(self.format, have[self.sources], tools, model, size)
        return inputs(checkpoint.digest, options)

    def builders(self) -> tuple[str, ...]:
        """Return the quantizer's builder."""
        packed = self.format.packed and self.format.name in formats()
        return (of_format(self.format.name).builder,) if packed else ()


def draft_format(engine: Engine) -> Format:
    """Return the format in which an image of the engine has what drafts."""
    return formats()["q8_0"] if "gguf" in engine.accepts else SAFETENSORS


@dataclass(frozen=True, eq=False, kw_only=True)
class DraftStep(QuantizeStep):
    """Makes what drafts in a format of its own, whatever the recipe says of the model's."""

    name = "draft"
    in_every_plan = False
    prefetched = False

    @property
    def file(self) -> RecipeFile:
        """The recipe as one of the draft alone."""
        file = self.of.file
        recipe, draft = file.recipe, file.recipe.draft
        base = Base.model_validate(draft.model_dump()) if draft else recipe.base
        return replace(file, recipe=recipe.changed(base=base, quantize=Quantize()))

    def _asked(
        self, format_: Format, sources: Sources, tools: Tools, _model: ModelFacts, _size: int
    ) -> QuantizeOptions:
        return _recipe_options(self.file, format_, sources.base, tools, unmerged=True)
