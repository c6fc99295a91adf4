"""Image -> Published: first as a candidate for its own tests, then under its name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from weightsmith.errors import EnvironmentFailure, UsageError, WeightsmithError
from weightsmith.files import alone, exchange, is_unfinished
from weightsmith.oci.archive import docker_archive, in_turn
from weightsmith.oci.image import Image
from weightsmith.oci.index import Index, Whole, images_of, own_of
from weightsmith.oci.layout import (
    DEFAULT_NAME,
    held_digest,
    image_names,
    write_index,
    write_layout,
)
from weightsmith.oci.layout_attachments import PARTS, forget
from weightsmith.oci.places import LayoutPlace, Place, RegistryPlace
from weightsmith.oci.references import Reference
from weightsmith.ports import CANDIDATES
from weightsmith.provenance.evidence import Evidence
from weightsmith.provenance.sealing import attach
from weightsmith.serving.memory import human
from weightsmith.tools import Tools
from weightsmith.trees import discard
from weightsmith.values import Json, Published, key_of


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
        name = _candidate_name(image, tools)
        try:
            _load(image, Reference.parse(name), tools)
            yield name
        except BaseException:
            with suppress(WeightsmithError):  # the engine may be what went away
                tools.engine.untag(name)
            raise
        return
    with _alone(_beside(layout), tools) as folder:
        _layout(image, folder, tools)
        yield f"oci:{folder}"


def publish(
    whole: Whole,
    reference: str,
    outputs: Outputs,
    told: Sequence[Evidence],
    tools: Tools,
) -> Published:
    """Bring an image to every output; the registry last, so that nothing unproven is public.

    `told` is the evidence of each platform's image. It goes with them, signed where there is a
    key; an engine has no place for it, and gets the image for this machine alone.

    Raises EnvironmentFailure where an engine or a registry fails, UsageError for a tag that
    holds another image already.
    """
    began = tools.clock()
    check_layout(outputs)
    place, own = Reference.parse(reference), own_of(whole)
    done = describe(whole, reference, outputs)
    if outputs.load:
        _load(own, place, tools)
    if tools.engine.answers():
        tools.engine.untag(_candidate_name(own, tools))
    if outputs.layout is not None:
        with _settled(whole, outputs.layout, tools) as beside:
            _attach(whole, told, LayoutPlace(beside), place, tools)
    if outputs.push:
        there = RegistryPlace(tools.registry, place)
        push: Callable[..., Published] = (
            tools.registry.push_index if isinstance(whole, Index) else tools.registry.push
        )
        done = push(
            whole,
            place,
            force=outputs.force,
            also_tags=(f"{place.tag}-{whole.digest.short}",) if outputs.tag_digest else (),
            before_tag=lambda: _attach(whole, told, there, place, tools),
            progress=lambda sent, total: tools.progress.advance(sent, total, "bytes"),
            warn=tools.progress.warn,
        )
    return replace(done, layers=_rows(own), seconds=tools.clock() - began)


def _attach(
    whole: Whole, told: Sequence[Evidence], place: Place, reference: Reference, tools: Tools
) -> None:
    for image, one in zip(images_of(whole), told, strict=True):
        attach(one, image.manifest_blob, reference.name, place, tools.signer)
    if isinstance(whole, Index):
        attach(Evidence(), whole.blob, reference.name, place, tools.signer)


def describe(whole: Whole, reference: str, outputs: Outputs) -> Published:
    """Return where the image is once it is published, at no cost."""
    local = outputs.layout is not None and not outputs.load and not outputs.push
    return Published(
        reference=f"oci:{outputs.layout}" if local else reference,
        digest=whole.digest,
        layers=_rows(own_of(whole)),
    )


def is_held(whole: Whole, reference: str, outputs: Outputs, tools: Tools) -> bool:
    """Say whether every local output holds this very image already; a registry is to be asked."""
    own = own_of(whole)
    if outputs.load and not _is_loaded(own, reference, tools):
        return False
    return outputs.layout is None or held_digest(outputs.layout) == whole.digest


def _rows(image: Image) -> list[Mapping[str, Json]]:
    return [{"digest": x.digest, "size": x.size, "file": x.file} for x in image.layers]


def _load(image: Image, reference: Reference, tools: Tools) -> None:
    name = f"{reference.name}:{reference.tag or 'latest'}"
    if _is_loaded(image, name, tools):
        return
    held = _like(image, reference, tools)
    turns = in_turn(image, len(held)) if tools.engine.describe().get("layerwise") else (image,)
    if held or len(turns) > 1:
        # It may be gone by then, and an image store may keep such layers in another form.
        with suppress(EnvironmentFailure):
            _load_in_turn(turns, held, name, tools)
            return
    _load_in_turn((image,), (), name, tools)


def _load_in_turn(turns: Sequence[Image], held: Sequence[str], name: str, tools: Tools) -> None:
    """Load images that each rest on the one before, and forget all but the last one's name."""
    passing = [_candidate_name(image, tools) for image in turns[:-1]]
    names = [*map(Reference.parse, passing), Reference.parse(name)]
    below = [held, *([layer.diff_id for layer in image.layers] for image in turns)]
    total = sum(layer.size for layer in turns[-1].layers[len(held) :])
    sent = 0

    def seen(archive: Iterator[bytes]) -> Iterator[bytes]:
        nonlocal sent
        for chunk in archive:
            yield chunk
            sent += len(chunk)
            tools.progress.advance(min(sent, total), total, "bytes")

    archives = map(docker_archive, turns, names, below)
    try:
        tools.engine.load(map(seen, archives), name)
    except BaseException:
        # An engine may name what it could not unpack: that is not loaded.
        with suppress(WeightsmithError):
            if _is_loaded(turns[-1], name, tools):
                tools.engine.untag(name)
        raise
    finally:
        with suppress(WeightsmithError):  # the engine may be what went away
            for each in passing:
                tools.engine.untag(each)


def _is_loaded(image: Image, name: str, tools: Tools) -> bool:
    """Say whether the engine has this image of that name.

    Docker's own store names images by their configuration, containerd's by their manifest.
    """
    return tools.engine.inspect(name).get("Id") in (image.config_blob.digest, image.digest)


def _like(image: Image, reference: Reference, tools: Tools) -> tuple[str, ...]:
    """Return the layers of an engine's image that shares most with this one from the bottom."""
    ids = [layer.diff_id for layer in image.layers]
    best: tuple[str, ...] = ()
    for held in tools.engine.chains_of(reference.name, CANDIDATES):
        shared = next((n for n, (a, b) in enumerate(zip(held, ids, strict=False)) if a != b), None)
        shared = min(len(held), len(ids)) if shared is None else shared
        if shared > len(best):
            best = held[:shared]
    return best


def _layout(whole: Whole, folder: Path, tools: Tools) -> None:
    _require_room(whole, folder)

    def progress(done: int, total: int) -> None:
        tools.progress.advance(done, total, "bytes")

    if isinstance(whole, Index):
        write_index(whole, folder, progress=progress)
    else:
        write_layout(whole, folder, progress=progress)


def _require_room(whole: Whole, folder: Path) -> None:
    """Raise EnvironmentFailure where the layout's own disk has no room for what it lacks."""
    store = folder / "blobs" / "sha256"
    sizes = {layer.digest: layer.size for image in images_of(whole) for layer in image.layers}
    needed = sum(size for digest, size in sizes.items() if not (store / digest.hex).is_file())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EnvironmentFailure(
            f"the image layout needs {human(needed)} of disk, {folder.parent} has {human(free)}"
            " free",
            hint="make free space there, or name a folder on a larger disk",
        )


def check_layout(outputs: Outputs) -> None:
    """Refuse a layout folder that holds anything else, because the image takes its place whole.

    Raises UsageError.
    """
    folder = outputs.layout
    if folder is None:
        return
    _recover(folder)
    if not folder.exists():
        return
    others = {"."} if not folder.is_dir() else {path.name for path in folder.iterdir()} - PARTS
    others = {name for name in others if not is_unfinished(name)}
    if others or image_names(folder) - {DEFAULT_NAME, ""}:
        raise UsageError(
            f"{folder} is there, and holds something else than one image's layout",
            hint="choose a folder that does not exist yet",
        )


@contextmanager
def _settled(whole: Whole, folder: Path, tools: Tools) -> Iterator[Path]:
    """Yield the candidate's layout, whole; give it its final place at once afterwards."""
    with _alone(_beside(folder), tools) as beside:
        stale = held_digest(beside)
        _layout(whole, beside, tools)
        if stale is not None and stale != whole.digest:
            _forget_unnamed(beside, whole)
        yield beside
        with _explained(folder):
            _take_place(beside, folder)


def _take_place(beside: Path, folder: Path) -> None:
    """Give a layout its final name, in place of what has it; there is no moment without one.

    Where the file system cannot swap names there is, and `_recover` ends what a kill left there.
    """
    old = _old(folder)
    if not folder.exists():
        beside.rename(folder)
        discard(old)
        return
    discard(old)
    with alone(folder):  # it is the candidate for a moment, and nobody is to take it for one
        if not folder.is_symlink() and exchange(beside, folder):
            beside.rename(old)
        else:
            folder.rename(old)
            beside.rename(folder)
        discard(old)


def _recover(folder: Path) -> None:
    """Bring back the layout that a build was about to replace when it was killed.

    Raises EnvironmentFailure where it cannot be renamed.
    """
    old = _old(folder)
    if folder.exists() or not old.exists():
        return
    with _alone(_beside(folder)) as beside:
        with _explained(folder):
            if old.exists() and not folder.exists():  # nobody did it meanwhile
                old.rename(folder)
        with suppress(OSError):
            beside.rmdir()  # where we made it


@contextmanager
def _alone(folder: Path, tools: Tools | None = None) -> Iterator[Path]:
    """Yield a folder that no other build of the same results writes to or renames meanwhile.

    Raises EnvironmentFailure where it cannot be made.
    """
    wait = False
    with ExitStack() as stack:
        with _explained(folder):
            while True:
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    stack.enter_context(alone(folder, wait=wait))
                    break
                except FileNotFoundError:
                    continue  # renamed between the two
                except BlockingIOError:
                    wait = True
                    if tools is not None:
                        tools.progress.note(f"another process writes {folder}: waiting for it")
        yield folder


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot write the image layout {folder}: {error.strerror}",
            hint="check free space and permissions, then run it again",
        ) from None


def _forget_unnamed(folder: Path, whole: Whole) -> None:
    """Delete blobs that the layout no longer names: the candidate's manifest and configuration."""
    forget(folder)
    named = {blob.digest.hex for image in images_of(whole) for blob, _ in image.blobs()}
    named |= {image.digest.hex for image in images_of(whole)} | {whole.digest.hex}
    for path in (folder / "blobs" / "sha256").iterdir():
        if path.name not in named:
            path.unlink()


def discard_candidate(image: Image, layout: Path | None, tools: Tools) -> None:
    """Delete a candidate that did not pass, from the engine or beside its layout."""
    if layout is None:
        tools.engine.untag(_candidate_name(image, tools))
    elif _beside(layout).exists():
        with _alone(_beside(layout), tools) as folder:
            discard(folder)


def _candidate_name(image: Image, tools: Tools) -> str:
    """Return a name of this build by the layers alone: the final image has these, other labels."""
    key = key_of([layer.digest for layer in image.layers]).short
    return f"{CANDIDATES}:{key}-{tools.engine.owner}"


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.candidate")
