"""Converts a recipe's sections to the options of stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from weightsmith.checkpoints.facts import ModelFacts, read_facts
from weightsmith.errors import InputRefused, UsageError
from weightsmith.job_inputs import Input
from weightsmith.merging.left_out import require_all_targeted
from weightsmith.planning.foreseen import ForeseenTree
from weightsmith.ports import Progress
from weightsmith.provenance.labels import public_name
from weightsmith.quantizers import formats, of_format
from weightsmith.quantizers.calibration import GENERAL, Texts, read_texts
from weightsmith.quantizers.gguf_calibration import IMATRIX_WORDS, measured_by
from weightsmith.recipe import Serve, TextBounds
from weightsmith.recipe_file import RecipeFile
from weightsmith.serving.engine import ServedAdapter, ServeOptions
from weightsmith.serving.memory import parse_size
from weightsmith.serving.targets import Target
from weightsmith.stages.quantize import QuantizeOptions
from weightsmith.stages.unmerged import served_adapters
from weightsmith.tools import Tools
from weightsmith.values import LORA, Digest, Format, Json, Snapshot, Sources, Tree

_LEAST_MEMORY = 1 << 20
"""Bytes; less is a number without its unit."""


def serve_options(serve: Serve) -> ServeOptions:
    """Return the recipe's `serve` section in the planner's units; both have the same defaults."""
    given = serve.model_dump(exclude_defaults=True, exclude={"kv_cache_scales"})
    for ours, theirs in (("gpu_memory", "gpu_memory_bytes"), ("memory", "host_memory_bytes")):
        if ours in given:
            given[theirs] = _memory(ours, given.pop(ours))
    return ServeOptions(**given)


def _memory(key: str, text: str) -> int:
    """Return a memory's bytes; raises UsageError for a number that lacks its unit."""
    size = parse_size(text)
    if size < _LEAST_MEMORY:
        raise UsageError(
            f"serve.{key} {text} is {size} bytes", hint="write it with its unit, such as 24GiB"
        )
    return size


def texts_of(file: RecipeFile) -> Texts:
    """Return the recipe's calibration and held-out texts; by default, general ones.

    Evaluation questions are never used: a loss measured on them says nothing about other texts.
    Raises InputRefused for malformed text.
    """
    calibration = file.recipe.calibration
    if calibration is None:
        return read_texts(GENERAL, TextBounds())
    return read_texts(file.folder / calibration.data, calibration)


def quantize_options(
    file: RecipeFile, format_: Format, base: Snapshot, tools: Tools
) -> QuantizeOptions:
    """Return the options of a format; raises UsageError, or InputRefused for its files."""
    if format_.name not in formats():  # the checkpoint itself, or a format made elsewhere
        return QuantizeOptions(name=file.recipe.name, format=format_)
    about: dict[str, Json] = {"base_models": [_origin(base)]}
    if file.recipe.base.license:
        about["license"] = file.recipe.base.license
    settings = file.recipe.quantize.model_dump()
    if settings["imatrix"] not in IMATRIX_WORDS:
        settings["imatrix"] = str(file.folder / settings["imatrix"])
    found = format_options(file.recipe.name, format_, settings, about, base.tree, tools)
    return replace(found, texts=texts_of(file)) if needs_text(found) else found


def format_options(
    name: str,
    format_: Format,
    settings: Mapping[str, Json],
    about: Mapping[str, Json],
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
    options = {**quantizer.options(format_, settings), **quantizer.options_of_model(facts)}
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


def needs_text(options: QuantizeOptions) -> bool:
    """Return whether the format needs calibration text."""
    return of_format(options.format.name).calibrated(options.format, options.options)


def check_model(options: QuantizeOptions, model: ModelFacts) -> None:
    """Raise InputRefused if the quantizer does not support the model; reads only its config."""
    quantizer = of_format(options.format.name)
    quantizer.check_input(options.format, model)
    quantizer.check_options(model, options.options)
    if options.statistics and quantizer.check_statistics:
        quantizer.check_statistics(options.statistics.path, model)


def _origin(base: Snapshot) -> dict[str, str]:
    """Return the base model's name for GGUF metadata; for a folder, its name without the path."""
    scheme, _, place = base.source.partition("://")
    if scheme == "hf":
        owner, _, name = place.partition("@")[0].rpartition("/")
        url = f"https://huggingface.co/{owner}/{name}"
        return {"name": name, "organization": owner, "repo_url": url}
    if scheme == "pypi":
        name, _, version = place.partition("==")
        return {"name": name, "version": version, "repo_url": f"https://pypi.org/project/{name}/"}
    return {"name": public_name(base.source)}


def warn_of_texts(file: RecipeFile, progress: Progress) -> None:
    """Read the texts now, and warn if they are general or few."""
    texts = texts_of(file)
    if file.recipe.calibration is None:
        count = len(texts.calibration) + len(texts.held_out)
        progress.warn(
            f"the recipe has no `calibration`: {count} general texts are used (never the evaluation"
            " questions: calibrating on them would hide losses on other text)"
        )
    elif texts.warning():
        progress.warn(texts.warning())


def sources_to_merge(targets: Sequence[Target], sources: Sources) -> Sources:
    """Return the sources to merge, without adapters if every target serves them unmerged."""
    served = all(target.format == LORA for target in targets)
    return replace(sources, adapters=()) if served else sources


def needs_files(targets: Sequence[Target]) -> bool:
    """Return whether a target needs the merged weights as files.

    Some quantizers read base and adapters instead, and targets without merging need neither.
    """
    wanted = {target.format for target in targets if target.format != LORA}
    return not all(one.name in formats() and of_format(one.name).computed for one in wanted)


def unmerged_adapters(
    file: RecipeFile, target: Target, sources: Sources
) -> tuple[ServedAdapter, ...]:
    """Return the adapters that a target serves unmerged; () for a merged target.

    Raises UsageError if the recipe cannot evaluate them separately, InputRefused for adapters that
    cannot be served.
    """
    if target.format != LORA:
        return ()
    if len(sources.adapters) > 1 and file.recipe.evaluate is not None:
        raise UsageError(
            f"{target.name} serves {len(sources.adapters)} adapters separately, but the recipe's"
            " `evaluate` tests them together",
            hint="give each adapter its own `evaluate`",
        )
    found = served_adapters(sources, gguf="gguf" in target.engine.accepts)
    if isinstance(sources.base.tree, ForeseenTree):
        return found
    for adapter in sources.adapters:
        own = adapter.snapshot
        _require_all_targeted(sources.base.tree.root, own.tree.root, own.digest)
    return found


@lru_cache(maxsize=4096)
def _require_all_targeted(base: Path, adapter: Path, _digest: Digest) -> None:
    """Do so once for each adapter: a build asks for its adapters more than once."""
    require_all_targeted(base, adapter)
