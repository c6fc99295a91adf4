"""A clock that is put back by a year, between two commands or within one: nothing is lost."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from weightsmith.core import files
from weightsmith.core.files import sweep, write_whole
from weightsmith.core.values import key_of
from weightsmith.oci.layout import held_digest
from weightsmith.outside.store import FileStore
from weightsmith.outside.worker_protocol import open_log

from tests.fakes.memory import Memory, in_memory

YEAR = 365 * 24 * 3600


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    """All that a build reaches in memory, but for the store, which is the real one."""
    with in_memory(tmp_path) as made:
        made.store = FileStore(tmp_path / "results")  # type: ignore[assignment]
        yield made


def put_back(*folders: Path) -> None:
    """Put the clock back, as files see it: what was written is from next year now."""
    for folder in folders:
        for path in [folder, *folder.rglob("*")]:
            status = path.lstat()
            times = (status.st_atime + YEAR, status.st_mtime + YEAR)
            os.utime(path, times, follow_symlinks=False)


def test_between_two_builds(memory: Memory) -> None:
    """All that was made is found again, and the image is the same."""
    before = memory.build(push=True)["llamacpp-q4_k_m"].published
    memory.store.close()  # type: ignore[attr-defined]
    put_back(memory.folder)
    memory.store = FileStore(memory.folder / "results")  # type: ignore[assignment]
    after = memory.build(push=True)["llamacpp-q4_k_m"].published
    assert after.digest == before.digest
    assert after.uploaded_bytes == 0
    assert memory.jobs() == []


def test_in_the_middle_of_a_build(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock goes back while the merge's job runs: tokens, locks and memos do not mind."""
    memory.registry.auth = "bearer"
    real, real_ns = time.time, time.time_ns
    begin = memory.runner.stages["merge"]

    def merge(*words: object) -> object:
        monkeypatch.setattr(time, "time", lambda: real() - YEAR)
        monkeypatch.setattr(time, "time_ns", lambda: real_ns() - YEAR * 10**9)
        return begin(*words)  # type: ignore[arg-type]

    memory.runner.stages = {**memory.runner.stages, "merge": merge}  # type: ignore[assignment]
    layout = memory.folder / "image"
    built = memory.build(layout=layout)["llamacpp-q4_k_m"].published
    assert held_digest(layout) == built.digest
    assert memory.build(layout=layout)["llamacpp-q4_k_m"].published.digest == built.digest
    assert memory.jobs() == []


def test_cleaning_keeps_what_was_used_since(tmp_path: Path) -> None:
    """Results from before the jump look newest and are the oldest."""

    def make(folder: Path) -> dict[str, int]:
        return {"n": (folder / "file").write_bytes(bytes(1000))}

    store = FileStore(tmp_path)
    for name in ("one", "two", "three"):
        store.produce(key_of(name), {}, make)
    store.close()
    put_back(tmp_path)
    store = FileStore(tmp_path)
    assert store.find(key_of("two"))
    store.close()
    assert store.clean(1000)["deleted"] == 2
    assert store.find(key_of("two"))


def test_the_log_that_is_written_to_is_not_deleted(tmp_path: Path) -> None:
    """Forty logs are from before the jump; another job has just begun its own."""
    for _ in range(45):
        with open_log(tmp_path, "old"):
            pass
    put_back(tmp_path)
    with open_log(tmp_path, "mine") as mine:
        for _ in range(3):
            with open_log(tmp_path, "next"):
                pass
        assert Path(mine.name).exists()


def test_what_a_killed_writer_left_goes_however_new_it_looks(tmp_path: Path) -> None:
    """Whether a writer lives is asked of its lock, and not of the age of its files."""
    (tmp_path / f".weightsmith-{files._kernel()}89abcdef").write_bytes(b"half")
    put_back(tmp_path)
    sweep(tmp_path)
    write_whole(tmp_path / "file", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
