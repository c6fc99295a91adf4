"""Engine -> its base image: our own engine layer, a layout, or an image in a registry."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.jobs import ExportEngineJob
from weightsmith.core.platforms import host_platform
from weightsmith.core.ports import Silent, StoreEntry
from weightsmith.core.resources import (
    assembles_itself,
    engine_pins,
    engine_platforms,
    engine_source,
    images,
)
from weightsmith.core.time_limits import job_seconds
from weightsmith.core.values import Blob, Digest, JsonValue, StageInputs, key_of
from weightsmith.oci.image import Image, ImageConfig, assemble
from weightsmith.oci.layers import (
    LAYER_TAR,
    TAR_RECIPE,
    BlobLayer,
    Memo,
    verified,
)
from weightsmith.oci.layout import is_layout, locate, read_all, read_layout
from weightsmith.oci.registry import reference_of
from weightsmith.oci.tar import source_date_epoch
from weightsmith.oci.weights import (
    ACCOUNTS,
    GROUPING,
    OWN_LAYER,
    PACKAGE,
    program_layers,
    root_layers,
)
from weightsmith.provenance.bills import OWN_ENGINE
from weightsmith.provenance.labels import ENGINE_LABEL, ENGINE_VERSION
from weightsmith.recipe.file import RecipeFile
from weightsmith.serving.devices import is_cpu
from weightsmith.serving.engine import Engine
from weightsmith.serving.targets import Target
from weightsmith.steps.lock import read_lock, write_lock
from weightsmith.steps.tools import Tools

OWN = OWN_ENGINE
MODELCAR = OWN + "modelcar"
"""An image with only a shell, made of packages."""

ENGINE = "base"
"""The name, in plans and the store, of making one of our own engines."""
_BUILDER = "gguf"
_RECIPE_NUMBER = 1
_PINNED = frozenset({"commit", "package"})
"""Either key marks the entry of source.json that is the engine itself."""


def base_reference(engine: Engine, device: str, override: str) -> str:
    """Return the base's reference: the user's choice, else the engine's base for the device.

    Raises UsageError if there is none.
    """
    bases = engine.base
    own = bases.rocm if device.startswith("amd-") else bases.gpu
    chosen = override or (bases.cpu if is_cpu(device) else own)
    if not chosen:
        raise UsageError(
            f"{engine.name} has no base image for a {device}",
            hint="set serve.gpu, or give a base with --base-image or image.base",
        )
    return chosen


def data_base(kind: str, override: str) -> str:
    """Return the base's reference for an image that serves nothing; "" if it has no base.

    KServe starts a modelcar with a shell, which links `/models` for the server's container.
    https://kserve.github.io/website/docs/model-serving/storage/providers/oci
    """
    return override if override or kind != "modelcar" else MODELCAR


def base_inputs(name: str, platform: str = "") -> StageInputs:
    """Return what our own engine's files depend on; the default platform is this machine's."""
    pins: JsonValue = engine_pins(name)
    return StageInputs(
        stage=ENGINE,
        recipe_number=_RECIPE_NUMBER,
        inputs={"engine": name, "pins": pins, "platform": platform or host_platform()},
    )


def check_own(
    reference: str, platforms: Sequence[str], flag: str = "--base-image or image.base"
) -> None:
    """Raise UsageError if one of our own engines cannot be made for a platform.

    Also if there is none of that name. Without `platforms`, asks for this machine's. Any other
    base is not looked at. `flag` is what gives another base.
    """
    if not reference.startswith(OWN):
        return
    name = reference.removeprefix(OWN)
    if not (images() / "engines" / name / "source.json").is_file():
        raise UsageError(
            f"no built-in base image for {name}",
            hint=f"give one with {flag}, or plan for a GPU",
        )
    known = engine_platforms(name)
    wanted = set(platforms) or {host_platform()}
    if missing := sorted(wanted - set(known)):
        raise UsageError(
            f"the engine {name} can be made for {', '.join(known)}, not for {', '.join(missing)}",
            hint="change image.platforms (bake: --platform), give a base that has them with "
            f"{flag}, or choose a llamacpp-* target, which is made for "
            "linux/amd64 and linux/arm64",
        )


def check_base(reference: str, engine: str, tools: Tools, *, platforms: Sequence[str] = ()) -> None:
    """Check a base as far as that needs no network: a layout whole, a reference by its form.

    Raises what `base_images` raises.
    """
    if reference.startswith(OWN):
        check_own(reference, platforms)
    elif is_layout(reference):
        # Its warnings are shown later, when the image is assembled.
        base_images(reference, engine, replace(tools, progress=Silent()), platforms=platforms)
    else:
        reference_of(reference)


def base_image(reference: str, engine: str, tools: Tools, *, platform: str | None = None) -> Image:
    """Return the base for an engine; its layers are read only when needed.

    `engine` is "" for an image that serves nothing; the default platform is this machine's. Warns
    if the base does not declare its engine. Raises InputRefused for an invalid image or a base with
    another engine, EnvironmentFailure if the registry cannot be reached, and what `check_own` does.
    """
    if reference.startswith(OWN):
        return _own_base(reference, engine, platform or host_platform(), tools)
    if is_layout(reference):
        image = read_layout(*locate(reference), platform=platform)
    else:
        image = tools.registry.pull(reference_of(reference), platform=platform)
    _check((image,), reference, engine, tools)
    return image


def base_images(
    reference: str,
    engine: str,
    tools: Tools,
    *,
    pins: Mapping[str, str] | None = None,
    platforms: Sequence[str] = (),
) -> tuple[Image, ...]:
    """Return the base for each of its platforms, or only for those in `platforms`.

    Our own engines are made for `platforms`, by default for this machine's alone. `pins` maps
    platforms to the digests in a lock; with pins, the tag's current image does not matter.
    Raises what `base_image` raises, and UsageError if a platform is missing.
    """
    if reference.startswith(OWN):
        check_own(reference, platforms)
        wanted = sorted(set(platforms)) or [host_platform()]
        images = tuple(_own_base(reference, engine, each, tools) for each in wanted)
    elif is_layout(reference):
        images = read_all(*locate(reference))
    else:
        place = reference_of(reference)
        known = {} if place.digest else dict(pins or {})
        images = tuple(
            tools.registry.pull(place.at(Digest(known[p])) if p in known else place, platform=p)
            for p in sorted({*known, *platforms})
        ) if known else tools.registry.pull_all(place)  # fmt: skip
    there = {image.platform for image in images}
    if missing := sorted(set(platforms) - there):
        raise UsageError(
            f"{reference} has no image for {', '.join(missing)}",
            hint=f"available platforms: {', '.join(sorted(there))}",
        )
    chosen = tuple(image for image in images if image.platform in platforms or not platforms)
    _check(chosen, reference, engine, tools)
    return chosen


def _check(images: Sequence[Image], reference: str, engine: str, tools: Tools) -> None:
    for image in images:
        if not image.platform.startswith("linux/"):
            what = "holds a model's files" if image.artifact_type else "does not say its platform"
            what = f"is for {image.platform}" if image.platform else what
            raise InputRefused(
                f"{reference} {what}, and cannot be the base of a server",
                hint="choose an image for linux/amd64 or linux/arm64",
            )
        said = image.labels.get(ENGINE_LABEL, "")
        if engine and said and said != engine:
            raise InputRefused(
                f"{reference} declares the engine {said}, but the target needs {engine}",
                hint="choose a base with that engine, or another target",
            )
    if engine and not all(image.labels.get(ENGINE_LABEL) for image in images):
        tools.progress.warn(f"{reference} does not declare its engine; assuming {engine}")


def public_base(reference: str) -> str:
    """Return the base's name for an image's labels, or "" for a local folder."""
    return "" if is_layout(reference) else reference


def _own_base(reference: str, engine: str, platform: str, tools: Tools) -> Image:
    check_own(reference, [platform])
    name = reference.removeprefix(OWN)
    whole, stage = assembles_itself(name), base_inputs(name, platform)

    def make(folder: Path) -> Mapping[str, JsonValue]:
        if not whole and platform == host_platform():
            tools.runner.prepare(_BUILDER, tools.progress)
            job = ExportEngineJob(builder=_BUILDER, output=folder, seconds=job_seconds(0))
            return tools.runner.run(job, tools.progress)
        if whole:
            room = engine_source(name)["room_bytes"]
            tools.store.require_room(int(str(room)), f"the engine {name}")
        tools.make_engine_files(name, platform, folder, tools.progress)
        return {}

    entry = tools.store.produce(stage.key, stage.note, make)
    memo = tools.store.memo
    layers = (
        _root_layers(entry, memo)
        if whole
        else program_layers(entry.tree, epoch=source_date_epoch(), memo=memo)
    )
    labels: dict[str, str] = {}
    if reference != MODELCAR:
        labels[ENGINE_LABEL] = engine or name
        parts = [part for part in engine_source(name).values() if isinstance(part, dict)]
        if versions := [str(part["version"]) for part in parts if _PINNED & set(part)]:
            labels[ENGINE_VERSION] = versions[0]
    return assemble((), layers, config=ImageConfig(labels=labels), platform=platform)


def _root_layers(entry: StoreEntry, memo: Memo) -> tuple[BlobLayer, ...]:
    """Return a complete root file system: one layer per large package, one for all other files.

    The store remembers the grouping, so the 17,000 files are looked at only if a layer is opened.
    """
    epoch = source_date_epoch()
    grouped = cache(lambda: root_layers(entry.tree, entry.tree.mode, epoch=epoch, memo=memo))

    def summary() -> str:
        return json.dumps([(layer.digest, layer.size, layer.file) for layer in grouped()])

    def opened(number: int, blob: Blob) -> Iterator[bytes]:
        return verified(grouped()[number].open(), blob, "the engine layer")

    rules = [GROUPING, PACKAGE.pattern, OWN_LAYER, ACCOUNTS, TAR_RECIPE, epoch]
    made_of = {"root layers of": entry.tree.digest, "rules": rules}
    layers = []
    for number, (digest, size, file) in enumerate(json.loads(memo(key_of(made_of), summary))):
        blob = Blob(digest=Digest(digest), size=size, media_type=LAYER_TAR)
        opener = partial(opened, number, blob)
        layers.append(BlobLayer(blob=blob, diff_id=blob.digest, opener=opener, file=file))
    return tuple(layers)


def bases_of(
    file: RecipeFile, target: Target, device: str, tools: Tools, *, update_lock: bool = False
) -> tuple[str, tuple[Image, ...]]:
    """Return a base's name and its pinned image for each platform; pin a new base.

    Raises UsageError if the base has no image for a platform, InputRefused if it is missing or has
    a different engine, EnvironmentFailure if it cannot be reached.
    """
    settings = file.recipe.image
    name = base_reference(target.engine, device, settings.base)
    lock = read_lock(file)
    known = lock.bases.get(name, {})
    pins = {} if update_lock else known
    try:
        bases = base_images(
            name, target.engine.name, tools, pins=pins, platforms=settings.platforms
        )
    except InputRefused as error:
        hint = f"; {lock.path} pins it, and --update-lock pins the current {name} instead"
        raise InputRefused(error.message, hint=error.hint + (hint if pins else "")) from None
    pinned = lock
    for base in bases:
        if (was := known.get(base.platform, base.digest)) != base.digest:
            tools.progress.warn(f"{name}: {was} replaced by --update-lock, now {base.digest}")
        pinned = pinned.with_base(name, base)
    write_lock(lock, pinned, tools.progress)
    return name, bases


def platforms_of(file: RecipeFile, base: str) -> Sequence[str]:
    """Return the platforms of an image on a base, sorted; () if only the registry knows them.

    Raises UsageError if the base is one of our own engines that cannot be made for one of them.
    """
    wanted = sorted(set(file.recipe.image.platforms))
    check_own(base, wanted)
    if not wanted and base.startswith(OWN):
        return [host_platform()]
    return wanted or sorted(read_lock(file).bases.get(base, ()))
