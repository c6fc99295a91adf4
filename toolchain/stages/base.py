"""Engine -> the image below the weights: our own engine layer, a layout, or a registry's image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from toolchain.oci.image import Image, ImageConfig, assemble
from toolchain.oci.layers import Member, TarLayer
from toolchain.oci.layout import read_layout
from toolchain.oci.manifests import host_platform
from toolchain.oci.references import Reference
from toolchain.oci.registry import Registry
from toolchain.ports import Entry, Tools
from toolchain.resources import engine_pins
from toolchain.serving.engine import Engine
from toolchain.values import Job, Json, StageInputs

OWN = "engine:"
"""Prefix of bases that are a folder of images/engines/, assembled here from its tools."""

_BUILDER = "gguf"
_RECIPE_NUMBER = 1
_ACCOUNTS = {
    "etc/passwd": "root:x:0:0:root:/:/sbin/nologin\nmodel:x:65532:65532:model:/tmp:/sbin/nologin\n",
    "etc/group": "root:x:0:\nmodel:x:65532:\n",
}


def base_reference(engine: Engine, device: str, override: str) -> str:
    """Return what the image is built on: the user's word, else the engine's for the device."""
    return override or (engine.base.cpu if device == "cpu" else engine.base.gpu)


def base_inputs(name: str) -> StageInputs:
    """Return what an engine layer of our own depends on."""
    return StageInputs(
        stage="base",
        recipe_number=_RECIPE_NUMBER,
        inputs={"engine": name, "pins": engine_pins(name)},
    )


def base_image(reference: str, registry: Registry, tools: Tools) -> Image:
    """Return the base; its layers are read when they are needed.

    Raises EnvironmentFailure where a registry cannot be reached, InputRefused for a broken image.
    """
    if reference.startswith(OWN):
        return _own(reference.removeprefix(OWN), tools)
    if reference.startswith("oci:"):
        return read_layout(Path(reference.removeprefix("oci:")))
    return registry.pull(Reference.parse(reference))


def _own(name: str, tools: Tools) -> Image:
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
    return assemble((), (layer,), config=ImageConfig(), platform=host_platform())


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
