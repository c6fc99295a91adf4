"""Who waits for another process is told so."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import SimpleNamespace

from filelock import FileLock
from weightsmith import layouts
from weightsmith.drivers.locks import locked
from weightsmith.drivers.store import FileStore
from weightsmith.values import key_of

from tests.fakes.journal import RecordingProgress


def test_a_lock_that_is_free_says_nothing(tmp_path: Path) -> None:
    told: list[str] = []

    with locked(tmp_path / "lock", "works", told.append), locked(tmp_path / "b", "x", told.append):
        assert told == []


def test_a_lock_that_is_held_says_what_its_holder_does(tmp_path: Path) -> None:
    holder = FileLock(tmp_path / "lock")
    holder.acquire()
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        holder.release()

    with locked(tmp_path / "lock", "is compiling llamacpp's tools", tell):
        assert told == ["another process is compiling llamacpp's tools: waiting for it"]


def test_a_result_that_another_build_makes_is_waited_for_aloud(tmp_path: Path) -> None:
    key = key_of("a result")
    (tmp_path / "locks").mkdir()
    holder = os.open(tmp_path / "locks" / key.hex, os.O_RDWR | os.O_CREAT)
    fcntl.flock(holder, fcntl.LOCK_EX)
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        os.close(holder)

    FileStore(tmp_path, tell).produce(key, {"stage": "merge"}, lambda _: {})

    assert told == ["another process is making the same result of merge: waiting for it"]


def test_a_layout_that_another_build_writes_is_waited_for_aloud(tmp_path: Path) -> None:
    folder = tmp_path / "image"
    folder.mkdir()
    holder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(holder, fcntl.LOCK_EX)

    class Telling(RecordingProgress):
        def note(self, text: str) -> None:
            super().note(text)
            os.close(holder)

    progress = Telling()
    with layouts._alone(folder, SimpleNamespace(progress=progress)) as mine:
        assert mine == folder
    assert progress.lines == [
        ("note", f"the layout {folder} is in use by another process: waiting for it")
    ]
