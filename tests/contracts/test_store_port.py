"""One suite for every store: the fake and the one on disk."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from weightsmith.cache.cache import SharedCache
from weightsmith.cache.store import SharedStore
from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.values import Digest, UnreadDigest, key_of
from weightsmith.outside.store import FileStore

from tests.fakes.cache import MemoryCache
from tests.fakes.store import MemoryStore

KEY = key_of("a result")
Make = Callable[[Path], dict[str, object]]


class Shared(SharedStore):
    """A store on disk in front of an empty cache that is not written to."""

    def __init__(self, root: Path) -> None:
        self.root, local = root, FileStore(root)
        self.close = local.close
        super().__init__(local, [SharedCache(MemoryCache(), None, print, 60)], lambda: root)


AnyStore = MemoryStore | FileStore | Shared


@pytest.fixture(params=[MemoryStore, FileStore, Shared])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> AnyStore:
    return request.param(tmp_path / "store")


def write(text: str) -> Make:
    def make(folder: Path) -> dict[str, object]:
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / "file").write_text(text)
        return {"text": text}

    return make


def breaks(error: BaseException) -> Make:
    def make(folder: Path) -> dict[str, object]:
        (folder / "half").write_text("ha")
        raise error

    return make


def test_a_result_is_made_once_and_found_again(store: AnyStore) -> None:
    assert store.find(KEY) is None
    first = store.produce(KEY, {"stage": "x"}, write("one"))
    again = store.produce(KEY, {"stage": "x"}, write("two"))

    assert (first.cached, again.cached) == (False, True)
    assert again == store.find(KEY)
    assert (again.meta, again.tree) == ({"text": "one"}, first.tree)
    assert again.tree.path("sub/file").read_text() == "one"
    assert [(f.path, f.size, f.digest) for f in again.tree.files] == [
        ("sub/file", 3, Digest.of(b"one"))
    ]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("resume", [True, False])
def test_a_maker_that_fails_leaves_nothing_visible(
    store: AnyStore, error: BaseException, resume: bool
) -> None:
    with pytest.raises(type(error)):
        store.produce(KEY, {}, breaks(error), resume=resume)
    assert store.find(KEY) is None

    def finish(folder: Path) -> dict[str, object]:
        return {"resumed": (folder / "half").exists()}

    assert store.produce(KEY, {}, finish, resume=resume).meta == {"resumed": resume}


def test_a_full_disk_is_explained_and_gets_its_room_back(store: AnyStore) -> None:
    def full(folder: Path) -> dict[str, object]:
        (folder / "half").write_text("ha")
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "half"))

    with pytest.raises(EnvironmentFailure, match="disk is full") as caught:
        store.produce(KEY, {}, full, resume=True)

    assert caught.value.hint
    assert not list((store.root / "partial").iterdir())
    # An error about another place stays what it is.
    with pytest.raises(FileNotFoundError):
        store.produce(KEY, {}, breaks(FileNotFoundError(errno.ENOENT, "gone", "/elsewhere")))


def test_digests_that_the_maker_knows_are_taken(store: AnyStore) -> None:
    known = "ab" * 32

    def make(folder: Path) -> dict[str, object]:
        (folder / "a").write_text("x")
        return {"sha256": {"a": known}, "more": 1}

    entry = store.produce(KEY, {}, make)

    assert entry.tree.files[0].digest.hex == known
    assert entry.meta == {"more": 1}


def test_a_program_stays_one(store: AnyStore) -> None:
    def make(folder: Path) -> dict[str, object]:
        for name, mode in (("program", 0o700), ("text", 0o600)):
            (folder / name).write_text("")
            (folder / name).chmod(mode)
        return {}

    tree = store.produce(KEY, {}, make).tree

    assert [tree.path(f.path).stat().st_mode & 0o777 for f in tree.files] == [0o755, 0o644]


def test_a_result_that_lost_its_end_is_made_again(store: AnyStore) -> None:
    entry = store.produce(KEY, {}, write("whole"))
    store.close()
    entry.tree.path("sub/file").write_text("w")

    assert store.find(KEY) is None
    assert store.produce(KEY, {}, write("whole")).tree.path("sub/file").read_text() == "whole"


def test_a_files_digest_is_read_again_when_the_file_changed(
    store: AnyStore, tmp_path: Path
) -> None:
    file, old = tmp_path / "file", time.time() - 60
    for text in ("one", "two"):
        file.write_text(text)
        os.utime(file, (old, old))

        found = store.digest_file(file)
        assert (found.path, found.size, found.digest) == ("file", 3, Digest.of(text.encode()))


def test_a_large_file_that_is_not_known_is_not_read_where_that_is_unwanted(
    store: AnyStore, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))

    unread, read = store.digest_file(file, read=False).digest, store.digest_file(file).digest

    assert unread != read == Digest.of(bytes(1 << 20))
    assert (type(unread), type(read)) == (UnreadDigest, Digest)


def test_a_text_is_made_once_for_its_key(store: AnyStore) -> None:
    made = iter(("one", "two", "three"))

    found = [store.memo(key, lambda: next(made)) for key in ("a", "b", "a")]

    assert found == ["one", "two", "one"]


def test_room_is_required_in_bytes(store: AnyStore) -> None:
    store.require_room(1, "nothing")
    with pytest.raises(EnvironmentFailure, match="the model needs"):
        store.require_room(1 << 62, "the model")


def test_clean_spares_what_is_held(store: AnyStore) -> None:
    keys = [key_of(number) for number in range(3)]
    for key in keys:
        store.produce(key, {}, write("x" * 100))
    store.close()
    assert store.find(keys[1])

    report = store.clean(0)

    assert report == {"deleted": 2, "in_use": 1, "bytes_before": 300, "bytes_after": 100}
    assert [store.find(key) is not None for key in keys] == [False, True, False]


def test_clean_keeps_to_its_budget(store: AnyStore) -> None:
    for number in range(3):
        store.produce(key_of(number), {}, write("x" * 100))
    store.close()

    assert store.clean(250)["bytes_after"] == 200
