"""Sources in registries (`oci://`): artifacts whose layers are files, and images with a model.

A ModelPack, an adapter that is attached to an image, or what `oras push` made has a file in each
layer: a list, with digests. In an image (ours, a modelcar) layers are archives: of ours only those
with weights are read, of others all, and of the files in them only a model's. A layer that was
read is not read again after an interruption.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from tarfile import TarFile
from typing import NamedTuple

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.files import write_whole
from weightsmith.core.ports import Progress
from weightsmith.core.safe_parse import parse
from weightsmith.core.trees import remove
from weightsmith.core.values import Blob, Digest, canonical
from weightsmith.models.folder import is_pickle, is_used
from weightsmith.oci import manifests
from weightsmith.oci.attachments import load_attachment
from weightsmith.oci.image import Image, layers_by_role
from weightsmith.oci.layers import Layer
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.oci.streams import as_tar, opened
from weightsmith.outside.archives import (
    clean_path,
    model_root,
    require_weights,
    write_file,
)
from weightsmith.outside.remote import Place, RemoteFile
from weightsmith.recipe.sources import LIST_PIN

_HINT = "check the registry, its name, and `docker login`"
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
_OLLAMA_NAMES = {manifests.OLLAMA_MODEL: "model.gguf"}


class OciRemote:
    """Artifacts and images of registries, with the credentials of Docker's tools."""

    scheme = "oci"
    packages = ()
    extra = ""
    where = ""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def pin_of(self, source: str, revision: str, sha256: str) -> str:
        """Return the source with its manifest's digest."""
        del sha256
        if "@sha256:" in source:
            return source
        return f"{source}@{revision}" if LIST_PIN.fullmatch(revision) else ""

    def open(self, source: str, revision: str, sha256: str, progress: Progress) -> Place:
        """Read a manifest; its layers are read later."""
        del sha256, progress
        asked = Reference.parse(source.removeprefix("oci://"))
        if revision:
            asked = asked.at(Digest(revision))
        body, kind = self._registry.read_manifest(asked)
        digest = asked.digest or Digest.of(body)
        exact = asked.at(digest)
        pin = source if "@sha256:" in source else f"{source}@{digest}"
        pinned = bool(asked.digest)
        if blobs := self._files(exact, body, kind):
            return Place(
                pin=pin,
                pinned=pinned,
                files=tuple(
                    RemoteFile(path=path, size=blob.size, digest=blob.digest)
                    for path, blob in blobs
                ),
                read=partial(self._read, exact, dict(blobs)),
                hint=_HINT,
            )
        image = self._image(exact)
        layers = layers_by_role(image).get("weights") or image.layers
        return Place(
            pin=pin,
            pinned=pinned,
            files=(),
            read=partial(self._read, exact, {}),
            hint=_HINT,
            make=partial(_unpacked, layers, source),
            size=sum(layer.size for layer in layers),
        )

    def _read(
        self, place: Reference, blobs: dict[str, Blob], file: RemoteFile, start: int, _end: int
    ) -> Iterator[bytes]:
        return self._registry.read_blob(place, blobs[file.path], start)

    def _files(self, place: Reference, body: bytes, kind: str) -> Sequence[tuple[str, Blob]]:
        """Return the files of an artifact, by path; none of one whose layers are archives."""
        if kind in manifests.INDEXES:
            return ()
        document = manifests.read_json(body, str(place))
        config = document.get("config")
        said = config.get("mediaType") if isinstance(config, dict) else ""
        if said not in manifests.CONFIGS:
            # Parts without a name are none of ours: an artifact may have anything else in it.
            found = load_attachment(body, lambda _: lambda: iter(()), str(place))
            return [(part.title, part.blob) for part in found.parts if part.title]
        image = self._image(place)
        named = [
            (layer.file or _OLLAMA_NAMES.get(layer.media_type, ""), layer)
            for layer in image.layers
            if image.has_files and ".tar" not in layer.media_type
        ]
        return [
            (path, Blob(digest=layer.digest, size=layer.size, media_type=layer.media_type))
            for path, layer in named
            if path
        ]

    def _image(self, place: Reference) -> Image:
        try:
            return self._registry.pull(place)
        except UsageError:  # none for this machine; weights are the same for all
            return self._registry.pull_all(place)[0]


def _unpacked(
    layers: Sequence[Layer], source: str, folder: Path, progress: Progress
) -> dict[str, str]:
    """Write the model's files of these layers to `model` in a folder; return their SHA-256.

    Each layer is unpacked into a folder of its own, and counts once its digest was verified: what
    another layer wrote, or deleted below it, is in no model.
    """
    tree, state = folder / "model", folder / "layers.json"
    read: list[_LayerContent] = []
    if state.is_file():
        read = [_LayerContent(*row) for row in parse(state.read_bytes())]
    else:
        remove(tree)
    total, done = sum(layer.size for layer in layers), 0
    for number, layer in enumerate(layers):
        if number == len(read):
            remove(folder / str(number))
            below = {one for each in read for path in each.files for one in _above(path)}
            read.append(_content(layer, folder / str(number), source, below))
            write_whole(state, canonical([list(one) for one in read]))
        done += layer.size
        progress.advance(done, total, "bytes")
    files, odd = _together(read)
    require_weights(files, source, [path for path, kind in odd.items() if kind == "pickle"])
    root = model_root(files, source)
    for path, kind in odd.items():
        if kind == "link" and path.startswith(root):
            raise InputRefused(
                f"{source} has a link among the model's files: {path[:200]!r}",
                hint="make the image from the files themselves: cp -rL copies what links point to",
            )
    kept = {}
    for path, (number, digest) in files.items():
        if path.startswith(root):
            target = tree / path.removeprefix(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():  # as after an interruption
                (folder / str(number) / path).rename(target)
            kept[path.removeprefix(root)] = digest
    state.unlink()
    return kept


class _LayerContent(NamedTuple):
    """What a layer has of a model."""

    files: dict[str, str]
    """SHA-256 by path."""
    odd: dict[str, str]
    """`link` or `pickle`, by path: what is not written."""
    gone: list[str]
    """Paths that it deletes in the layers below it, of folders with `/` at the end."""


def _together(layers: Sequence[_LayerContent]) -> tuple[dict[str, tuple[int, str]], dict[str, str]]:
    """Return the files of layers one above the other, with the layer of each, and the odd ones."""
    files: dict[str, tuple[int, str]] = {}
    odd: dict[str, str] = {}
    for number, layer in enumerate(layers):
        hidden = set(layer.gone)
        for path in (*layer.files, *layer.odd):  # a file may be where a folder was, or below a file
            hidden |= {path, f"{path}/", *(one.removesuffix("/") for one in _above(path))}
        for path in [*files, *odd]:
            if not hidden.isdisjoint((path, *_above(path))):
                files.pop(path, None)
                odd.pop(path, None)
        files |= {path: (number, digest) for path, digest in layer.files.items()}
        odd |= layer.odd
    return files, odd


def _above(path: str) -> list[str]:
    """Return the folders above a path, each with `/` at the end; of the root that alone."""
    return ["/", *(path[: at + 1] for at, character in enumerate(path) if character == "/")]


def _content(layer: Layer, tree: Path, source: str, below: set[str]) -> _LayerContent:
    """Write a layer's files into a folder; `below` are the folders of the layers below it.

    Raises InputRefused for another layer than the configuration names.
    """
    with opened(as_tar(layer)) as (archive, stream):
        found = _entries(archive, tree, source, below)
        stream.drain()
        if stream.digest != layer.diff_id:
            raise InputRefused(
                f"{source}: the layer {layer.digest.short} is not the one that its configuration "
                "names",
                hint=manifests.DAMAGED,
            )
    return found


def _entries(archive: TarFile, tree: Path, source: str, below: set[str]) -> _LayerContent:
    found = _LayerContent({}, {}, [])
    while (entry := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # they would accumulate
        parts = [part for part in entry.name.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise manifests.hostile(f"{source} has the path {entry.name[:200]!r}")
        folder, name = "/".join(parts[:-1]), parts[-1] if parts else ""
        if name == _OPAQUE:
            found.gone.append(f"{folder}/")
        elif name.startswith(_WHITEOUT):
            gone = f"{folder}/{name.removeprefix(_WHITEOUT)}".lstrip("/")
            found.gone.extend((gone, f"{gone}/"))
        elif entry.isdir() or not parts:
            continue
        elif is_used(path := "/".join(parts)):
            path = clean_path(path, source)
            found.files.pop(path, None)
            found.odd.pop(path, None)
            with suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError):
                (tree / path).unlink()
            if entry.isreg() and (content := archive.extractfile(entry)):
                found.files[path] = write_file(content, tree / path, source)
            else:
                found.odd[path] = "link"
        else:
            if is_pickle(path):
                found.odd[path] = "pickle"
            if f"{path}/" in below:
                found.gone.append(f"{path}/")
    return found
