"""Lists all targets, and chooses those of a build."""

from __future__ import annotations

from collections.abc import Mapping

from weightsmith.core.errors import UsageError
from weightsmith.core.values import AWQ, FP8, GPTQ, LORA, Format, beside
from weightsmith.quantizers import formats, quantizers
from weightsmith.recipe.file import RecipeFile
from weightsmith.serving import targets as serving_targets
from weightsmith.serving.targets import Target

AUTO = "auto"
"""The target that a build chooses itself."""


def chosen_targets(
    file: RecipeFile, names: tuple[str, ...], *, to_build: bool = False, auto: bool = False
) -> tuple[Target, ...]:
    """Return the targets to build: those named, else the recipe's.

    Raises UsageError for an unknown target; with `to_build`, also for one that cannot be made.
    `auto` is none of them: whoever can choose one says so, all others refuse it.
    """
    known = all_targets()
    requested = names or file.recipe.targets
    if AUTO in requested and not auto:
        raise UsageError(
            f"the target {AUTO} is chosen by a build of its own",
            hint="name the target that `build` chose; its build.json has it",
        )
    chooses, requested = AUTO in requested, tuple(name for name in requested if name != AUTO)
    if not requested and not chooses:
        raise UsageError(
            "no target: neither --target nor the recipe names one",
            hint="`invoke targets` lists them",
        )
    chosen = tuple({found.name: found for found in map(target_of, requested)}.values())
    for target in chosen:
        if to_build and not can_make(target.format):
            buildable = [name for name, t in known.items() if can_make(t.format)]
            raise UsageError(
                f"{target.name} needs {target.format.name} weights, which no installed quantizer"
                " makes",
                hint=f"choose one of: {', '.join(buildable)}",
            )
    return chosen


def wants_auto(file: RecipeFile, names: tuple[str, ...]) -> bool:
    """Return whether one of the targets is to be chosen."""
    return AUTO in (names or file.recipe.targets)


def target_of(name: str) -> Target:
    """Return the target of that name; UsageError if there is none.

    An engine's name alone is that of its default: `llamacpp` means `llamacpp-q4_k_m`.
    """
    known = all_targets()
    defaults = (f"{name}-{quantizer.default}" for quantizer in quantizers().values())
    whole = name if name in known else next((one for one in defaults if one in known), name)
    return serving_targets.find(whole, known)


def can_make(format_: Format) -> bool:
    """Return whether a quantizer makes the format, or none is needed."""
    own = format_.without_adapters
    return not own.packed or own.name in formats()


def all_targets() -> Mapping[str, Target]:
    """Return every target: all engines with the formats that they load, found in their folders."""
    return serving_targets.targets(all_formats().values())


def all_formats() -> Mapping[str, Format]:
    """Return the formats of weights, and of unmerged adapters beside a base in each of them."""
    weights = {format_.name: format_ for format_ in (AWQ, GPTQ, FP8)} | dict(formats())
    unmerged = [LORA, *map(beside, weights.values())]
    return weights | {format_.name: format_ for format_ in unmerged}
