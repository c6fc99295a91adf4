"""Someone who may write to the cache that machines share puts something else there.

With `cache.verify_key`, nothing but what the key signed is used. Without it, whoever may write to
the cache is trusted with what a result is, but never with the bytes of a file that is read.
"""

from __future__ import annotations

import base64
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from weightsmith.api.commands.cache import describe_cache, prune_cache
from weightsmith.building.wiring import open_tools
from weightsmith.cache.cache import SharedCache
from weightsmith.cache.document import LARGEST, read_document
from weightsmith.cache.store import SharedStore
from weightsmith.cache.uploads import Uploads, prepared
from weightsmith.core.errors import CacheLost, InputRefused, UsageError
from weightsmith.core.ports import IdentityCheck, Signer, Silent
from weightsmith.core.values import Blob, Digest, canonical, key_of
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.oci.registry_cache import RegistryCache
from weightsmith.oci.session import RegistryReply
from weightsmith.outside.folder_cache import FolderCache
from weightsmith.outside.keyless import TOKEN, identity_check, open_identity_signer
from weightsmith.provenance import signing
from weightsmith.provenance.signing import check_by
from weightsmith.provenance.statements import Statement
from weightsmith.recipe.user_config import RunOptions, WantedIdentity

from tests.fakes.cache import MemoryCache
from tests.fakes.memory import Memory, in_memory, new_signer
from tests.fakes.sigstore import ISSUER, WORKFLOW, sigstore, token
from tests.fakes.store import MemoryStore

Change = Callable[[dict[str, Any]], None]
"""Changes an entry's predicate."""
NOTE = {"stage": "merge", "inputs": {}}
KEY, OTHER = key_of(NOTE), key_of("another")


def blob_of(data: bytes) -> Blob:
    return Blob(digest=Digest.of(data), size=len(data), media_type="")


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    with in_memory(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryCache, Signer, str]:
    """A cache that a signing user filled, their key, and their image's digest."""
    cache, signer = MemoryCache(), new_signer()
    with in_memory(tmp_path_factory.mktemp("honest"), signer=signer) as first:
        first.cache = cache
        (built,) = first.build().values()
    return cache, signer, str(built.published.digest)


@pytest.fixture
def reader(memory: Memory, honest: tuple[MemoryCache, Signer, str]) -> Memory:
    """A user who believes that key, and reads a copy of that cache."""
    cache, signer, _ = honest
    memory.cache = MemoryCache(documents=dict(cache.documents), blobs=dict(cache.blobs))
    memory.verify_key = memory.folder / "cache.pub"
    memory.verify_key.write_bytes(signer.public)
    return memory


def opened(document: bytes) -> dict[str, Any]:
    outer = json.loads(document)
    return dict(json.loads(base64.b64decode(outer["payload"])) if "payload" in outer else outer)


def changed(document: bytes, change: Change, signer: Signer | None = None) -> bytes:
    """Return the document with another predicate, unsigned or signed by somebody."""
    statement = opened(document)
    change(statement["predicate"])
    made = Statement(statement)
    return signing.sign_statement(made, signer) if signer else made.content


def resealed(document: bytes, change: Change) -> bytes:
    """Return the document with another payload below the old signature."""
    outer, statement = json.loads(document), opened(document)
    change(statement["predicate"])
    return canonical({**outer, "payload": base64.b64encode(canonical(statement)).decode()})


def other_meta(predicate: dict[str, Any]) -> None:
    predicate["meta"] = {**predicate["meta"], "poisoned": True}


def swapped_files(predicate: dict[str, Any]) -> None:
    files = predicate["files"]
    if len(files) > 1:
        files[0]["digest"], files[-1]["digest"] = files[-1]["digest"], files[0]["digest"]
    else:
        other_meta(predicate)


FORGERIES: dict[str, Callable[[bytes], bytes]] = {
    "unsigned, other meta": lambda data: changed(data, other_meta),
    "unsigned, unchanged": lambda data: changed(data, lambda _: None),
    "another key, other meta": lambda data: changed(data, other_meta, new_signer()),
    "old signature, other meta": lambda data: resealed(data, other_meta),
    "old signature, swapped files": lambda data: resealed(data, swapped_files),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_only_what_the_key_signed_is_used(reader, honest, forge):
    """Every document is replaced: each is a miss with a warning, and the image is ours."""
    reader.cache.documents = {k: forge(data) for k, data in honest[0].documents.items()}
    (built,) = reader.build().values()

    assert built.published.digest == honest[2]
    assert {"merge", "quantize"} <= set(reader.jobs())
    assert [w for w in reader.progress.warnings if "is not used" in w]


def test_what_the_key_signed_is_used(reader, honest):
    """The same without an attacker: the tests above would pass if nothing were ever used."""
    (built,) = reader.build().values()

    assert (built.published.digest, reader.jobs()) == (honest[2], [])


def test_a_signed_result_of_another_key_is_refused(reader, honest):
    """A right signature over what was made of other inputs."""
    keys, documents = zip(*honest[0].documents.items(), strict=True)
    reader.cache.documents = dict(zip(keys, (*documents[1:], documents[0]), strict=True))
    (built,) = reader.build().values()

    assert built.published.digest == honest[2]
    assert [w for w in reader.progress.warnings if "another key" in w]


def two_files(folder: Path) -> dict[str, Any]:
    (folder / "model.safetensors").write_bytes(b"w" * 5000)
    (folder / "config.json").write_bytes(b"{}" * 10)
    return {"meta": 1}


@pytest.fixture
def shared(tmp_path: Path) -> MemoryCache:
    """A cache with one result of two files."""
    cache, store = MemoryCache(), MemoryStore(tmp_path / "maker")
    entry = store.produce(KEY, NOTE, two_files)
    Uploads(SharedCache(cache, None, print, 60), store.memo).upload(KEY, NOTE, entry)
    return cache


def test_only_what_the_identity_signed_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN, token())
    theirs = new_signer()
    store = MemoryStore(tmp_path / "maker")
    entry = store.produce(KEY, NOTE, two_files)
    with sigstore() as services:
        root, config = services.write(tmp_path)
        signers = (open_identity_signer(str(config)), theirs, None)
        documents = [prepared(KEY, NOTE, entry, store.memo, one)[0] for one in signers]

    def check(identity: str) -> IdentityCheck:
        wanted = WantedIdentity(
            certificate_identity=identity, certificate_oidc_issuer=ISSUER, trusted_root=str(root)
        )
        return identity_check(wanted)

    signed = documents[0]
    assert read_document(signed, KEY, check(WORKFLOW)).files == entry.tree.files
    assert read_document(signed, KEY, None).files == entry.tree.files
    altered = json.loads(signed)
    altered["dsseEnvelope"]["payload"] = base64.b64encode(documents[2] + b" ").decode()
    tried = [(one, WORKFLOW) for one in documents[1:]]
    tried += [(signed, "https://github.com/evil"), (json.dumps(altered).encode(), WORKFLOW)]
    for document, identity in tried:
        with pytest.raises(InputRefused, match="not signed by"):
            read_document(document, KEY, check(identity))
    with pytest.raises(InputRefused, match=r"not signed by the key"):
        read_document(signed, KEY, check_by(theirs.public))


def test_a_key_and_an_identity_exclude_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "cache.pub"
    key.write_bytes(new_signer().public)
    file = tmp_path / "config.yaml"
    both = f"verify_key: {key}, certificate_identity: me, certificate_oidc_issuer: x"
    file.write_text(f"cache: {{where: {tmp_path}/cache, {both}}}")
    monkeypatch.setenv("WEIGHTSMITH_CONFIG", str(file))
    with (
        pytest.raises(UsageError, match="exclude each other"),
        open_tools(RunOptions(runner="local"), Silent()),
    ):
        pass


def renamed(path: str) -> Change:
    return lambda predicate: predicate["files"][0].update(path=path)


MALFORMED: dict[str, Change] = {
    "above the folder": renamed("../escaped"),
    "deep above the folder": renamed("a/../../escaped"),
    "absolute": renamed("/tmp/escaped"),
    "empty part": renamed("a//b"),
    "null": renamed("a\0b"),
    "line break": renamed("a\nb"),
    "twice": renamed("model.safetensors"),
    "a file that is a folder too": renamed("model.safetensors/x"),
    "negative size": lambda p: p["files"][0].update(size=-1),
    "size that is no number": lambda p: p["files"][0].update(size="1"),
    "huge size": lambda p: p["files"][0].update(size=1 << 60),
    "no digest": lambda p: p["files"][0].update(digest="sha256:0"),
    "one layer less": lambda p: p["layers"].pop(),
    "a layer of another size": lambda p: p["layers"][0].__setitem__(1, 512),
    "swapped layers": lambda p: p["layers"].reverse(),
    "no files": lambda p: p.update(files=None),
    "made of other inputs": lambda p: p["note"].update(inputs={"base": "another"}),
    "another stage's": lambda p: p["note"].update(stage="source"),
    "meta that is a list": lambda p: p.update(meta=[]),
    "a program that is no file": lambda p: p.update(programs=["x"]),
    "a header that is no file": lambda p: p.update(headers={"x": ["sha256:" + "0" * 64, 1]}),
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED)
def test_malformed_documents_are_refused(shared, change):
    """Names that leave the folder, sizes that do not fit: refused before anything is read."""
    document = changed(shared.documents[KEY], change)
    with pytest.raises(InputRefused):
        read_document(document, KEY, None)


NO_DOCUMENTS = (
    b"", b"null", b"[]", b"{}", b'{"payloadType": 1}', b"[" * 100_000, b'{"a": 1, "a": 2}',
    b" " * (LARGEST + 1), b'{"predicate": ' + b"9" * 5000 + b"}", b"\xff\xfe",
)  # fmt: skip


@pytest.mark.parametrize("document", NO_DOCUMENTS, ids=lambda data: repr(data[:12]))
def test_what_is_no_document_is_refused(document):
    """Broken, deep, doubled or huge JSON."""
    with pytest.raises(InputRefused):
        read_document(document, KEY, check_by(new_signer().public))
    with pytest.raises(InputRefused):
        read_document(document, KEY, None)


SPOILED: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-1600],
    "cut within a header": lambda data: data[:100],
    "empty": lambda _: b"",
    "another byte in the weights": lambda data: data.replace(b"wwww", b"wwwx", 1),
    "another name in the tar": lambda data: data.replace(
        b"model.safetensors", b"xodel.safetensors"
    ),
    "a link": lambda data: data[:156] + b"2" + data[157:],
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_wrong_bytes_never_become_a_result(shared, tmp_path, spoil):
    """A right document, other bytes: nothing is kept, and the result is not offered again."""
    shared.blobs = {digest: spoil(data) for digest, data in shared.blobs.items()}
    store, warnings = MemoryStore(tmp_path / "mine"), list[str]()
    remote = SharedCache(shared, None, warnings.append, 60)
    (tmp_path / "scratch").mkdir()
    both = SharedStore(store, [remote], lambda: tmp_path / "scratch")
    entry = both.find(KEY)
    assert entry is not None
    with pytest.raises(CacheLost):
        entry.tree.path("model.safetensors").read_bytes()

    assert store.find(KEY) is None
    assert both.find(KEY) is None
    assert len(warnings) == 1
    assert both.produce(KEY, NOTE, two_files).tree.path("config.json").read_bytes() == b"{}" * 10


def test_a_stream_of_wrong_bytes_never_ends(shared, tmp_path):
    """The last bytes of a file are passed on only if all of it was right."""
    shared.blobs = {d: data.replace(b"wwww", b"wwwx", 1) for d, data in shared.blobs.items()}
    both = SharedStore(
        MemoryStore(tmp_path / "mine"), [SharedCache(shared, None, print, 60)], lambda: tmp_path
    )
    entry = both.find(KEY)
    assert entry is not None
    source = entry.tree.source("model.safetensors")
    assert not isinstance(source, Path)
    with pytest.raises(CacheLost):
        b"".join(source.open())


def link_to_a_secret(path: Path) -> None:
    secret = path.parents[2] / "secret"
    secret.write_text("{}")
    path.symlink_to(secret)


def hole(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(200 << 30)


def socket_file(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a link": link_to_a_secret,
    "a loop": lambda path: path.symlink_to(path.name),
    "a pipe": os.mkfifo,
    "a hole of 200 GB": hole,
    "a folder": Path.mkdir,
    "a socket": socket_file,
}


@pytest.fixture
def folder() -> Iterator[FolderCache]:
    """A cache with two entries; its path is short, since sockets' are."""
    with TemporaryDirectory() as made:
        cache = FolderCache(Path(made) / "cache")
        for key in (KEY, OTHER):
            cache.write(key, b"{}", [(blob_of(b"body"), lambda: iter((b"body",)))])
        yield cache


@pytest.mark.parametrize("put_there", NO_FILES.values(), ids=NO_FILES)
@pytest.mark.parametrize("suffix", [".json", ".blobs"])
def test_only_regular_files_of_a_shared_folder_are_read(folder, put_there, suffix):
    """In the place of a document, or of the list of its blobs: nothing hangs, fills memory or ends.

    Only that result is lost: the other is found, and cleaning goes on and removes what is odd.
    """
    odd = folder.root / "entries" / f"{KEY.hex}{suffix}"
    odd.unlink()
    put_there(odd)
    warnings: list[str] = []
    shared = SharedCache(folder, None, warnings.append, 60)

    if suffix == ".json":
        assert shared.find(KEY) is None
        assert "regular file" in warnings[0]
    assert folder.find(OTHER) == b"{}"
    assert not shared.broken
    assert OTHER in [kept.key for kept in folder.entries()]
    assert describe_cache(folder)[0]["cache"] == folder.where
    assert prune_cache(folder, 1 << 40)[0]["deleted"] == 0
    folder.remove([KEY])
    left = {path.name for path in odd.parent.iterdir()}
    assert left == {f"{OTHER.hex}.json", f"{OTHER.hex}.blobs"}
    assert b"".join(folder.read(blob_of(b"body"))) == b"body"


@pytest.mark.parametrize("put_there", NO_FILES.values(), ids=NO_FILES)
def test_only_regular_files_of_a_shared_folder_are_blobs(folder, put_there):
    """One result is lost, and the cache is used on."""
    blob = blob_of(b"body")
    place = next((folder.root / "blobs").rglob(blob.digest.hex))
    place.unlink()
    put_there(place)
    shared = SharedCache(folder, None, print, 60)

    with pytest.raises(CacheLost, match="regular file"):
        b"".join(shared.read(blob))
    assert not shared.broken


def test_a_link_in_the_place_of_a_blob_is_replaced_and_its_target_left_alone(folder, tmp_path):
    """It has the blob's size, and so would count as there; a writer's own file keeps its time."""
    blob, mine = blob_of(b"body"), tmp_path / "mine"
    mine.write_bytes(b"mine")
    os.utime(mine, (1, 1))
    place = next((folder.root / "blobs").rglob(blob.digest.hex))
    place.unlink()
    place.symlink_to(mine)

    folder.write(KEY, b"{}", [(blob, lambda: iter((b"body",)))])

    assert mine.stat().st_mtime == 1
    assert mine.read_bytes() == b"mine"
    assert b"".join(folder.read(blob)) == b"body"


@pytest.mark.parametrize(
    ("tags", "link", "says"),
    [(5, "", "its tags are no list"), (["x"], '<again>; rel="next"', "more than 1000 pages")],
)
def test_a_list_of_tags_that_is_none_or_has_no_end_is_refused(monkeypatch, tags, link, says):
    headers = httpx.Headers({"link": link})
    reply = RegistryReply(
        200, headers, json.dumps({"tags": tags}).encode(), "https://registry/tags/list"
    )
    session = SimpleNamespace(attempt=lambda what, call: reply, next_page=lambda reply: link)
    monkeypatch.setattr(RegistryCache, "_pulling", session)
    cache = RegistryCache(cast("Registry", None), Reference.parse("registry.example/team/cache"))

    with pytest.raises(InputRefused, match=says):
        describe_cache(cache)


ROWS: dict[str, bytes] = {
    "no digest": b"../../x 1\n",
    "negative": b"0" * 64 + b" -1\n",
    "a number of 5,000 digits": b"0" * 64 + b" " + b"9" * 5000 + b"\n",
    "no size": b"0" * 64,
    "an underline": b"0" * 64 + b" 1_0\n",
    "bytes": b"\xff\xfe\0",
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_a_list_of_blobs_is_digests_and_sizes(folder, rows):
    """An entry with another list goes with the next cleaning, before the blobs that it may need."""
    (folder.root / "entries" / f"{KEY.hex}.blobs").write_bytes(rows)

    assert [kept.key for kept in folder.entries()] == [OTHER]
    folder.remove([])
    assert (folder.find(KEY), folder.find(OTHER)) == (None, b"{}")
