"""Single stages that make a model's files: `merge`, `validate`, `quantize`, `render`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from weightsmith.api.commands.requests import (
    MergeCommand,
    QuantizeCommand,
    RenderCommand,
    ValidateCommand,
)
from weightsmith.cli.command import command
from weightsmith.core.escape import escaped, joined
from weightsmith.core.values import Writable
from weightsmith.validating.result import Validation


@command(MergeCommand)
def merge(asked: MergeCommand) -> tuple[Mapping[str, Writable], str]:
    """Merge adapters into a base and write a plain Hugging Face checkpoint to --out.

    Without --adapter, it is the base itself.
    """
    from weightsmith.api.commands.merge import merge_folders
    from weightsmith.building.progress import progress_for
    from weightsmith.building.wiring import open_for

    with open_for(asked, progress_for()) as tools:
        result = merge_folders(asked, tools)
    counts = ", ".join(f"{count} {what}" for what, count in result["tensors"].items())
    return result, escaped(f"{result['out']}: {counts} tensors, {result['seconds']:.1f} s")


@command(ValidateCommand)
def validate(asked: ValidateCommand) -> tuple[Mapping[str, Writable], str]:
    """Compare a merged checkpoint with its base and adapters: files, every element, logits."""
    from weightsmith.api.commands.validate import validate_folders
    from weightsmith.building.progress import progress_for
    from weightsmith.building.wiring import open_for

    with open_for(asked, progress_for()) as tools:
        result = validate_folders(asked, tools)
    return result.to_json(), _verdict(asked.merged, result)


def _verdict(merged: Path, result: Validation) -> str:
    lines = [f"{merged} matches base and adapters"]
    if compared := result.comparison:
        if compared.elements:
            lines.append(
                f"  {compared.elements.elements} elements of {compared.elements.tensors} tensors "
                "are right"
            )
        lines.append(
            f"  logits of {compared.positions} positions: largest difference "
            f"{result.max_abs_logit_diff:.3g}, mean divergence {result.kl_mean:.3g}, "
            f"same first choice {result.top1_agreement:.1%}"
        )
        if texts := compared.greedy:
            same, tokens = sum(text.same for text in texts), sum(text.tokens for text in texts)
            lines.append(f"  {same} of {tokens} tokens of greedy text are those of base + adapters")
    lines += [f"  {found.severity}: {found.message}" for found in result.findings]
    return joined(lines)


@command(QuantizeCommand)
def quantize(asked: QuantizeCommand) -> tuple[Mapping[str, Writable], str]:
    """Quantize a checkpoint to --format, read the result back and measure what was lost."""
    from weightsmith.api.commands.quantize import quantize_folder
    from weightsmith.building.progress import progress_for
    from weightsmith.building.wiring import open_for

    with open_for(asked, progress_for()) as tools:
        result = quantize_folder(asked, tools)
    measures = ", ".join(
        f"{key} {result['quality'][key]:.4g}"
        for key in ("kl_mean", "top1", "perplexity_ratio")
        if key in result["quality"]
    )
    return result, escaped(
        f"{result['out']}: {result['format']}, {result['bits_per_weight']:.2f} bits"
        + (f"; {measures}" if measures else "")
    )


@command(RenderCommand)
def render(asked: RenderCommand) -> tuple[Mapping[str, Writable], str]:
    """Plan a target's memory and render its serving configuration and manifests into --out."""
    from weightsmith.api.commands.render import render_folder
    from weightsmith.building.wiring import keep_places_clean
    from weightsmith.serving.plan_summary import summary

    keep_places_clean(asked)
    files, plan = render_folder(asked)
    result = {"files": files, "plan": plan.to_json()}
    return result, f"{joined([*files, ''])}\n{summary(asked.target, plan)}"


COMMANDS = (merge, validate, quantize, render)
