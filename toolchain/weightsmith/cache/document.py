"""What a shared cache says of one result: a statement, signed where there is a key.

Nothing in it is trusted before `read_document` has checked it, and no file before its bytes have
been compared with the digest that it states.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from weightsmith.core.errors import InputRefused, WeightsmithError
from weightsmith.core.ports import AnySigner, IdentityCheck, IdentitySigner
from weightsmith.core.resources import assembles_itself
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import (
    Blob,
    Digest,
    FileEntry,
    Json,
    StageInputs,
    Tree,
    Writable,
    key_of,
    tree_digest,
)
from weightsmith.oci.layers import LAYER_TAR, Memo, TarLayer
from weightsmith.oci.tar import LARGEST_TIME, source_date_epoch
from weightsmith.oci.weights import PROGRAM_FOLDER, program_layers, root_layers, weight_layers
from weightsmith.provenance import signing
from weightsmith.provenance.statements import Resource, Statement, statement

LARGEST = 16 << 20
"""Bytes of a document; an engine of 19,000 files has 5 MB."""
_LARGEST_HEADER = 64 << 20
_LARGEST_FILE = 1 << 46
_PREDICATE = "https://github.com/weightsmith/weightsmith/cache-entry/v1"
FOLDERS = {"models": "models/", "program": PROGRAM_FOLDER, "root": ""}
"""How an image packs a result's files -> the folder that it puts them in."""
_HINT = "the result is made here instead"
_CONTENT = "source"
"""The stage of an entry whose key names its content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedEntry:
    """One result as a shared cache has it."""

    key: Digest
    note: Mapping[str, Json]
    """What it was made of, as in the store: the key is the digest of this."""
    meta: Mapping[str, Json]
    files: tuple[FileEntry, ...]
    programs: frozenset[str] = frozenset()
    """Files that may be executed."""
    epoch: int = field(default_factory=source_date_epoch)
    """Times in its layers."""
    layers: tuple[Blob, ...] = ()
    """Its files in the layers that an image has of them, in the order of `layers_of`."""
    headers: Mapping[str, Blob] = field(default_factory=dict)
    """GGUF files' headers, by the file's path."""
    packing: str = "models"
    """A key of FOLDERS."""

    def mode(self, name: str) -> int:
        """Return a file's mode."""
        return 0o755 if name in self.programs else 0o644


def content_inputs(files: Iterable[FileEntry]) -> StageInputs:
    """Return what the key of files is made of that are asked for by their content."""
    return StageInputs(stage=_CONTENT, recipe_number=1, inputs={"files": tree_digest(files)})


def packing_of(note: Mapping[str, object]) -> str:
    """Return how an image packs the files of a result that was made of this."""
    if note.get("stage") != "base":
        return "models"
    inputs = cast("Mapping[str, object]", note["inputs"])
    return "root" if assembles_itself(str(inputs["engine"])) else "program"


def layers_of(
    entry: SharedEntry, tree: Tree | None = None, memo: Memo | None = None
) -> tuple[TarLayer, ...]:
    """Return a result's files as the layers that an image has of them; `tree` has their bytes."""
    files = tree or Tree(root=Path(), files=entry.files)
    match entry.packing:
        case "root":
            return root_layers(files, entry.mode, epoch=entry.epoch, memo=memo)
        case "program":
            return program_layers(files, epoch=entry.epoch, memo=memo)
        case _:
            return weight_layers(files, epoch=entry.epoch, memo=memo)


def to_document(entry: SharedEntry, signer: AnySigner | None) -> bytes:
    """Return the entry's document, in an envelope by a key, or in a bundle by an identity."""
    predicate: dict[str, Writable] = {
        "note": entry.note,
        "meta": entry.meta,
        "files": entry.files,
        "programs": entry.programs,
        "epoch": entry.epoch,
        "packing": entry.packing,
        "layers": [[blob.digest, blob.size] for blob in entry.layers],
        "headers": {path: [blob.digest, blob.size] for path, blob in entry.headers.items()},
    }
    made = statement([Resource(name="key", digest=entry.key)], _PREDICATE, predicate)
    if isinstance(signer, IdentitySigner):
        return signer.bundle(made.content)
    return signing.sign_statement(made, signer) if signer else made.content


def read_document(data: bytes, key: Digest, check: signing.Check | None) -> SharedEntry:
    """Return a document's entry; with `check`, only if it was signed so.

    Raises InputRefused if it is not a whole entry of this key: another key's, made of other things
    than the key says, malformed, unsigned, with files outside its folder, or with layers that
    cannot hold its files. So files that are asked for by their content are those files.
    """
    try:
        found = _read(data, key, check)
        _check(found)
    except WeightsmithError as error:
        raise InputRefused(error.message, hint=_HINT) from None
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        raise InputRefused(f"it is malformed: {error}", hint=_HINT) from None
    return found


def _read(data: bytes, key: Digest, check: signing.Check | None) -> SharedEntry:
    if len(data) > LARGEST:
        raise ValueError(f"it has more than {LARGEST} bytes")
    outer = parse(data, largest=LARGEST, unique=True)
    named = outer if isinstance(outer, dict) else {}
    if "dsseEnvelope" in named:
        read = signing.open_bundle(data, check)
    else:
        is_envelope = "payloadType" in named
        read = signing.open_envelope(data, check) if is_envelope else Statement(outer)
    if check and not read.signed:
        by = "the key in cache.verify_key"
        raise ValueError(
            f"it is not signed by {check.who if isinstance(check, IdentityCheck) else by}"
        )
    if read.predicate_type != _PREDICATE or read.subjects != {"key": key}:
        raise ValueError("it is of another key")
    about = read.predicate
    if not all(isinstance(about[name], dict) for name in ("note", "meta")):
        raise InputRefused("note and meta are not objects", hint=_HINT)
    return SharedEntry(
        key=key,
        note=about["note"],
        meta=about["meta"],
        files=tuple(
            FileEntry(path=str(f["path"]), size=_size(f["size"]), digest=Digest(f["digest"]))
            for f in about["files"]
        ),
        programs=frozenset(map(str, about["programs"])),
        epoch=_size(about["epoch"], LARGEST_TIME),
        packing=next(name for name in FOLDERS if name == about["packing"]),
        layers=tuple(
            Blob(digest=Digest(digest), size=_size(size), media_type=LAYER_TAR)
            for digest, size in about["layers"]
        ),
        headers={
            str(path): Blob(
                digest=Digest(digest), size=_size(size, _LARGEST_HEADER), media_type=LAYER_TAR
            )
            for path, (digest, size) in about["headers"].items()
        },
    )


def _size(value: object, most: int = _LARGEST_FILE) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{value!r} is not a size")
    return value


def _check(entry: SharedEntry) -> None:
    # The key is the digest of the note, and a note of content names it.
    if key_of(entry.note) != entry.key:
        raise InputRefused("it was made of other things than its key says", hint=_HINT)
    if entry.note.get("stage") == _CONTENT and content_inputs(entry.files).key != entry.key:
        raise InputRefused("its files are others than its key says", hint=_HINT)
    names = [file.path for file in entry.files]
    for name in names:
        parts = name.split("/")
        if any(part in {"", ".", ".."} for part in parts) or "\0" in name or not name.isprintable():
            raise InputRefused(f"it names a file outside its folder: {name!r}", hint=_HINT)
    if len(set(names)) != len(names) or not {*entry.programs, *entry.headers} <= set(names):
        raise InputRefused("it names a file twice, or one that it does not have", hint=_HINT)
    if [layer.size for layer in layers_of(entry)] != [blob.size for blob in entry.layers]:
        raise InputRefused("its layers cannot hold its files", hint=_HINT)
