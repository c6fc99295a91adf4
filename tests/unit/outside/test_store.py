"""The store gives whole results or none, whatever happens while they are made."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from weightsmith.core.errors import EnvironmentFailure, of_machine
from weightsmith.core.values import Digest, key_of
from weightsmith.outside import store as stores
from weightsmith.outside.store import FileStore

KEY = key_of("a result")


def write(text: str):
    def make(folder: Path) -> dict[str, str]:
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / "file").write_text(text)
        return {"text": text}

    return make


def test_what_is_held_is_looked_at_once(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    file = store.produce(KEY, {}, write("one")).tree.path("sub/file")
    found = store.find(KEY)
    file.write_text("longer")

    assert store.find(KEY) is found
    assert FileStore(tmp_path).find(KEY) is None
    store.close()
    assert store.find(KEY) is None


def test_all_of_a_result_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then its name: a machine that loses its power has the whole result, or none."""
    events: list[tuple[str, Path]] = []
    sync, rename = os.fsync, Path.rename

    def synced(handle: int) -> None:
        events.append(("sync", Path(f"/proc/self/fd/{handle}").readlink()))
        sync(handle)

    def renamed(path: Path, target: Path) -> Path:
        events.append(("rename", target))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    FileStore(tmp_path).produce(KEY, {}, write("one"))

    partial, final = tmp_path / "partial" / KEY.hex, tmp_path / "results" / KEY.hex
    at = events.index(("rename", final))
    before = {path for event, path in events[:at] if event == "sync"}
    assert {partial / "data", partial / "data/sub", partial / "data/sub/file", partial} <= before
    assert events[at + 1 :] == [("sync", final.parent)]


@pytest.mark.parametrize("can", [True, False])
def test_many_files_are_on_the_disk_at_once_or_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can: bool
) -> None:
    """A disk is waited for at each sync; the handle is older than what is written."""
    names, synced, whole = [f"{n:03}" for n in range(300)], set[str](), list[int]()
    store = FileStore(tmp_path)

    def make(folder: Path) -> dict[str, str]:
        for name in names:
            (folder / name).write_text(name)
        return {}

    def sync_whole(handle: int) -> bool:
        data = Path(f"/proc/self/fd/{handle}").readlink()
        assert sorted(path.name for path in data.iterdir()) == names
        whole.append(handle)
        return can

    def sync(handle: int) -> None:
        synced.add(Path(f"/proc/self/fd/{handle}").readlink().name)

    monkeypatch.setattr(stores, "sync_all", sync_whole)
    monkeypatch.setattr(os, "fsync", sync)
    files = store.produce(KEY, {}, make).tree.files

    assert [file.path for file in files] == names
    assert files[7].digest == Digest.of(b"007")
    assert len(whole) == 1
    assert ({*names, "data"} & synced) == (set() if can else {*names, "data"})


def test_what_the_system_could_not_write_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(folder: Path) -> dict[str, str]:
        for number in range(300):
            (folder / str(number)).touch()
        return {}

    def fails(handle: int) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(stores, "sync_all", fails)
    store = FileStore(tmp_path)
    with pytest.raises((OSError, EnvironmentFailure)):
        store.produce(KEY, {}, make)
    assert store.find(KEY) is None


def test_a_digest_is_remembered_of_a_file_that_nobody_changed_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same size, with its old time and in the same place, it may be another file."""
    store, file, old = FileStore(tmp_path / "store"), tmp_path / "file", time.time() - 60
    for byte in (b"a", b"b", b"c"):
        file.write_bytes(byte * (1 << 20))
        os.utime(file, (old, old))

        assert store.digest_file(file).digest == Digest.of(byte * (1 << 20))
        # Within a tick of the clock, a file may change and have the same times.
        remembered = (tmp_path / "store" / "digests").exists()
        assert remembered == (byte != b"a")
        monkeypatch.setattr(stores, "_SETTLED_NS", -1)


def hold_many(root: Path) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (96, 1024))
    store = FileStore(root)
    keys = [key_of(number) for number in range(110)]
    for key in keys:
        store.produce(key, {}, write("one"))
    raise SystemExit(sum(store.find(key) is None for key in keys))


def test_more_results_are_held_than_files_may_be_open_at_first(tmp_path: Path) -> None:
    """A fleet of 500 adapters holds thousands, and most systems begin with 1024."""
    context = multiprocessing.get_context("spawn")  # a fork would have this process's open files
    process = context.Process(target=hold_many, args=(tmp_path,))
    process.start()
    process.join()

    assert process.exitcode == 0


def test_a_file_in_the_place_of_the_store_is_no_bug(tmp_path: Path) -> None:
    """Its error is one of those that a fleet's node, too, tells as its machine's."""
    (tmp_path / "store").write_text("")

    with pytest.raises(OSError, match="Not a directory") as caught:
        FileStore(tmp_path / "store").produce(KEY, {}, write("one"))
    assert of_machine(caught.value)


def _slow_maker(root: Path, marker: Path) -> None:
    def make(folder: Path) -> dict[str, str]:
        (folder / "half").write_text("ha")
        marker.write_text("started")
        time.sleep(600)
        return {}

    FileStore(root).produce(KEY, {}, make)


def test_kill_9_frees_the_lock_and_leaves_nothing_visible(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_slow_maker, args=(tmp_path, tmp_path / "marker"))
    process.start()
    while not (tmp_path / "marker").exists():
        assert process.is_alive()
        time.sleep(0.01)
    assert FileStore(tmp_path).find(KEY) is None or pytest.fail("half-made result is visible")
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()

    assert FileStore(tmp_path).produce(KEY, {}, write("whole")).meta == {"text": "whole"}


def _maker(root: Path, results: "multiprocessing.Queue[bool]") -> None:
    def make(folder: Path) -> dict[str, str]:
        time.sleep(0.2)
        (folder / "f").write_text("x")
        return {}

    results.put(FileStore(root).produce(KEY, {}, make).cached)


@pytest.mark.slow
def test_two_builds_at_once_make_a_result_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_maker, args=(tmp_path, results)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert sorted(results.get() for _ in processes) == [False, True, True]


def test_who_waits_for_a_result_goes_on_while_its_maker_uses_it(tmp_path: Path) -> None:
    """A build holds what it made until it ends, which may be hours after the merge."""
    maker, other = FileStore(tmp_path), FileStore(tmp_path)
    made: list[bool] = []
    waiting = threading.Thread(
        target=lambda: made.append(other.produce(KEY, {}, write("again")).cached), daemon=True
    )

    def make(folder: Path) -> dict[str, str]:
        waiting.start()
        time.sleep(0.2)  # the other finds nothing, and waits
        return write("once")(folder)

    maker.produce(KEY, {}, make)
    waiting.join(timeout=120)

    assert made == [True]
    maker.close()


def test_read_only_store_serves_and_explains(tmp_path: Path, monkeypatch) -> None:
    FileStore(tmp_path).produce(KEY, {}, write("whole"))

    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    store = FileStore(tmp_path)
    monkeypatch.setattr(FileStore, "_open_lock", lambda self, name: refuse(self.root / name))

    assert store.find(KEY)
    with pytest.raises(EnvironmentFailure, match="cannot write to the store"):
        store.produce(key_of("another"), {}, write("x"))


@pytest.mark.parametrize("ended", [None, EnvironmentFailure("the job died"), ValueError("a bug")])
@pytest.mark.parametrize("resume", [True, False])
def test_a_store_that_is_deleted_under_a_build(tmp_path, resume, ended) -> None:
    def make(folder: Path) -> dict[str, str]:
        (folder / "file").touch()
        shutil.rmtree(tmp_path / "store")
        if ended:
            raise ended
        return {}

    with pytest.raises(type(ended) if ended else EnvironmentFailure) as caught:
        FileStore(tmp_path / "store").produce(KEY, {}, make, resume=resume)
    assert caught.value is ended or "disappeared" in caught.value.message
    assert FileStore(tmp_path / "store").produce(KEY, {}, write("x")).meta == {"text": "x"}


@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_what_a_killed_container_left_belongs_to_the_next_maker(tmp_path: Path) -> None:
    def killed(folder: Path) -> dict[str, str]:
        (folder / "half").write_text("ha")
        for path in (folder, folder / "half"):
            os.chown(path, 65532, 65532)
        raise KeyboardInterrupt

    def goes_on(folder: Path) -> dict[str, str]:
        assert [path.stat().st_uid for path in (folder, folder / "half")] == [0, 0]
        return {"text": (folder / "half").read_text()}

    store = FileStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.produce(KEY, {}, killed, resume=True)
    assert store.produce(KEY, {}, goes_on, resume=True).meta == {"text": "ha"}
