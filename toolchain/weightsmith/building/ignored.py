"""Refuses settings that nothing of a build reads: whoever wrote one expects it to hold."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from weightsmith.building.targets import AUTO, all_targets, target_of
from weightsmith.core.errors import UsageError
from weightsmith.core.values import Format
from weightsmith.quantizers import formats, of_format
from weightsmith.quantizers.quantizer import Options
from weightsmith.recipe.schema import Quantize, Recipe
from weightsmith.serving import parsers as serving_parsers
from weightsmith.serving.targets import Target
from weightsmith.steps.healthcheck import wants_probe

_NEVER_REFUSED = {"allow_low_bits", "allow_text_only", "imatrix"}
"""Keys of `quantize` that only permit something, or that formats of many bits may ignore."""
_SHOWN = 3


def check_read(recipe: Recipe, targets: Iterable[Target], *, auto: bool) -> None:
    """Raise UsageError for a setting that no target of a build reads.

    The recipe's own targets count beside those to be built: one of several may be built alone.
    `auto` says whether one is to be chosen of all formats of some engines.
    """
    if recipe.replay.read_weights and not wants_probe(recipe):
        raise UsageError(
            "replay.read_weights: no startup probe asks these images, and it is the one that reads",
            hint="add `evaluate`, with `replay.keep: questions` and `replay.probe: true`, or leave "
            "replay.read_weights out",
        )
    auto = auto or AUTO in recipe.targets
    built = [*targets, *(target_of(name) for name in recipe.targets if name != AUTO)]
    if recipe.auto and not auto:
        raise UsageError(
            f"the recipe has `auto`, and no target is {AUTO}",
            hint=f"add {AUTO} to its targets (--target {AUTO}), or leave `auto` out",
        )
    if auto:
        _check_candidates(recipe, built)
    elif built:
        _check_parsers(recipe, built)
        check_quantize(recipe, built, Quantize.model_fields)


def _check_candidates(recipe: Recipe, built: Sequence[Target]) -> None:
    """Raise UsageError for a key of `quantize` that no format reads of which one is chosen.

    What fixes the choice is left to `settings_of` in choosing.py.
    """
    wanted = recipe.auto.engine if recipe.auto else ()
    given, usual = recipe.quantize.model_dump(), Quantize().model_dump()
    for key in given if wanted else ():
        without = {**given, key: usual[key]}
        if key in _NEVER_REFUSED or given[key] == usual[key]:
            continue
        if any(_differ(one.format.without_adapters, given, without) for one in built):
            continue
        read = {one.engine.name for one in all_targets().values() if _reads(one, given, without)}
        if not read.intersection(wanted):
            others = (
                f", or name engines in auto.engine of which it is read: {', '.join(sorted(read))}"
            )
            raise UsageError(
                f"quantize.{key}: no format of {' or '.join(wanted)} reads it, of which {AUTO}"
                " chooses one",
                hint="leave it out" + (others if read else ""),
            )


def check_quantize(recipe: Recipe, built: Sequence[Target], keys: Collection[str]) -> None:
    """Raise UsageError for one of these keys of `quantize` if none of some targets reads it."""
    given, usual = recipe.quantize.model_dump(), Quantize().model_dump()
    for key in keys:
        if key in _NEVER_REFUSED or given[key] == usual[key]:
            continue
        without = {**given, key: usual[key]}
        if not any(_differ(target.format.without_adapters, given, without) for target in built):
            more = ", nor does another target" if len({one.name for one in built}) > 1 else ""
            others = _readers(given, without, built[0].engine.name)
            instead = f", or build a target that does: {others}" if others else ""
            raise UsageError(
                f"quantize.{key}: {built[0].name} does not read it{more}",
                hint=f"leave it out{instead}",
            )


def _check_parsers(recipe: Recipe, built: Sequence[Target]) -> None:
    """Raise UsageError for a parser that is named and no engine takes; llama.cpp has its own."""
    named = recipe.serve.tool_parser, recipe.serve.reasoning_parser
    for key, name in zip(("tool_parser", "reasoning_parser"), named, strict=True):
        if name in (serving_parsers.AUTO, serving_parsers.NONE):
            continue
        if not any(target.engine.has_parsers for target in built):
            raise UsageError(
                f"serve.{key} is {name!r}, and {built[0].engine.title} takes no parser: it reads"
                " calls and thoughts by the chat template",
                hint="leave it out, or build a target of vLLM or SGLang",
            )


def _readers(given: Options, without: Options, engine: str) -> str:
    """Return some targets that read what differs, those of `engine` first; "" if none takes it."""
    names = [name for name, one in all_targets().items() if _reads(one, given, without)]
    found = sorted(names, key=lambda name: not name.startswith(f"{engine}-"))
    return ", ".join(found[:_SHOWN]) + (" …" if len(found) > _SHOWN else "")


def _reads(target: Target, given: Options, without: Options) -> bool:
    """Return whether a target takes these options, and reads what differs."""
    if target.format.unmerged or (read := _options(target.format, given)) is None:
        return False
    return read != _options(target.format, without)


def _differ(format_: Format, given: Options, without: Options) -> bool:
    """Return whether a format's options differ, or are refused, which it says itself."""
    read = _options(format_, given)
    return read is None or read != _options(format_, without)


def _options(format_: Format, given: Options) -> Options | None:
    """Return what a format's quantizer reads; None for what it refuses."""
    if format_.name not in formats():
        return {}
    try:
        return of_format(format_.name).options(format_, given)
    except UsageError:
        return None
