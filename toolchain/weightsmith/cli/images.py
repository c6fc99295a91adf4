"""Images by reference or layout: `bake`, `push`, `rebase`, `inspect`, `verify`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from weightsmith.cli.command import command
from weightsmith.cli.sections import Flags
from weightsmith.lines import pinned
from weightsmith.recipe_outputs import ImageNames
from weightsmith.run_options import RunOptions
from weightsmith.values import Json


@command(
    sections={
        "image": Flags(section=ImageNames, only=("base", "platforms", "order", "max_layer_size")),
        "run": Flags(section=RunOptions),
    },
    meanings={
        "push": "reference to push the image to",
        "load": "load the image into the container engine under this name",
    },
)
def bake(
    *,
    model: str = "",
    target: str = "",
    config: str = "",
    name: str = "",
    image: ImageNames,
    kind: str = "image",
    push: str = "",
    load: str = "",
    layout: str = "",
    force: bool = False,
    run: RunOptions,
) -> tuple[Mapping[str, Json], str]:
    """Assemble the image of a model, and push it, load it or write it as an OCI layout."""
    from weightsmith.commands.arguments import layout_folder, required
    from weightsmith.commands.bake import BakeRequest, bake_model
    from weightsmith.progress import progress_for
    from weightsmith.wiring import keep_clean, open_tools

    required(model=model, target=target)
    layout = layout_folder(layout)
    keep_clean([model, config, image.base], layout=layout, cache=run.cache)
    request = BakeRequest(
        model=Path(model),
        target=target,
        config=Path(config) if config else None,
        name=name,
        image=image,
        kind=kind,
        push=push,
        load=load,
        layout=Path(layout).absolute() if layout else None,
        force=force,
    )
    with open_tools(run, progress_for()) as tools:
        result = bake_model(request, tools)
    return result, pinned(result["reference"], result["digest"])


@command(
    positional=("source",),
    meanings={
        "to": "reference to push to, or hf://OWNER/NAME for a model hub",
        "source": "registry reference, or an OCI layout: a folder, oci:DIR or oci:DIR:NAME; for a "
        "hub also a checkpoint's folder, a .gguf file or the folder of a build's results",
        "force": "move a tag that already names another image; replace what a hub's repository has",
        "dry_run": "show what would be sent, and of a hub the card; change nothing",
    },
)
def push(
    source: str,
    *,
    to: str = "",
    force: bool = False,
    public: bool = False,
    dry_run: bool = False,
    insecure: bool = False,
    sign_key: str = "",
) -> tuple[Mapping[str, Json], str]:
    """Copy an image to a registry, its digest stays the same; or a model to a hub, with a card."""
    from weightsmith.commands.arguments import required
    from weightsmith.commands.images import copy_image, preview_copy, preview_text
    from weightsmith.commands.upload import hub_destination, preview, push_to_hub
    from weightsmith.progress import progress_for
    from weightsmith.wiring import make_registry, make_signer, open_tools

    required(to=to)
    if hub := hub_destination(to, force=force, public=public, sign_key=sign_key):
        run = RunOptions(runner="local", insecure=insecure)
        with open_tools(run, progress_for()) as tools:
            result = push_to_hub(source, hub, tools, dry_run=dry_run)
        return result, preview(result) if dry_run else f"{hub.reference}@{result['digest']}"
    signer = make_signer(sign_key)
    with make_registry(insecure=insecure) as registry:
        if dry_run:
            result = preview_copy(source, to, registry, force=force)
            return result, preview_text(result)
        result = copy_image(source, to, registry, progress_for(), force=force, signer=signer)
    return result, pinned(result["reference"], result["digest"])


@command(
    positional=("source",),
    sections={
        "run": Flags(section=RunOptions, without=("runner", "allow_network_in_jobs", "memory"))
    },
)
def rebase(
    source: str,
    *,
    onto: str = "",
    to: str = "",
    smoke: bool = True,
    force: bool = False,
    run: RunOptions,
) -> tuple[Mapping[str, Json], str]:
    """Move an image to another engine base and push it; its weights are not copied."""
    from weightsmith.commands.arguments import required
    from weightsmith.commands.rebase import RebaseRequest, rebase_image
    from weightsmith.progress import progress_for
    from weightsmith.wiring import open_tools

    required(onto=onto, to=to)
    request = RebaseRequest(source=source, onto=onto, to=to, smoke=smoke, force=force)
    with open_tools(run, progress_for()) as tools:
        result = rebase_image(request, tools)
    return result, pinned(result["reference"], result["digest"])


@command(
    positional=("source",),
    meanings={
        "platform": "platform of an index to show, such as linux/amd64; default: this machine's"
    },
)
def inspect(
    source: str, *, platform: str = "", insecure: bool = False
) -> tuple[Mapping[str, Json], str]:
    """Show what an image contains, using only the image: provenance, plan, scores, layers."""
    from weightsmith.commands.images import inspect_image, inspect_text
    from weightsmith.wiring import make_engine, make_registry

    with make_registry(insecure=insecure) as registry:
        result = inspect_image(source, registry, make_engine(), platform)
    return result, inspect_text(result)


@command(positional=("source",))
def verify(source: str, *, key: str = "", insecure: bool = False) -> tuple[Mapping[str, Json], str]:
    """Check an image's signature, its layers' digests, and the chain from sources to layers."""
    from weightsmith.commands.verify import key_path, table, verify_image
    from weightsmith.progress import progress_for
    from weightsmith.wiring import make_registry

    with make_registry(insecure=insecure) as registry:
        result = verify_image(source, key_path(key), registry, progress_for())
    return result, f"{pinned(result['reference'], result['digest'])} holds\n{table(result)}"


COMMANDS = (bake, push, rebase, inspect, verify)
