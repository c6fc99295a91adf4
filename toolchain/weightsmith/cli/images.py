"""Images by reference or layout: `bake`, `push`, `rebase`, `inspect`, `verify`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from weightsmith.cli.command import command
from weightsmith.cli.sections import Flags
from weightsmith.lines import pinned
from weightsmith.recipe import ImageNames
from weightsmith.values import Json


@command(
    sections={
        "image": Flags(section=ImageNames, only=("base", "platforms", "order", "max_layer_size"))
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
    insecure: bool = False,
    sign_key: str = "",
    runner: str = "auto",
    allow_network_in_jobs: bool = False,
    memory: str = "",
) -> tuple[Mapping[str, Json], str]:
    """Assemble the image of a model, and push it, load it or write it as an OCI layout."""
    from weightsmith.commands.arguments import required
    from weightsmith.commands.bake import BakeRequest, bake_model
    from weightsmith.progress import progress_for
    from weightsmith.wiring import keep_clean, open_tools

    required(model=model, target=target)
    keep_clean([model, config, image.base], layout=layout)
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
    with open_tools(
        runner,
        progress_for(),
        sign_key=sign_key,
        allow_network_in_jobs=allow_network_in_jobs,
        memory=memory,
        insecure=insecure,
    ) as tools:
        result = bake_model(request, tools)
    return result, pinned(result["reference"], result["digest"])


@command(positional=("source",))
def push(
    source: str,
    *,
    to: str = "",
    force: bool = False,
    insecure: bool = False,
    sign_key: str = "",
) -> tuple[Mapping[str, Json], str]:
    """Copy an image from a registry or an OCI layout to a registry; its digest stays the same."""
    from weightsmith.commands.arguments import required
    from weightsmith.commands.images import copy_image
    from weightsmith.progress import progress_for
    from weightsmith.wiring import make_registry, make_signer

    required(to=to)
    signer = make_signer(sign_key)
    with make_registry(insecure=insecure) as registry:
        result = copy_image(source, to, registry, progress_for(), force=force, signer=signer)
    return result, pinned(result["reference"], result["digest"])


@command(positional=("source",))
def rebase(
    source: str,
    *,
    onto: str = "",
    to: str = "",
    smoke: bool = True,
    force: bool = False,
    insecure: bool = False,
    sign_key: str = "",
) -> tuple[Mapping[str, Json], str]:
    """Move an image to another engine base and push it; its weights are not copied."""
    from weightsmith.commands.arguments import required
    from weightsmith.commands.rebase import RebaseRequest, rebase_image
    from weightsmith.progress import progress_for
    from weightsmith.wiring import open_tools

    required(onto=onto, to=to)
    request = RebaseRequest(source=source, onto=onto, to=to, smoke=smoke, force=force)
    with open_tools("auto", progress_for(), sign_key=sign_key, insecure=insecure) as tools:
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
