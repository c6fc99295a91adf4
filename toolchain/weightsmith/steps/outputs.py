"""Where an image goes: first a candidate that can be started, then its name in every output.

A layout is written next to its final path. It takes the place of another by swapping names
(`renameat2`), or by two renames, which the next build mends if the process was killed between them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure, UsageError, WeightsmithError
from weightsmith.core.files import exchange, folder_lock, is_unfinished
from weightsmith.core.ports import CANDIDATES
from weightsmith.core.trees import discard
from weightsmith.core.values import Artifact, Checkpoint, Digest, Published, key_of
from weightsmith.core.waiting import holder
from weightsmith.evaluating.replay import REPLAY
from weightsmith.oci.image import Image, ImageOrIndex, Index, host_image, image_layers, images_of
from weightsmith.oci.layout import (
    DEFAULT_NAME,
    PARTS,
    LayoutLocation,
    docker_archive,
    forget,
    held_digest,
    image_names,
    incremental_images,
    write_layout,
)
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import ImageLocation, RegistryLocation
from weightsmith.provenance.evidence import Evidence
from weightsmith.provenance.sealing import attach
from weightsmith.serving.memory import human
from weightsmith.steps.tools import Tools


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageOutputs:
    """Where to publish an image; several outputs can be combined."""

    load: bool = False
    layout: Path | None = None
    """Folder of one OCI layout."""
    push: bool = False
    force: bool = False
    tag_digest: bool = False
    """Also push an immutable tag that ends with the digest's first twelve digits."""


@contextmanager
def candidate(image: Image, layout: Path | None, tools: Tools) -> Iterator[str]:
    """Make the image startable without giving it its final name; yield a launcher's reference.

    The candidate is loaded into the container engine if `layout` is None, else written to a layout
    next to `layout`; what an interrupt leaves there is used by the next run. It is kept until
    `deliver` or `discard_candidate`, so layers are copied once.
    """
    if layout is None:
        name = _candidate_name(image, tools)
        try:
            _load(image, Reference.parse(name), tools)
            yield name
        except BaseException:
            with suppress(WeightsmithError):  # the engine itself may have failed
                tools.engine.untag(name)
            raise
        return
    with _locked_folder(_candidate(_real(layout)), tools) as folder, _nothing_left(folder):
        _write(image, folder, tools)
        yield f"oci:{folder}"


def deliver(
    whole: ImageOrIndex,
    reference: str,
    outputs: ImageOutputs,
    attachments: Sequence[Evidence],
    tools: Tools,
) -> Published:
    """Load, write and push an image, as `outputs` says; push only after the rest succeeded.

    `attachments` is the evidence of each platform's image. Layouts and registries get it, signed
    if there is a key. An engine cannot store it, and gets only the image for this machine.

    Raises EnvironmentFailure if an engine or a registry fails, UsageError if the tag already
    names another image.
    """
    began = tools.clock()
    check_layout(outputs.layout)
    place, own = Reference.parse(reference), host_image(whole)
    done = describe(whole, reference, outputs)
    if outputs.load:
        _load(own, place, tools)
    discard_candidate(own, None, tools)
    if outputs.layout is not None:
        with _final_layout(whole, outputs.layout, tools) as folder:
            _attach(whole, attachments, LayoutLocation(folder), place, tools)
    if outputs.push:
        there = RegistryLocation(tools.registry, place, every=outputs.force)
        done = tools.registry.push(
            whole,
            place,
            force=outputs.force,
            also_tags=(f"{place.tag}-{whole.digest.short}",) if outputs.tag_digest else (),
            before_tag=lambda: _attach(whole, attachments, there, place, tools),
            progress=lambda sent, total: tools.progress.advance(sent, total, "bytes"),
            warn=tools.progress.warn,
        )
    return replace(
        done,
        layers=image_layers(own),
        seconds=tools.clock() - began,
        platforms=_platforms(whole),
    )


def _attach(
    whole: ImageOrIndex,
    attachments: Sequence[Evidence],
    place: ImageLocation,
    reference: Reference,
    tools: Tools,
) -> None:
    for image, one in zip(images_of(whole), attachments, strict=True):
        why = attach(one, image.manifest_blob, reference.name, place, tools.signer)
        if why is not None:
            tools.progress.warn(
                f"{image.digest.short} was withdrawn from {reference.name}: {why}; `verify` goes on"
                " refusing it"
            )
    if isinstance(whole, Index):
        attach(Evidence(), whole.manifest_blob, reference.name, place, tools.signer)


def describe(whole: ImageOrIndex, reference: str, outputs: ImageOutputs) -> Published:
    """Return where the image will be published, without contacting anything."""
    local = outputs.layout is not None and not outputs.load and not outputs.push
    return Published(
        reference=f"oci:{outputs.layout}" if local else reference,
        digest=whole.digest,
        layers=image_layers(host_image(whole)),
        platforms=_platforms(whole),
    )


def _platforms(whole: ImageOrIndex) -> dict[str, Digest]:
    return {image.platform: image.digest for image in images_of(whole) if image.platform}


def is_held(whole: ImageOrIndex, reference: str, outputs: ImageOutputs, tools: Tools) -> bool:
    """Return whether every local output already has this image, without contacting a registry."""
    own = host_image(whole)
    if outputs.load and not _is_loaded(own, reference, tools):
        return False
    return outputs.layout is None or held_digest(outputs.layout) == whole.digest


def _load(image: Image, reference: Reference, tools: Tools) -> None:
    name = f"{reference.name}:{reference.tag or 'latest'}"
    if _is_loaded(image, name, tools):
        return
    held: tuple[str, ...] = ()
    for chain in tools.engine.chains_of(reference.name, CANDIDATES):
        pairs = zip(chain, (layer.diff_id for layer in image.layers), strict=False)
        alike = takewhile(lambda pair: pair[0] == pair[1], pairs)
        held = max(held, tuple(diff_id for diff_id, _ in alike), key=len)
    turns = (
        incremental_images(image, len(held))
        if tools.engine.describe().get("layerwise")
        else (image,)
    )
    if held or len(turns) > 1:
        # The image may be deleted by then, and image stores may keep such layers in another form.
        with suppress(EnvironmentFailure):
            _load_in_turn(turns, held, name, tools)
            return
    _load_in_turn((image,), (), name, tools)


def _load_in_turn(turns: Sequence[Image], held: Sequence[str], name: str, tools: Tools) -> None:
    """Load images that are each based on the previous one; only the last keeps its name."""
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
        # An engine may list an image that it could not unpack; such an image is not loaded.
        with suppress(WeightsmithError):
            if _is_loaded(turns[-1], name, tools):
                tools.engine.untag(name)
        raise
    finally:
        with suppress(WeightsmithError):  # the engine itself may have failed
            for each in passing:
                tools.engine.untag(each)


def _is_loaded(image: Image, name: str, tools: Tools) -> bool:
    """Return whether the engine has this image under this name.

    Docker's own store names images by their configuration, containerd's by their manifest.
    """
    return tools.engine.inspect(name).get("Id") in (image.config_blob.digest, image.digest)


def discard_candidate(image: Image, layout: Path | None, tools: Tools) -> None:
    """Delete the candidate, if there is one, from the engine or from next to the layout."""
    if layout is not None:
        if (place := _candidate(_real(layout))).exists():
            with _locked_folder(place, tools):
                discard(place)
    elif tools.engine.answers():
        tools.engine.untag(_candidate_name(image, tools))


def _candidate_name(image: Image, tools: Tools) -> str:
    """Return a name for this build's candidate; it depends only on layers, not on labels.

    Not on the replay set either, which is added once the candidate has answered.
    """
    asked = [layer for layer in image.layers if layer.file != REPLAY.lstrip("/")]
    key = key_of([layer.digest for layer in asked]).short
    return f"{CANDIDATES}:{key}-{tools.engine.owner}"


def network_in_jobs(checkpoint: Checkpoint, artifact: Artifact | None, tools: Tools) -> bool:
    """Return whether any job had network access, in this build or for a cached result."""
    made = (checkpoint.details, artifact.details if artifact else {})
    return tools.runner.networked or any(details.get("network_in_jobs") for details in made)


@contextmanager
def _final_layout(whole: ImageOrIndex, folder: Path, tools: Tools) -> Iterator[Path]:
    """Yield the complete candidate layout; move it to its final path afterwards.

    If the block fails, nothing is left; what an interrupt leaves is used by the next run.
    """
    folder = _real(folder)
    with _locked_folder(_candidate(folder), tools) as candidate, _nothing_left(candidate):
        stale = held_digest(candidate)
        _write(whole, candidate, tools)
        if stale is not None and stale != whole.digest:
            # The candidate's manifest and config: the layout does not refer to them any more.
            forget(candidate)
            named = {blob.digest.hex for image in images_of(whole) for blob, _ in image.blobs()}
            named |= {image.digest.hex for image in images_of(whole)} | {whole.digest.hex}
            for path in (candidate / "blobs" / "sha256").iterdir():
                if path.name not in named:
                    path.unlink()
        yield candidate
        with _explained(folder):
            _take_place(candidate, folder)


def _take_place(candidate: Path, folder: Path) -> None:
    """Rename a layout to its final path, so that a layout exists there at every moment.

    A file system that cannot swap names needs two renames. `_recover` completes them if the
    process was killed in between.
    """
    old = _old(folder)
    if not folder.exists():
        candidate.rename(folder)
        discard(old)
        return
    discard(old)
    with folder_lock(folder):  # it briefly has the candidate's name, so lock it
        if exchange(candidate, folder):
            candidate.rename(old)
        else:
            folder.rename(old)
            candidate.rename(folder)
        discard(old)


def _recover(folder: Path) -> None:
    """Restore the layout that a killed build was replacing."""
    old = _old(folder)
    if folder.exists() or not old.exists():
        return
    with _locked_folder(_candidate(folder)) as candidate:
        with _explained(folder):
            if old.exists() and not folder.exists():  # no other process restored it
                old.rename(folder)
        with suppress(OSError):
            candidate.rmdir()  # if this call created it


@contextmanager
def _locked_folder(folder: Path, tools: Tools | None = None) -> Iterator[Path]:
    """Yield a locked folder: no other build writes to it or renames it until the block ends."""
    wait = False
    with ExitStack() as stack:
        with _explained(folder):
            while True:
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    stack.enter_context(folder_lock(folder, wait=wait))
                    break
                except FileNotFoundError:
                    continue  # renamed between open and lock
                except BlockingIOError:
                    wait = True
                    if tools is not None:
                        tools.progress.note(
                            f"the layout {folder} is in use by {holder(folder)}: waiting for it"
                        )
        yield folder


@contextmanager
def _nothing_left(candidate: Path) -> Iterator[None]:
    """Delete a candidate, which may be as large as the model, if the block fails."""
    try:
        yield
    except Exception:
        discard(candidate)
        raise


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot write the image layout {folder}: {error.strerror}",
            hint="check free space and permissions, then run the command again",
        ) from None


def check_layout(folder: Path | None) -> None:
    """Raise UsageError if the layout folder has other files, which the image would replace."""
    if folder is None:
        return
    if not folder.name:
        raise UsageError(f"--layout {folder}: no folder can be put there", hint="name another one")
    folder = _real(folder)
    _recover(folder)
    if not folder.exists():
        return
    others = {"."} if not folder.is_dir() else {path.name for path in folder.iterdir()} - PARTS
    others = {name for name in others if not is_unfinished(name)}
    if others or image_names(folder) - {DEFAULT_NAME, ""}:
        raise UsageError(
            f"{folder} exists and is not the layout of a single image",
            hint="choose a folder that does not exist yet",
        )


def _write(whole: ImageOrIndex, folder: Path, tools: Tools) -> None:
    store = folder / "blobs" / "sha256"
    sizes = {layer.digest: layer.size for image in images_of(whole) for layer in image.layers}
    needed = sum(size for digest, size in sizes.items() if not (store / digest.hex).is_file())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EnvironmentFailure(
            f"the image layout needs {human(needed)} of disk, but {folder.parent} has {human(free)}"
            " free",
            hint="free some space there, or give a folder on a larger disk",
        )

    def progress(done: int, total: int) -> None:
        tools.progress.advance(done, total, "bytes")

    write_layout(whole, folder, progress=progress)


def _real(folder: Path) -> Path:
    """Return where a link leads, perhaps to another disk: the link itself stays as it is."""
    return folder.resolve() if folder.is_symlink() else folder


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _candidate(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.candidate")
