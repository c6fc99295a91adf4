"""Sources in registries (`oci://`): artifacts whose layers are files, and images with a model.

A ModelPack, an adapter that is attached to an image, or what `oras push` made has a file in each
layer: a list, with digests. In an image (ours, a modelcar) layers are archives: of ours only those
with weights are read, of others all, and of the files in them only a model's. A layer that was
read is not read again after an interruption.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tarfile import TarFile

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
    keep_only,
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
    """Write the model's files of these layers to `model` in a folder; return their SHA-256."""
    tree, state = folder / "model", folder / "layers.json"
    read: list[str] = []
    files: dict[str, str] = {}
    odd: dict[str, str] = {}
    if state.is_file():
        read, files, odd = parse(state.read_bytes())
    else:
        remove(tree)
    tree.mkdir(exist_ok=True)
    total = sum(layer.size for layer in layers)
    done = 0
    for layer in layers:
        if layer.digest not in read:
            _apply(layer, tree, files, odd, source)
            read.append(layer.digest)
            write_whole(state, canonical([read, files, odd]))
        done += layer.size
        progress.advance(done, total, "bytes")
    pickles = [path for path, kind in odd.items() if kind == "pickle"]
    require_weights(files, source, pickles)
    root = model_root(files, source)
    for path, kind in odd.items():
        if kind == "link" and path.startswith(root):
            raise InputRefused(
                f"{source} has a link among the model's files: {path[:200]!r}",
                hint="make the image from the files themselves: cp -rL copies what links point to",
            )
    kept = {path.removeprefix(root): one for path, one in files.items() if path.startswith(root)}
    keep_only(tree, root, kept)
    state.unlink()
    return kept


def _apply(
    layer: Layer, tree: Path, files: dict[str, str], odd: dict[str, str], source: str
) -> None:
    """Write a layer's files over those of the layers below it, as engines do."""
    below_it = {*files, *odd}
    with opened(as_tar(layer)) as (archive, stream):
        _entries(archive, tree, files, odd, below_it, source)
        stream.drain()
        if stream.digest != layer.diff_id:
            raise InputRefused(
                f"{source}: the layer {layer.digest.short} is not the one that its configuration "
                "names",
                hint=manifests.DAMAGED,
            )


def _entries(
    archive: TarFile,
    tree: Path,
    files: dict[str, str],
    odd: dict[str, str],
    below_it: set[str],
    source: str,
) -> None:
    while (entry := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # they would accumulate
        parts = [part for part in entry.name.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise manifests.hostile(f"{source} has the path {entry.name[:200]!r}")
        folder, name = "/".join(parts[:-1]), parts[-1] if parts else ""
        if name == _OPAQUE:
            _forget(tree, files, odd, f"{folder}/".lstrip("/"), below_it)
        elif name.startswith(_WHITEOUT):
            gone = f"{folder}/{name.removeprefix(_WHITEOUT)}".lstrip("/")
            _forget(tree, files, odd, gone, below_it)
            _forget(tree, files, odd, f"{gone}/", below_it)
        elif entry.isdir() or not parts:
            continue
        elif is_used(path := "/".join(parts)):
            path = clean_path(path, source)
            (tree / path).unlink(missing_ok=True)
            files.pop(path, None)
            odd.pop(path, None)
            if entry.isreg() and (content := archive.extractfile(entry)):
                files[path] = write_file(content, tree / path, source)
            else:
                odd[path] = "link"
        elif is_pickle(path):
            odd[path] = "pickle"


def _forget(
    tree: Path, files: dict[str, str], odd: dict[str, str], path: str, below_it: set[str]
) -> None:
    """Delete a file, or with `/` at its end all below a folder, of the layers below this one."""
    for known in (*files, *odd):
        if known in below_it and (known == path or (path.endswith("/") and known.startswith(path))):
            (tree / known).unlink(missing_ok=True)
            files.pop(known, None)
            odd.pop(known, None)
