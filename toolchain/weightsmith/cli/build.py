"""`build` and `plan`: the whole pipeline, run or foreseen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from weightsmith.api.commands.requests import BuildCommand, PlanCommand
from weightsmith.cli.command import command
from weightsmith.core.escape import joined
from weightsmith.core.values import Writable

if TYPE_CHECKING:  # imported when it is called: the list of commands must appear at once
    from weightsmith.building.record import BuiltTarget


@command(BuildCommand)
def build(asked: BuildCommand) -> tuple[Mapping[str, Writable], str]:
    """Build, check and publish the images of a recipe (or of --base and --adapter)."""
    from weightsmith.api.images import run_build
    from weightsmith.building.progress import progress_for

    made = run_build(asked, progress_for())
    lines = [line for built in made for line in _lines(built)]
    return {"targets": {built.target.name: _facts(built) for built in made}}, joined(lines)


def _facts(built: BuiltTarget) -> Mapping[str, Writable]:
    """Return what is printed of a target's image."""
    return {
        "image": built.published.reference,
        "digest": built.published.digest,
        "verdict": built.verdict,
        "unproven": built.unproven,
        "scores": {name: score.score for name, score in built.scores.items()},
        "sameness": built.sameness,
        "verdicts": [v.facts for result in built.results for v in result.verdicts],
        "forms": {
            kind: {
                "reference": form.reference,
                "digest": form.digest,
                "uploaded_bytes": form.uploaded_bytes,
                "mounted": form.mounted,
            }
            for kind, form in built.forms.items()
        },
        "platforms": {
            platform: {"digest": digest, "started": platform == built.started}
            for platform, digest in built.published.platforms.items()
        },
        "uploaded_bytes": built.published.uploaded_bytes,
        "stages": built.stages,
        "report": built.report,
    }


def _lines(built: BuiltTarget) -> Iterator[str]:
    image = built.published
    yield f"{built.target.name}: {image.reference}@{image.digest}"
    for platform, digest in image.platforms.items() if len(image.platforms) > 1 else ():
        tested = "started and tested" if platform == built.started else "not started"
        yield f"  {platform}: {digest}, {tested}"
    for kind, form in built.forms.items():
        yield f"  {kind}: {form.reference}@{form.digest}"
    if scores := ", ".join(f"{who} {found.score:.3f}" for who, found in built.scores.items()):
        yield f"  scores: {scores}"
    if same := ", ".join(f"{who} {share:.3f}" for who, share in built.sameness.items()):
        yield f"  answers equal to the reference's: {same}"
    yield from (f"  NOT PROVEN: {reason}" for reason in built.unproven)
    yield f"  report: {built.report}"


@command(PlanCommand)
def plan(asked: PlanCommand) -> tuple[Mapping[str, Writable], str]:
    """Show what `build` would do: stages, which are cached or why not, memory, disk, time."""
    from weightsmith.api.commands.plan import table
    from weightsmith.api.images import run_plan

    result = run_plan(asked)
    return result, table(result)


COMMANDS = (build, plan)
