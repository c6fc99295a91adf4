"""Engine -> the image below the weights: our own engine layer, a layout, or a registry's image."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

from weightsmith.errors import InputRefused, UsageError
from weightsmith.jobs import ExportEngineJob
from weightsmith.oci.image import Image, ImageConfig, assemble
from weightsmith.oci.layers import (
    LAYER_TAR,
    TAR_RECIPE,
    BlobLayer,
    Member,
    Memo,
    TarLayer,
    verified,
)
from weightsmith.oci.layout import is_layout, locate, read_all, read_layout
from weightsmith.oci.manifests import host_platform
from weightsmith.oci.references import Reference
from weightsmith.oci.tar import source_date_epoch
from weightsmith.oci.weights import OWN_LAYER
from weightsmith.ports import Entry
from weightsmith.provenance.bills import OWN_ENGINE
from weightsmith.provenance.labels import ENGINE_LABEL, ENGINE_VERSION
from weightsmith.resources import assembles_itself, engine_pins, engine_source, images
from weightsmith.serving.engine import Engine
from weightsmith.time_limits import job_seconds
from weightsmith.tools import Tools
from weightsmith.values import Blob, Digest, Json, StageInputs, key_of

OWN = OWN_ENGINE
MODELCAR = OWN + "modelcar"
"""A shell and nothing else, made of packages for one platform (`_WHOLE_PLATFORM`)."""

MODELCAR_ELSEWHERE = "docker.io/library/busybox:1.37.0-musl"

_BUILDER = "gguf"
_RECIPE_NUMBER = 1
_GROUPING = 1
"""Increase it if `_grouped` makes other layers of the same files by the same rules."""
_PINNED = frozenset({"commit", "package"})
"""Either marks the entry of source.json that is the engine itself."""
_WHOLE_PLATFORM = "linux/amd64"
_PACKAGE = re.compile(r"usr/local/lib/python[^/]+/dist-packages/([^/]+)/")
_ACCOUNTS = {
    "etc/passwd": "root:x:0:0:root:/:/sbin/nologin\nmodel:x:65532:65532:model:/tmp:/sbin/nologin\n",
    "etc/group": "root:x:0:\nmodel:x:65532:\n",
}


def base_reference(engine: Engine, device: str, override: str) -> str:
    """Return the base's reference: the user's choice, else the engine's base for the device.

    Raises UsageError if there is none.
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


def data_base(kind: str, override: str) -> str:
    """Return the base's reference for an image that serves nothing; "" if it has no base.

    KServe starts a modelcar with a shell, which links `/models` for the server beside it.
    https://kserve.github.io/website/docs/model-serving/storage/providers/oci
    """
    if override or kind != "modelcar":
        return override
    return MODELCAR if host_platform() == _WHOLE_PLATFORM else MODELCAR_ELSEWHERE


def base_inputs(name: str) -> StageInputs:
    """Return what an engine layer of our own depends on."""
    return StageInputs(
        stage="base",
        recipe_number=_RECIPE_NUMBER,
        inputs={"engine": name, "pins": engine_pins(name)},
    )


def base_image(reference: str, engine: str, tools: Tools, *, platform: str | None = None) -> Image:
    """Return the base for an engine; its layers are read when they are needed.

    `engine` is "" for an image that serves nothing. Warns if the base does not name its engine.
    Raises InputRefused for a broken image or the base of another engine, EnvironmentFailure if a
    registry cannot be reached.
    """
    if reference.startswith(OWN):
        return _own(reference.removeprefix(OWN), engine, tools)
    if is_layout(reference):
        image = read_layout(*locate(reference), platform=platform)
    else:
        image = tools.registry.pull(Reference.parse(reference), platform=platform)
    return _checked(image, reference, engine, tools)


def base_images(
    reference: str,
    engine: str,
    tools: Tools,
    *,
    pins: Mapping[str, str] | None = None,
    platforms: Sequence[str] = (),
) -> tuple[Image, ...]:
    """Return the base for each of its platforms, or only for those in `platforms`.

    `pins` maps platforms to the digests in a lock; with pins, what the name refers to today does
    not matter. Raises as `base_image` does, and UsageError if a platform is missing.
    """
    if reference.startswith(OWN):
        images: tuple[Image, ...] = (base_image(reference, engine, tools),)
    elif is_layout(reference):
        images = read_all(*locate(reference))
    else:
        place = Reference.parse(reference)
        known = {} if place.digest else dict(pins or {})
        images = tuple(
            tools.registry.pull(place.at(Digest(known[p])) if p in known else place, platform=p)
            for p in sorted({*known, *platforms})
        ) if known else tools.registry.pull_all(place)  # fmt: skip
    there = {image.platform for image in images}
    if missing := sorted(set(platforms) - there):
        raise UsageError(
            f"{reference} is not there for {', '.join(missing)}",
            hint=f"it is there for {', '.join(sorted(there))}",
        )
    chosen = tuple(image for image in images if image.platform in platforms or not platforms)
    for image in chosen:
        _checked(image, reference, engine, tools)
    return chosen


def _checked(image: Image, reference: str, engine: str, tools: Tools) -> Image:
    said = image.labels.get(ENGINE_LABEL, "")
    if engine and not said:
        tools.progress.warn(f"{reference} does not say which engine it holds, {engine} is assumed")
    elif engine and said != engine:
        raise InputRefused(
            f"{reference} says that it holds {said}, and the target needs {engine}",
            hint="choose a base of that engine, or another target",
        )
    return image


def public_base(reference: str) -> str:
    """Return the base's name for an image's labels; "" for a folder on this machine."""
    return "" if is_layout(reference) else reference


def _own(name: str, engine: str, tools: Tools) -> Image:
    if not (images() / "engines" / name).is_dir():
        raise UsageError(
            f"there is no base image of our own for {name} here",
            hint="name one with --base-image or image.base, or plan for a GPU",
        )
    whole = assembles_itself(name)
    if whole and host_platform() != _WHOLE_PLATFORM:
        raise InputRefused(
            f"the engine layer {name} is made of packages for {_WHOLE_PLATFORM}, and this machine "
            f"is {host_platform()}",
            hint="name another base with --base-image or image.base",
        )
    stage = base_inputs(name)

    def make(folder: Path) -> Mapping[str, Json]:
        if not whole:
            return _export(folder, tools)
        room = engine_source(name)["room_bytes"]
        tools.store.require_room(int(str(room)), f"the engine {name}")
        tools.assemble_engine(name, folder, tools.progress)
        return {}

    entry = tools.store.find(stage.key) or tools.store.produce(
        stage.key, {"stage": "base", "inputs": stage.inputs}, make
    )
    layers = _root_layers(entry, tools.store.memo) if whole else (_program_layer(entry, tools),)
    return assemble(
        (), layers, config=ImageConfig(labels=_own_labels(name, engine)), platform=host_platform()
    )


def _own_labels(name: str, engine: str) -> dict[str, str]:
    if OWN + name == MODELCAR:
        return {}
    source = engine_source(name)
    parts = [part for part in source.values() if isinstance(part, dict)]
    versions = [str(part["version"]) for part in parts if _PINNED & set(part)]
    return {ENGINE_LABEL: engine or name, **({ENGINE_VERSION: versions[0]} if versions else {})}


def _program_layer(entry: Entry, tools: Tools) -> TarLayer:
    return TarLayer(members=(*_members(entry, "app/", 0o755), *_accounts()), memo=tools.store.memo)


_ROOTS: dict[Path, tuple[BlobLayer, ...]] = {}
"""Entry's folder -> its layers; all targets of a build share them, and they have 17,000 files."""


def _root_layers(entry: Entry, memo: Memo) -> tuple[BlobLayer, ...]:
    """Return a complete root file system: a layer per large package, and one with all other files.

    What they are is remembered: the files are looked at when a layer is opened.
    """
    if entry.tree.root not in _ROOTS:
        _ROOTS[entry.tree.root] = _remembered(entry, memo)
    return _ROOTS[entry.tree.root]


def _remembered(entry: Entry, memo: Memo) -> tuple[BlobLayer, ...]:
    grouped = cache(lambda: _grouped(entry, memo))

    def summary() -> str:
        return json.dumps([(layer.digest, layer.size, layer.file) for layer in grouped()])

    def opened(number: int, blob: Blob) -> Iterator[bytes]:
        return verified(grouped()[number].open(), blob, str(entry.tree.root))

    rules = [_GROUPING, _PACKAGE.pattern, OWN_LAYER, _ACCOUNTS, TAR_RECIPE, source_date_epoch()]
    made_of = {"root layers of": entry.tree.digest, "rules": rules}
    layers = []
    for number, (digest, size, file) in enumerate(json.loads(memo(key_of(made_of), summary))):
        blob = Blob(digest=Digest(digest), size=size, media_type=LAYER_TAR)
        opener = partial(opened, number, blob)
        layers.append(BlobLayer(blob=blob, diff_id=blob.digest, opener=opener, file=file))
    return tuple(layers)


def _grouped(entry: Entry, memo: Memo) -> tuple[TarLayer, ...]:
    """Return a layer per large package, so a new version of one changes only its own layer."""
    groups: dict[str, list[Member]] = {}
    for member in _members(entry, "", None):
        found = _PACKAGE.match(member.path)
        groups.setdefault(found[1] if found else "", []).append(member)
    large = {n for n, group in groups.items() if n and sum(m.size for m in group) >= OWN_LAYER}
    rest = [member for name, group in groups.items() if name not in large for member in group]
    return (
        TarLayer(members=(*rest, *_accounts()), memo=memo, shared=("tmp",)),
        *(TarLayer(members=tuple(groups[name]), memo=memo) for name in sorted(large)),
    )


def _accounts() -> tuple[Member, ...]:
    return tuple(Member.of_bytes(path, text.encode()) for path, text in _ACCOUNTS.items())


def _export(folder: Path, tools: Tools) -> Mapping[str, Json]:
    tools.runner.prepare(_BUILDER, tools.progress)
    job = ExportEngineJob(builder=_BUILDER, output=folder, seconds=job_seconds(0))
    return tools.runner.run(job, tools.progress)


def _members(entry: Entry, prefix: str, mode: int | None) -> tuple[Member, ...]:
    """Return the entry's files, with their own modes if `mode` is None."""
    found = []
    for file in entry.tree.files:
        source = entry.tree.path(file.path)
        kept = mode or source.stat().st_mode
        found.append(Member(prefix + file.path, file.size, kept, source, file.digest))
    return tuple(found)
