"""Image -> Published: first as a candidate for its own tests, then under its name."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from toolchain.errors import EnvironmentFailure
from toolchain.oci.archive import docker_archive
from toolchain.oci.image import Image
from toolchain.oci.index import Index
from toolchain.oci.layout import read_layout, write_index, write_layout
from toolchain.oci.layout_attachments import forget
from toolchain.oci.places import LayoutPlace, Place, RegistryPlace
from toolchain.oci.references import Reference
from toolchain.oci.registry import Registry
from toolchain.ports import Tools
from toolchain.provenance.evidence import Evidence, seal, signature_of
from toolchain.values import Json, Published, key_of

_CANDIDATES = "weightsmith-candidate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Where images go; several at once are fine."""

    load: bool = False
    layout: Path | None = None
    """Folder of one OCI layout."""
    push: bool = False
    force: bool = False
    tag_digest: bool = False
    """Push a second tag that ends with the digest's first twelve digits, and never moves."""


@contextmanager
def candidate(image: Image, layout: Path | None, tools: Tools) -> Iterator[str]:
    """Make the image startable without giving it its name; yield what a launcher starts.

    In the container engine where `layout` is None, else in a layout beside the final one. It
    stays until `publish` or `discard_candidate`, so that its layers are not brought twice.
    """
    if layout is None:
        name = _candidate_name(image)
        _load(image, Reference.parse(name), tools)
        try:
            yield name
        except BaseException:
            tools.engine.untag(name)
            raise
        return
    with _alone(_beside(layout)) as folder:
        _layout(image, folder, tools)
        yield f"oci:{folder}"


def publish(
    image: Image,
    reference: str,
    outputs: Outputs,
    evidence: Evidence,
    registry: Registry,
    tools: Tools,
) -> Published:
    """Bring the image to every output; the registry last, so that nothing unproven is public.

    The evidence goes with it, signed where there is a key; an engine has no place for it.

    Raises EnvironmentFailure where an engine or a registry fails, UsageError for a tag that
    holds another image already.
    """
    began = time.monotonic()
    place = Reference.parse(reference)
    done = describe(image, reference, outputs)
    if outputs.load:
        _load(image, place, tools)
    if tools.engine.answers():
        tools.engine.untag(_candidate_name(image))
    if outputs.layout is not None:
        with _settled(image, outputs.layout, tools) as beside:
            _attach(image, evidence, LayoutPlace(beside), place, tools)
    if outputs.push:
        there = RegistryPlace(registry, place)
        done = registry.push(
            image,
            place,
            force=outputs.force,
            also_tags=(f"{place.tag}-{image.digest.short}",) if outputs.tag_digest else (),
            before_tag=lambda: _attach(image, evidence, there, place, tools),
            progress=lambda sent, total: tools.progress.advance(sent, total, "bytes"),
        )
    return replace(done, layers=_rows(image), seconds=time.monotonic() - began)


def publish_index(
    index: Index,
    reference: str,
    outputs: Outputs,
    told: Sequence[Evidence],
    registry: Registry,
    tools: Tools,
) -> Published:
    """Bring an image for each platform to every output, under one name; `told` is in their order.

    An engine gets the one for this machine.
    """
    place, own = Reference.parse(reference), index.own
    done = replace(describe(own, reference, outputs), digest=index.digest)
    if outputs.load:
        _load(own, place, tools)

    def attach(there: Place) -> None:
        for image, one in zip(index.images, told, strict=True):
            _attach(image, one, there, place, tools)
        if tools.sign:
            there.attach(signature_of(index.blob, place.name, tools.sign))

    if outputs.layout is not None:
        write_index(index, outputs.layout)
        attach(LayoutPlace(outputs.layout))
    if outputs.push:
        done = registry.push_index(
            index,
            place,
            force=outputs.force,
            before_tag=lambda: attach(RegistryPlace(registry, place)),
            progress=lambda sent, total: tools.progress.advance(sent, total, "bytes"),
        )
    return done


def _attach(
    image: Image, evidence: Evidence, place: Place, reference: Reference, tools: Tools
) -> None:
    for attachment in seal(evidence, image.manifest_blob, reference.name, tools.sign):
        place.attach(attachment)


def describe(image: Image, reference: str, outputs: Outputs) -> Published:
    """Return where the image is once it is published, at no cost."""
    local = outputs.layout is not None and not outputs.load and not outputs.push
    return Published(
        reference=f"oci:{outputs.layout}" if local else reference,
        digest=image.digest,
        layers=_rows(image),
    )


def is_published(image: Image, reference: str, outputs: Outputs, tools: Tools) -> bool:
    """Say whether every local output holds this very image already."""
    if outputs.load and tools.engine.inspect(reference).get("Id") != image.config_blob.digest:
        return False
    if outputs.layout is not None and _held(outputs.layout) != image.digest:
        return False
    return not outputs.push


def _rows(image: Image) -> list[Mapping[str, Json]]:
    return [{"digest": x.digest, "size": x.size, "file": x.file} for x in image.layers]


def _load(image: Image, reference: Reference, tools: Tools) -> None:
    name = f"{reference.name}:{reference.tag or 'latest'}"
    if tools.engine.inspect(name).get("Id") == image.config_blob.digest:
        return
    tools.engine.load(docker_archive(image, reference, _like(image, reference, tools)), name)


def _like(image: Image, reference: Reference, tools: Tools) -> tuple[str, ...]:
    """Return the layers of an engine's image that shares most with this one from the bottom."""
    ids = [layer.diff_id for layer in image.layers]
    best: tuple[str, ...] = ()
    for held in tools.engine.chains_of(reference.name, _CANDIDATES):
        shared = next((n for n, (a, b) in enumerate(zip(held, ids, strict=False)) if a != b), None)
        shared = min(len(held), len(ids)) if shared is None else shared
        if shared > len(best):
            best = held[:shared]
    return best


def _layout(image: Image, folder: Path, tools: Tools) -> None:
    tools.store.require_room(sum(layer.size for layer in image.layers), "the image layout")
    write_layout(
        image, folder, progress=lambda done, total: tools.progress.advance(done, total, "bytes")
    )


@contextmanager
def _settled(image: Image, folder: Path, tools: Tools) -> Iterator[Path]:
    """Yield the candidate's layout, whole; give it its final place in one rename afterwards."""
    with _alone(_beside(folder)) as beside:
        stale = _held(beside)
        _layout(image, beside, tools)
        if stale is not None and stale != image.digest:
            _forget_unnamed(beside, image)
        yield beside
        if folder.exists():
            folder.rename(folder.with_name(f".{folder.name}.old-{os.getpid()}"))
        beside.rename(folder)
    for old in folder.parent.glob(f".{folder.name}.old-*"):
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """Yield a folder that no other build of the same results writes to or renames meanwhile.

    Raises EnvironmentFailure where it cannot be made.
    """
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # renamed between the two
        except OSError as error:
            raise EnvironmentFailure(
                f"cannot write the image layout {folder}: {error.strerror}",
                hint="check free space and permissions, then run it again",
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # the kernel frees it when we die
            if _is_still(folder, descriptor):
                yield folder
                return
        finally:
            os.close(descriptor)


def _is_still(folder: Path, descriptor: int) -> bool:
    """Say whether the folder has not been renamed while its lock was waited for."""
    try:
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _forget_unnamed(folder: Path, image: Image) -> None:
    """Delete blobs that the layout no longer names: the candidate's manifest and configuration."""
    forget(folder)
    named = {blob.digest.hex for blob, _ in image.blobs()} | {image.digest.hex}
    for path in (folder / "blobs" / "sha256").iterdir():
        if path.name not in named:
            path.unlink()


def discard_candidate(image: Image, layout: Path | None, tools: Tools) -> None:
    """Delete a candidate that did not pass, from the engine or beside its layout."""
    if layout is None:
        tools.engine.untag(_candidate_name(image))
    elif _beside(layout).exists():
        with _alone(_beside(layout)) as folder:
            shutil.rmtree(folder, ignore_errors=True)


def _candidate_name(image: Image) -> str:
    """Return a name by the layers alone: the final image has these, and other labels."""
    return f"{_CANDIDATES}:{key_of([layer.digest for layer in image.layers]).short}"


def _held(folder: Path) -> str | None:
    if not (folder / "index.json").is_file():
        return None
    return read_layout(folder).digest


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.candidate")
