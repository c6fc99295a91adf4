"""Single stages that make a model's files: `merge`, `validate`, `quantize`, `render`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from weightsmith.cli.command import command
from weightsmith.cli.flags import JOBS, SERVED
from weightsmith.cli.sections import Flags
from weightsmith.commands.requests import MergeCommand, ValidateCommand
from weightsmith.recipe import Quantize, Serve
from weightsmith.run_options import RunOptions
from weightsmith.validating.result import Validation
from weightsmith.values import Json
from weightsmith.visible import escaped, joined


@command(MergeCommand)
def merge(asked: MergeCommand) -> tuple[Mapping[str, Json], str]:
    """Merge adapters into a base and write a plain Hugging Face checkpoint to --out.

    Without --adapter, it is the base itself.
    """
    from weightsmith.commands.merge import merge_folders
    from weightsmith.progress import progress_for
    from weightsmith.wiring import open_for

    with open_for(asked, progress_for()) as tools:
        result = merge_folders(asked, tools)
    counts = ", ".join(f"{count} {what}" for what, count in result["tensors"].items())
    return result, escaped(f"{result['out']}: {counts} tensors, {result['seconds']:.1f} s")


@command(ValidateCommand)
def validate(asked: ValidateCommand) -> tuple[Mapping[str, Json], str]:
    """Compare a merged checkpoint with its base and adapters: files, every element, logits."""
    from weightsmith.commands.validate import validate_folders
    from weightsmith.progress import progress_for
    from weightsmith.wiring import open_for

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


@command(sections={"settings": Flags(section=Quantize), "run": JOBS})
def quantize(
    *,
    model: str = "",
    format: str = "q4_k_m",  # noqa: A002 - the flag's name
    out: str = "",
    calibration: str = "",
    settings: Quantize,
    no_gate: bool = False,
    run: RunOptions,
) -> tuple[Mapping[str, Json], str]:
    """Quantize a checkpoint to --format, read the result back and measure what was lost."""
    from weightsmith.commands.arguments import required
    from weightsmith.commands.quantize import FolderRequest, quantize_folder
    from weightsmith.progress import progress_for
    from weightsmith.wiring import keep_clean, open_tools

    required(model=model, format=format, out=out)
    keep_clean([model], out=out, cache=run.cache)
    asked = FolderRequest(
        model=Path(model),
        format_name=format,
        out=Path(out),
        settings=settings,
        calibration=Path(calibration) if calibration else None,
        gate=not no_gate,
    )
    with open_tools(run, progress_for()) as tools:
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


@command(
    many=("set",),
    sections={"serve": Flags(section=Serve, only=SERVED)},
    meanings={"out": "folder for the files; files of the same names are replaced"},
)
def render(
    *,
    model: str = "",
    target: str = "",
    out: str = "",
    name: str = "",
    serve: Serve,
    set: Sequence[str] = (),  # noqa: A002 - the flag's name
) -> tuple[Mapping[str, Json], str]:
    """Plan a target's memory and render its serving configuration and manifests into --out."""
    from weightsmith.commands.arguments import required, serving_options
    from weightsmith.commands.render import render_model
    from weightsmith.serving.plan_summary import summary
    from weightsmith.wiring import keep_clean

    required(model=model, target=target, out=out)
    keep_clean([model], out=out)
    options = serving_options(serve, set)
    files, plan = render_model(Path(model), target, name, options, Path(out))
    result = {"files": files, "plan": plan.to_json()}
    return result, f"{joined([*files, ''])}\n{summary(target, plan)}"


COMMANDS = (merge, validate, quantize, render)
