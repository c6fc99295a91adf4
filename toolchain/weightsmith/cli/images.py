"""Images by reference or layout: `bake`, `push`, `rebase`, `inspect`, `verify`."""

from __future__ import annotations

from collections.abc import Mapping

from weightsmith.api.commands.requests import (
    BakeCommand,
    InspectCommand,
    PushCommand,
    RebaseCommand,
    VerifyCommand,
)
from weightsmith.cli.command import command
from weightsmith.core.lines import pinned
from weightsmith.core.values import Writable


@command(BakeCommand)
def bake(asked: BakeCommand) -> tuple[Mapping[str, Writable], str]:
    """Assemble the image of a model, and push it, load it or write it as an OCI layout."""
    from weightsmith.api.commands.bake import bake_model
    from weightsmith.building.progress import progress_for
    from weightsmith.building.wiring import open_for

    with open_for(asked, progress_for(), asked.image.base) as tools:
        result = bake_model(asked, tools)
    return result, pinned(result["reference"], result["digest"])


@command(PushCommand)
def push(asked: PushCommand) -> tuple[Mapping[str, Writable], str]:
    """Copy an image to a registry, its digest stays the same; or a model to a hub, with a card."""
    from weightsmith.api.commands.images import preview_text
    from weightsmith.api.commands.upload import preview
    from weightsmith.api.images import run_push
    from weightsmith.building.progress import progress_for

    result = run_push(asked, progress_for())
    if asked.dry_run:
        return result, preview(result) if asked.to.startswith("hf://") else preview_text(result)
    return result, pinned(result["reference"], result["digest"])


@command(RebaseCommand)
def rebase(asked: RebaseCommand) -> tuple[Mapping[str, Writable], str]:
    """Move an image to another engine base and push it; its weights are not copied."""
    from weightsmith.api.commands.rebase import rebase_image
    from weightsmith.building.progress import progress_for
    from weightsmith.building.wiring import open_for

    with open_for(asked, progress_for()) as tools:
        result = rebase_image(asked, tools)
    return result, pinned(result["reference"], result["digest"])


@command(InspectCommand)
def inspect(asked: InspectCommand) -> tuple[Mapping[str, Writable], str]:
    """Show what an image contains, using only the image: provenance, plan, scores, layers."""
    from weightsmith.api.commands.images import inspect_text
    from weightsmith.api.images import run_inspect

    result = run_inspect(asked)
    return result, inspect_text(result)


@command(VerifyCommand)
def verify(asked: VerifyCommand) -> tuple[Mapping[str, Writable], str]:
    """Check an image's signature, its layers' digests, and the chain from sources to layers."""
    from weightsmith.api.commands.verify import table
    from weightsmith.api.images import run_verify
    from weightsmith.building.progress import progress_for

    result = run_verify(asked, progress_for())
    return result, f"{pinned(result['reference'], result['digest'])} holds\n{table(result)}"


COMMANDS = (bake, push, rebase, inspect, verify)
