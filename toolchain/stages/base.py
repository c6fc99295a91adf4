"""Engine -> the image below the weights: our own engine layer, a layout, or a registry's image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from toolchain.errors import InputRefused, UsageError
from toolchain.oci.image import Image, ImageConfig, assemble
from toolchain.oci.layers import Member, TarLayer
from toolchain.oci.layout import read_layout
from toolchain.oci.manifests import host_platform
from toolchain.oci.references import Reference
from toolchain.oci.registry import Registry
from toolchain.ports import Entry, Tools
from toolchain.resources import engine_pins, images
from toolchain.serving.engine import Engine
from toolchain.values import Job, Json, StageInputs

OWN = "engine:"
"""Prefix of bases that are a folder of images/engines/, assembled here from its tools."""

ENGINE_LABEL = "dev.weightsmith.engine"
"""How an image says which engine it holds."""

_BUILDER = "gguf"
_RECIPE_NUMBER = 1
_ACCOUNTS = {
    "etc/passwd": "root:x:0:0:root:/:/sbin/nologin\nmodel:x:65532:65532:model:/tmp:/sbin/nologin\n",
    "etc/group": "root:x:0:\nmodel:x:65532:\n",
}


def base_reference(engine: Engine, device: str, override: str) -> str:
    """Return what the image is built on: the user's word, else the engine's for the device.

    Raises UsageError where there is none.
    """
    bases = engine.base
    own = bases.rocm if device.startswith("amd-") else bases.gpu
    chosen = override or (bases.cpu if device == "cpu" else own)
    if not chosen:
        raise UsageError(
            f"{engine.name} has no image for a {device}",
            hint="set serve.gpu, or name a base with --base-image or image.base",
        )
    return chosen


def base_inputs(name: str) -> StageInputs:
    """Return what an engine layer of our own depends on."""
    return StageInputs(
        stage="base",
        recipe_number=_RECIPE_NUMBER,
        inputs={"engine": name, "pins": engine_pins(name)},
    )


def base_image(reference: str, engine: str, registry: Registry, tools: Tools) -> Image:
    """Return the base for an engine; its layers are read when they are needed.

    What a base does not say of itself is a warning. Raises InputRefused for a broken image and
    for one that says it holds another engine, EnvironmentFailure where a registry is out of reach.
    """
    if reference.startswith(OWN):
        return _own(reference.removeprefix(OWN), tools)
    if reference.startswith("oci:"):
        image = read_layout(Path(reference.removeprefix("oci:")))
    else:
        image = registry.pull(Reference.parse(reference))
    said = image.labels.get(ENGINE_LABEL, "")
    if not said:
        tools.progress.warn(f"{reference} does not say which engine it holds, {engine} is assumed")
    elif said != engine:
        raise InputRefused(
            f"{reference} says that it holds {said}, and the target needs {engine}",
            hint="choose a base of that engine, or another target",
        )
    return image


def _own(name: str, tools: Tools) -> Image:
    if not (images() / "engines" / name).is_dir():
        raise UsageError(
            f"there is no base image of our own for {name} here",
            hint="name one with --base-image or image.base, or plan for a GPU",
        )
    stage = base_inputs(name)
    entry = tools.store.find(stage.key) or tools.store.produce(
        stage.key, {"stage": "base", "inputs": stage.inputs}, lambda folder: _export(folder, tools)
    )
    layer = TarLayer(
        members=(
            *_programs(entry),
            *(Member.of_bytes(p, t.encode()) for p, t in _ACCOUNTS.items()),
        ),
        memo=tools.store.memo,
    )
    return assemble(
        (), (layer,), config=ImageConfig(labels={ENGINE_LABEL: name}), platform=host_platform()
    )


def _export(folder: Path, tools: Tools) -> Mapping[str, Json]:
    tools.runner.prepare(_BUILDER, tools.progress)
    return tools.runner.run(
        Job(stage="export-engine", builder=_BUILDER, inputs={}, output=folder), tools.progress
    )


def _programs(entry: Entry) -> tuple[Member, ...]:
    return tuple(
        Member(
            path=f"app/{file.path}",
            size=file.size,
            mode=0o755,
            source=entry.tree.path(file.path),
            digest=file.digest,
        )
        for file in entry.tree.files
    )
