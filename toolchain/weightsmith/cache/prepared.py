"""A local result as a shared cache takes it: its document, and the blobs that it names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from weightsmith.cache.document import SharedEntry, layers_of, packing_of, to_document
from weightsmith.core.errors import InputRefused
from weightsmith.core.ports import Entry, Signer
from weightsmith.core.values import Blob, Digest, Json, key_of
from weightsmith.oci.layers import LAYER_TAR, Memo
from weightsmith.oci.uploads import checked_opener

Opener: TypeAlias = Callable[[], Iterator[bytes]]
_HEADER_TYPE = "application/vnd.weightsmith.cache.header.v1"
_LARGEST_HEADER = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A document, and the blobs that it names with their bytes."""

    key: Digest
    document: bytes
    blobs: tuple[tuple[Blob, Opener], ...]
    layers: tuple[Digest, ...]
    """Digests of the blobs that an image may have as layers."""


def prepared(
    key: Digest, note: Mapping[str, Json], entry: Entry, memo: Memo, signer: Signer | None
) -> Prepared:
    """Return a local entry as a cache takes it; hashes its layers unless their digests are known.

    Raises UsageError or InputRefused for files that cannot be in a layer, and for a note that the
    key is not the digest of, which no reader would use.
    """
    if key_of(note) != key:
        raise InputRefused(
            "it does not say what it was made of",
            hint="`clean --keep 0` empties the store; the next build makes it again",
        )
    tree = entry.tree
    plain = SharedEntry(
        key=key,
        note=note,
        meta=entry.meta,
        files=tree.files,
        programs=frozenset(f.path for f in tree.files if tree.mode(f.path) & 0o100),
        packing=packing_of(note),
    )
    layers = layers_of(plain, tree, memo)
    blobs = tuple(Blob(digest=x.digest, size=x.size, media_type=LAYER_TAR) for x in layers)
    heads = {f.path: _header(tree.path(f.path)) for f in tree.files if f.path.endswith(".gguf")}
    shared = replace(
        plain,
        layers=blobs,
        headers={path: _blob(head) for path, head in heads.items() if head},
    )
    bodies: list[tuple[Blob, Opener]] = [
        (blob, checked_opener(layer, blob)) for blob, layer in zip(blobs, layers, strict=True)
    ]
    bodies += [(_blob(head), _of(head)) for head in heads.values() if head]
    return Prepared(
        key=key,
        document=to_document(shared, signer),
        blobs=tuple(bodies),
        layers=tuple(blob.digest for blob in blobs),
    )


def _blob(data: bytes) -> Blob:
    return Blob(digest=Digest.of(data), size=len(data), media_type=_HEADER_TYPE)


def _of(data: bytes) -> Opener:
    return lambda: iter((data,))


def _header(path: Path) -> bytes:
    """Return the bytes of a GGUF file before its tensors; empty if it has no readable header."""
    from weightsmith.models.gguf_reader import GGUFReader

    try:
        reader = GGUFReader(path)
        size = int(reader.data_offset)
        with path.open("rb") as file:
            return file.read(size) if size <= _LARGEST_HEADER else b""
    except (OSError, ValueError, InputRefused):
        return b""
