"""Fleets in memory whose nodes share only the cache: what is sent, lost and sent again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from weightsmith.cache.cache import SharedCache
from weightsmith.cache.document import read_document, to_document
from weightsmith.cache.store import SharedStore
from weightsmith.cache.uploads import Uploads
from weightsmith.core.errors import EnvironmentFailure, UsageError
from weightsmith.core.ports import Cache
from weightsmith.fleets import payloads, running
from weightsmith.fleets.payloads import packed
from weightsmith.fleets.requests import TaskRequest
from weightsmith.fleets.rows import FleetRows
from weightsmith.outside.folder_cache import FolderCache
from weightsmith.outside.folders import FolderReader
from weightsmith.outside.s3_cache import S3Cache
from weightsmith.steps.tools import Tools

from tests.fakes.cache import MemoryCache
from tests.fakes.fleet import GOOD, Q4, MemoryFleet, by_tools, run, write_fleet
from tests.fakes.memory import Memory
from tests.fakes.s3_server import s3_server
from tests.fakes.store import MemoryStore


@pytest.mark.slow
def test_nodes_that_share_only_the_cache_send_images_and_reports(two: Memory) -> None:
    here = by_tools(two.tools)

    def elsewhere(text: str) -> str:
        request = json.loads(text)
        assert str(two.home) not in json.dumps(request["recipe"])
        return here(json.dumps({**request, "dist": "/nowhere", "token": "none"}))

    engine = MemoryFleet(elsewhere, remote=True)
    path = write_fleet(two, targets=[Q4])
    rows, _ = run(two, path, engine, outputs={"push": True})

    assert [row.verdict for row in rows.cells] == [GOOD, GOOD]
    for row in rows.cells:
        assert Path(row.report).is_file()
        assert Path(row.report).is_relative_to(two.dist)
        assert (f"team/tiny-{row.adapter}", f"1.0.0-{Q4}") in two.registry.manifests
    assert rows.bytes_moved > 0


def test_questions_go_through_the_cache_unless_they_are_few(
    two: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With each of 1,500 tasks, a file of megabytes would fill the memory."""
    monkeypatch.setattr(payloads, "_ALONG", 10)
    path = write_fleet(two, adapters=["./a"], targets=[Q4])
    cache = two.cache = MemoryCache()
    texts: list[str] = []

    with two.sharing():
        rows = run_elsewhere(two, path, cache, [lambda _: None], texts)

    assert rows.cells[0].verdict == GOOD, rows.cells[0].error
    assert [json.loads(text)["files"] for text in texts] == [{}]


def test_an_image_for_a_folder_that_a_node_does_not_see_is_refused(two: Memory) -> None:
    here = by_tools(two.tools)
    engine = MemoryFleet(lambda text: here(json.dumps({**json.loads(text), "token": "none"})))

    rows, _ = run(two, write_fleet(two, adapters=["./a"], targets=[Q4]), engine)

    assert rows.cells[0].verdict == "not made"
    assert "--push" in (rows.cells[0].hint or "")


def test_what_cannot_go_to_a_node_ends_its_cell_and_no_other(
    two: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_a(request: TaskRequest, tools: Tools, *, again: bool) -> TaskRequest:
        if request.adapter == "b":
            raise UsageError("b.jsonl is too large", hint="use fewer questions")
        return packed(request, tools, again=again)

    monkeypatch.setattr(running, "packed", only_a)
    engine = MemoryFleet(by_tools(two.tools), remote=True)

    rows, _ = run(two, write_fleet(two, targets=[Q4]), engine)

    assert [(row.verdict, row.exit_code) for row in rows.cells] == [(GOOD, 0), ("refused", 2)]
    assert rows.cells[1].error == "b.jsonl is too large"


def test_a_cache_that_takes_nothing_for_a_while_ends_no_cell(
    two: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: list[Exception] = [EnvironmentFailure("the cache is away"), OSError(5, "gone")]

    def share(*_: object, **__: object) -> None:
        if faults:
            raise faults.pop()

    tools = replace(two.tools, share=share)
    engine = MemoryFleet(by_tools(two.tools), remote=True)

    path = write_fleet(two, adapters=["./a"], targets=[Q4])
    rows, _ = run(two, path, engine, tools=tools)

    assert [(row.verdict, row.tries) for row in rows.cells] == [(GOOD, 3)]
    faults += [EnvironmentFailure("the cache is away")] * 3
    path = write_fleet(two, adapters=["./b"], targets=[Q4])
    rows, _ = run(two, path, engine, tools=tools)
    assert [(row.verdict, row.exit_code) for row in rows.cells] == [("not made", 5)]


def lose_entries(cache: MemoryCache) -> None:
    cache.remove([*cache.documents])


def lose_blobs(cache: MemoryCache) -> None:
    cache.blobs.clear()


def damage_memory(cache: MemoryCache) -> None:
    cache.blobs = {digest: other_byte(data) for digest, data in cache.blobs.items()}


def damage_folder(cache: FolderCache) -> None:
    for path in (cache.root / "blobs").rglob("*"):
        if path.is_file():
            path.write_bytes(other_byte(path.read_bytes()))


def damage_bucket(cache: S3Cache) -> None:
    files = cache._files
    for path in files.find(cache.where.removeprefix("s3://") + "/blobs"):
        files.pipe_file(path, other_byte(files.cat_file(path)))


def other_byte(data: bytes) -> bytes:
    """Change a byte behind a layer's first header."""
    return data[:600] + bytes([data[600] ^ 1]) + data[601:]


@pytest.mark.parametrize(
    ("kind", "damage", "here"),
    [
        ("memory", lose_entries, True),
        ("memory", lose_blobs, False),
        ("memory", damage_memory, False),
        pytest.param("folder", damage_folder, True, marks=pytest.mark.slow),
        pytest.param("s3", damage_bucket, False, marks=pytest.mark.full),
    ],
)
def test_what_the_cache_has_lost_or_damaged_at_the_same_size_is_sent_again(
    two: Memory,
    kind: str,
    damage: Callable[[Any], None],
    here: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Base and adapter are both damaged, each of their blobs: one retry mends all of it."""
    path = write_fleet(two, adapters=["./a"], targets=[Q4])
    with ExitStack() as stack:
        cache: Any = MemoryCache()
        if kind == "folder":
            cache = FolderCache(tmp_path / "cache")
        elif kind == "s3":
            for name, value in stack.enter_context(s3_server("cache")).items():
                monkeypatch.setenv(name, value)
            cache = S3Cache("cache/team")
        two.cache = cache
        if not here:  # an earlier fleet sent it, and this machine's store was cleaned since
            with two.sharing():
                run_elsewhere(two, path, cache)
            lose_results(cache, two.store)
            two.store.entries.clear()

        with two.sharing():
            rows = run_elsewhere(two, path, cache, [damage])

    assert (rows.cells[0].verdict, rows.cells[0].tries) == (GOOD, 2), rows.cells[0].error


@pytest.mark.parametrize(
    ("names", "lie"),
    [
        (("adapter_model.safetensors",), {}),
        pytest.param(("a.jsonl", "b.jsonl"), {"stage": "merge"}, marks=pytest.mark.slow),
    ],
    ids=["adapters", "questions, as another stage's result"],
)
def test_another_document_under_a_payload_s_key_is_not_used(
    two: Memory, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], lie: dict[str, str]
) -> None:
    """Nobody needs a key to see it: what goes to a node is named by the digest of its content."""
    monkeypatch.setattr(payloads, "_ALONG", 10)
    cache = two.cache = MemoryCache()
    with two.sharing():
        honest = run_elsewhere(two, write_fleet(two, targets=[Q4]), cache)
    wanted = [row.digest for row in honest.cells]
    lose_results(cache, two.store)

    def exchange(cache: MemoryCache) -> None:
        entries = [read_document(data, key, None) for key, data in cache.documents.items()]
        sent = [entry for entry in entries if entry.note["stage"] == "source"]
        one, other = [e for e in sent if any(f.path in names for f in e.files)]
        for entry, key in ((one, other.key), (other, one.key)):
            forged = replace(entry, key=key, note={**entry.note, **lie})
            cache.documents[key] = to_document(forged, None)

    two.store.entries.clear()
    with two.sharing():
        rows = run_elsewhere(two, write_fleet(two, targets=[Q4]), cache, [lambda _: None, exchange])

    assert [row.digest for row in rows.cells] == wanted, [row.error for row in rows.cells]
    assert max(row.tries for row in rows.cells) == 2


def lose_results(cache: Cache, store: MemoryStore) -> None:
    """Leave in a cache only what a fleet sent to its nodes."""
    sent = {key for key, note in store.notes.items() if note["stage"] == "source"}
    cache.remove({kept.key for kept in cache.entries()} - sent)


def run_elsewhere(
    memory: Memory,
    path: Path,
    cache: Cache,
    losses: Sequence[Callable[[Any], None]] = (),
    texts: list[str] | None = None,
) -> FleetRows:
    """Run a fleet whose nodes share only the cache, which has a loss before each of their tasks."""
    assert memory.shared is not None
    left = [*losses]

    def do(text: str) -> str:
        if texts is not None:
            texts.append(text)
        if left:
            left.pop(0)(cache)
        with TemporaryDirectory() as folder:
            remote = SharedCache(cache, None, memory.progress.warn, 60)
            own = MemoryStore(Path(folder) / "store")
            uploads = Uploads(remote, own.memo)
            store = SharedStore(own, [remote], lambda: Path(folder), uploads)
            readers = {"": FolderReader(store)}
            try:
                return by_tools(replace(memory.tools, store=store, readers=readers))(text)
            finally:
                uploads.close(60)

    tools = replace(memory.tools, share=memory.shared.share)
    engine = MemoryFleet(do, remote=True)
    with pytest.MonkeyPatch.context() as patch:
        # Only what is shared goes to the cache: an upload in the background could undo a loss.
        patch.setattr(memory.shared._uploads, "add", lambda *_, **__: None)
        return run(memory, path, engine, tools=tools, outputs={"push": True})[0]
