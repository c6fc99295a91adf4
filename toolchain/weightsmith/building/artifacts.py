"""What a recipe wants of each format: options, calibration text, and the gate's limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from weightsmith.errors import CheckFailed, InputRefused
from weightsmith.evaluating.limits import judge, limits_for, refusal
from weightsmith.ports import Progress, Tools
from weightsmith.provenance.labels import public_name
from weightsmith.quantizers import formats, of_format
from weightsmith.quantizers.calibration import GENERAL, Bounds, Texts, read_texts
from weightsmith.recipe_file import RecipeFile
from weightsmith.stages.quality import quality
from weightsmith.stages.quantize import QuantizeOptions
from weightsmith.values import Artifact, Checkpoint, Format, Json, Snapshot


def network_in_jobs(checkpoint: Checkpoint, artifact: Artifact | None, tools: Tools) -> bool:
    """Say whether a job had the machine's network: one of now, or one that made what is cached."""
    made = (checkpoint.details, artifact.details if artifact else {})
    return tools.runner.networked or any(details.get("network_in_jobs") for details in made)


def texts_of(file: RecipeFile) -> Texts:
    """Return the recipe's calibration and held-out texts; the general ones where it names none.

    The evaluation's questions never stand in for them: what is measured on them would not show
    how the model does on others. Raises InputRefused for text that is malformed.
    """
    wanted = file.recipe.calibration
    if wanted is None:
        return read_texts(GENERAL, Bounds())
    bounds = Bounds(**wanted.model_dump(exclude={"data"}))
    return read_texts(file.folder / wanted.data, bounds)


def wanted_of(file: RecipeFile, format_: Format, base: Snapshot, tools: Tools) -> QuantizeOptions:
    """Return what a recipe wants of a format; raises UsageError, and InputRefused for its files."""
    if format_.name not in formats():  # the checkpoint itself, or what only others make
        return QuantizeOptions(name=file.recipe.name, format=format_)
    about: dict[str, Json] = {"base_models": [_origin(base)]}
    if file.recipe.base.license:
        about["license"] = file.recipe.base.license
    wishes = file.recipe.quantize.model_dump()
    if wishes["imatrix"] not in {"", "auto", "off"}:
        wishes["imatrix"] = str(file.folder / wishes["imatrix"])
    found = make_wanted(file.recipe.name, format_, wishes, about, tools)
    return replace(found, texts=texts_of(file)) if needs_text(found) else found


def make_wanted(
    name: str,
    format_: Format,
    wishes: Mapping[str, Json],
    about: Mapping[str, Json],
    tools: Tools,
) -> QuantizeOptions:
    """Return a format's own part of the wishes; statistics that a user gave, by their digest."""
    quantizer = of_format(format_.name)
    options = dict(quantizer.options(format_, wishes))
    statistics = None
    if options.get("imatrix", "auto") not in {"auto", "off"}:
        statistics = Path(str(options["imatrix"])).absolute()
        if not statistics.is_file():
            raise InputRefused(
                f"{statistics}: no such importance matrix", hint="give auto, off or a file"
            )
        options["imatrix"] = tools.store.digest_file(statistics).digest
    if about:
        options["about"] = dict(about)
    return QuantizeOptions(name=name, format=format_, options=options, statistics=statistics)


def needs_text(wanted: QuantizeOptions) -> bool:
    """Say whether a format measures activations."""
    return of_format(wanted.format.name).calibrated(wanted.format, wanted.options)


def check_model(wanted: QuantizeOptions, config: Mapping[str, Json]) -> None:
    """Raise InputRefused for a model that the quantizer cannot make of, from its config alone."""
    quantizer = of_format(wanted.format.name)
    quantizer.check_input(wanted.format, config)
    quantizer.check_options(config, wanted.options)
    if wanted.statistics and quantizer.check_statistics:
        quantizer.check_statistics(wanted.statistics, config)


def _origin(base: Snapshot) -> dict[str, str]:
    """Return the base model as GGUF metadata spell it; a folder's name without the path to it."""
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
    """Read the texts now, and say what they are where that is not what one would think."""
    texts = texts_of(file)
    if file.recipe.calibration is None:
        count = len(texts.calibration) + len(texts.held_out)
        progress.warn(
            f"the recipe has no `calibration`: {count} general texts are used, and never its"
            " evaluation questions: calibrating on them would hide what is lost on others"
        )
    elif texts.warning():
        progress.warn(texts.warning())


def with_quality(
    file: RecipeFile, checkpoint: Checkpoint, artifact: Artifact, tools: Tools
) -> Artifact:
    """Return the artifact with its measured `quality`, limits and verdict among its details."""
    if not artifact.format.packed:
        return artifact
    wanted = file.recipe.quality
    texts = texts_of(file)
    found = dict(quality(checkpoint, artifact, texts, wanted.tokens, tools))
    if "skipped" in found:
        tools.progress.warn(f"quality not measured: {found['skipped']}")
    else:
        general = bool(texts.general)
        verdict = judge(found, limits_for(artifact.format, wanted, general=general))
        found |= {"limits": verdict.limits, "exceeded": verdict.exceeded}
        found["calibration"] = texts.described()
    return replace(artifact, details={**artifact.details, "quality": found})


def quality_fault(file: RecipeFile, artifact: Artifact) -> CheckFailed | None:
    """Return the error of an artifact that lost more than its limits; None for any other."""
    found = artifact.details.get("quality", {})
    if not found.get("exceeded") or not file.recipe.quality.gate:
        return None
    return refusal(artifact.format, found)
