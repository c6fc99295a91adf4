"""Fuzzed places that machines share: a cache's entries in a folder, a bucket, a registry; payloads.

Whoever may write there puts something odd at one key. That result may be lost, and no other: the
cache is used on, it can be described and cleaned, and no file is ever another than its key says.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import fsspec
from weightsmith.api.commands.cache import describe_cache, prune_cache
from weightsmith.cache.cache import SharedCache
from weightsmith.cache.document import content_inputs
from weightsmith.cache.store import SharedStore
from weightsmith.cache.uploads import Uploads
from weightsmith.core.ports import Cache
from weightsmith.core.safe_parse import RECORD, parse
from weightsmith.core.values import Blob, Digest, Tree
from weightsmith.fleets.node import _written
from weightsmith.fleets.requests import TaskRequest
from weightsmith.oci.layers import LAYER_TAR
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.oci.registry_cache import RegistryCache
from weightsmith.outside.folder_cache import FolderCache
from weightsmith.outside.s3_cache import S3Cache

from tests.fakes.cache import MemoryCache
from tests.fakes.images import tree_of
from tests.fakes.registry import fake_registry
from tests.fakes.store import MemoryStore
from tests.hostile.fuzz.mutations import bytes_changed, json_changed

FILES = {"notes.txt": b"of a shared folder\n" * 9, "b/weights.safetensors": b"\0" * 700}


@dataclass(frozen=True)
class Filled:
    """An honest entry of FILES: its key, its document, and its blobs."""

    key: Digest
    document: bytes
    blobs: dict[Digest, bytes]


@cache
def filled() -> Filled:
    """Return what an honest machine uploads."""
    with TemporaryDirectory() as folder:
        store, there = MemoryStore(Path(folder) / "store"), MemoryCache()
        home = Path(folder) / "files"
        stage = content_inputs(tree_of(home, FILES).files)
        entry = store.produce(stage.key, stage.note, lambda folder: put(folder) or {})
        shared = SharedCache(there, None, print, 60)
        Uploads(shared, store.memo, None).upload(stage.key, stage.note, entry)
        return Filled(stage.key, there.documents[stage.key], dict(there.blobs))


def put(folder: Path, files: Mapping[str, bytes] = FILES) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def changed_entry(random: Random) -> bytes:
    """Change an entry's document, one of its blobs, or the list of them."""
    honest = filled()
    document: bytes = honest.document
    blobs = {digest.hex: data for digest, data in honest.blobs.items()}
    rows = "".join(f"{name} {len(data)}\n" for name, data in blobs.items()).encode()
    match random.randrange(5):
        case 0 | 1:
            document = json.dumps(json_changed(random, json.loads(document))).encode()
        case 2:
            document = bytes_changed(random, document)
        case 3:
            rows = bytes_changed(random, rows)
        case _:
            name = random.choice(sorted(blobs))
            blobs[name] = bytes_changed(random, blobs[name])
    parts = {"document": document, "rows": rows, **blobs}
    return json.dumps({k: base64.b64encode(v).decode() for k, v in parts.items()}).encode()


def laid_out(data: bytes) -> dict[str, bytes]:
    """Return the files of such an entry, by their path in a folder or bucket."""
    parts = {name: base64.b64decode(text) for name, text in json.loads(data).items()}
    entry = f"entries/{filled().key.hex}"
    files = {f"{entry}.json": parts.pop("document"), f"{entry}.blobs": parts.pop("rows")}
    return files | {f"blobs/{name[:2]}/{name}": blob for name, blob in parts.items()}


def read_folder_entry(data: bytes, folder: Path) -> None:
    put(folder / "cache", laid_out(data))
    used(FolderCache(folder / "cache"), folder)


def read_bucket_entry(data: bytes, folder: Path) -> None:
    there = S3Cache("bucket/team")
    there._files = files = fsspec.filesystem("memory")
    files.store.clear()
    for name, content in laid_out(data).items():
        files.pipe_file(f"bucket/team/{name}", content)
    used(there, folder)


@cache
def pushed() -> tuple[dict[tuple[str, str], tuple[str, bytes]], dict[tuple[str, str], bytes]]:
    """Return manifests and blobs of a registry that has the honest entry."""
    with fake_registry() as registry, Registry(pause=lambda _: None) as client:
        there = RegistryCache(client, Reference.parse(f"{registry.host}/team/cache"))
        honest = filled()
        blobs = [
            (
                Blob(digest=digest, size=len(data), media_type=LAYER_TAR),
                lambda data=data: iter((data,)),
            )
            for digest, data in honest.blobs.items()
        ]
        there.write(honest.key, honest.document, blobs)
        return dict(registry.manifests), dict(registry.blobs)


def changed_manifest(random: Random) -> bytes:
    (manifest,) = {data for _, data in pushed()[0].values()}
    return json.dumps(json_changed(random, json.loads(manifest))).encode()


def read_manifest_entry(data: bytes, folder: Path) -> None:
    with fake_registry() as registry, Registry(pause=lambda _: None) as client:
        manifests, blobs = pushed()
        registry.blobs.update(blobs)
        for (repository, _), (kind, _) in manifests.items():
            for name in (filled().key.hex, str(Digest.of(data))):
                registry.manifests[repository, name] = (kind, data)
        used(RegistryCache(client, Reference.parse(f"{registry.host}/team/cache")), folder)


def used(there: Cache, folder: Path) -> None:
    """Look the entry up, read its files, describe the cache and clean it."""
    key, scratch = filled().key, folder / "scratch"
    shared = SharedCache(there, None, lambda _: None, 60)
    store = SharedStore(MemoryStore(folder / "store"), [shared], lambda: scratch)
    try:
        entry = store.find(key)
        if entry is not None:
            root = entry.tree.root
            found = {path.relative_to(root): path for path in root.rglob("*") if path.is_file()}
            assert {str(name): path.read_bytes() for name, path in found.items()} == FILES
    finally:
        assert not shared.broken, "one entry cost the whole cache"
        describe_cache(there)
        prune_cache(there, 1 << 60)
        prune_cache(there, 0)
        there.remove([key])
        # The registry in this process deletes nothing.
        assert there.origin[0] or there.find(key) is None, "it cannot be deleted"


REQUEST = {
    "id": "1", "kind": "cell", "version": "1", "adapter": "a",
    "recipe": {
        "name": "tiny", "version": "1", "base": {"source": "folders/0/base"},
        "adapters": [{"source": "folders/1/a"}],
        "evaluate": {"data": "files/0/questions.jsonl"}, "targets": ["llamacpp-q4_k_m"],
    },
    "lock": {"sources": {}, "bases": {}}, "targets": ["llamacpp-q4_k_m"],
    "questions": [], "outputs": {}, "tools": {}, "dist": "/dist", "token": "",
    "files": {"files/0/questions.jsonl": "e30K", "files/1/x": ""},
    "payloads": {"folders/0/base": "", "folders/1/a": ""},
}  # fmt: skip


def changed_request(random: Random) -> bytes:
    payloads = dict.fromkeys(REQUEST["payloads"], str(filled().key))
    return json.dumps(json_changed(random, {**REQUEST, "payloads": payloads})).encode()


def read_request(data: bytes, folder: Path) -> None:
    """Put what it brings into a node's folder, as the node does; nothing is written beside it."""
    try:
        request = TaskRequest.from_json(parse(data, largest=RECORD))
    except ValueError:  # which the node says, and ends with 2
        return
    home, files = folder / "home", folder / "files"
    home.mkdir()
    put(files)
    there = SimpleNamespace(tree=Tree(root=files, files=()))
    store = SimpleNamespace(find=lambda key: there if key == filled().key else None)
    try:
        _written(request, home, SimpleNamespace(store=store))
    finally:
        assert {path.name for path in folder.iterdir()} == {"home", "files"}, "written elsewhere"
        assert {path.name: path.read_bytes() for path in files.iterdir() if path.is_file()} == {
            "notes.txt": FILES["notes.txt"]
        }, "written through a link"
