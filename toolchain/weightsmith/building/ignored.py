"""Refuses settings that nothing of a build reads: whoever wrote one expects it to hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from weightsmith.building.targets import AUTO, target_of
from weightsmith.core.errors import UsageError
from weightsmith.core.values import Format
from weightsmith.quantizers import formats, of_format
from weightsmith.quantizers.quantizer import Options
from weightsmith.recipe.schema import Quantize, Recipe
from weightsmith.serving import parsers as serving_parsers
from weightsmith.serving.targets import Target

_MIXES = "llamacpp-mix or vllm-mix"
READERS: Mapping[str, str] = {
    "shared_layers": "llamacpp-q4_k_m",
    "split_max_size": "llamacpp-q4_k_m",
    "tensor_types": "llamacpp-q4_k_m",
    "bits": _MIXES,
    "size": _MIXES,
    "fit": _MIXES,
    "mix": _MIXES,
    "group_size": "vllm-awq",
    "zero_point": "vllm-awq-compressed",
    "keep": "vllm-awq (in GGUF files, quantize.tensor_types={ffn_down: f16} keeps 16 bits)",
}
"""Key of `quantize` -> a target that reads it. What is not here only permits something, or is
`imatrix`, which formats of many bits pay no heed to."""


def check_read(recipe: Recipe, targets: Iterable[Target], *, auto: bool) -> None:
    """Raise UsageError for `auto`, or a key of `quantize`, that no target of a build reads.

    The recipe's own targets count beside those to be built: one of several may be built alone.
    `auto` says whether one is to be chosen: of which formats, is not known yet.
    """
    auto = auto or AUTO in recipe.targets
    built = [*targets, *(target_of(name) for name in recipe.targets if name != AUTO)]
    if recipe.auto and not auto:
        raise UsageError(
            f"the recipe has `auto`, and no target is {AUTO}",
            hint=f"add {AUTO} to its targets (--target {AUTO}), or leave `auto` out",
        )
    _check_parsers(recipe, built, auto=auto)
    if auto:
        return
    given, usual = recipe.quantize.model_dump(), Quantize().model_dump()
    for key, reader in READERS.items() if built else ():
        if given[key] == usual[key]:
            continue
        without = {**given, key: usual[key]}
        if not any(_differ(target.format.without_adapters, given, without) for target in built):
            others = ", nor does another target" if len({one.name for one in built}) > 1 else ""
            raise UsageError(
                f"quantize.{key}: {built[0].name} does not read it{others}",
                hint=f"leave it out, or build a target that does: {reader}",
            )


def _check_parsers(recipe: Recipe, built: Sequence[Target], *, auto: bool) -> None:
    """Raise UsageError for a parser that is named and no engine takes; llama.cpp has its own."""
    named = recipe.serve.tool_parser, recipe.serve.reasoning_parser
    for key, name in zip(("tool_parser", "reasoning_parser"), named, strict=True):
        if name in (serving_parsers.AUTO, serving_parsers.NONE) or auto or not built:
            continue
        if not any(target.engine.has_parsers for target in built):
            raise UsageError(
                f"serve.{key} is {name!r}, and {built[0].engine.title} takes no parser: it reads"
                " calls and thoughts by the chat template",
                hint="leave it out, or build a target of vLLM or SGLang",
            )


def _differ(format_: Format, given: Options, without: Options) -> bool:
    """Return whether a format's options differ, or are refused, which it says itself."""
    if format_.name not in formats():
        return False
    options = of_format(format_.name).options
    try:
        return options(format_, given) != options(format_, without)
    except UsageError:
        return True
