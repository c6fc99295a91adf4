"""Who waits for another process is told so."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from weightsmith.core.values import key_of
from weightsmith.core.waiting import stopped_by
from weightsmith.outside.environment import locked
from weightsmith.outside.store import FileStore
from weightsmith.steps import outputs

from tests.fakes.journal import RecordingProgress


def test_a_lock_that_is_free_says_nothing_and_one_that_is_held_what_its_holder_does(
    tmp_path: Path,
) -> None:
    lock, told = tmp_path / "lock", list[str]()
    with locked(lock, "works", told.append), locked(tmp_path / "b", "x", told.append):
        assert told == []
    holder = os.open(lock, os.O_RDWR)
    fcntl.flock(holder, fcntl.LOCK_EX)

    def tell(text: str) -> None:
        told.append(text)
        os.close(holder)

    with locked(lock, "is compiling llamacpp's tools", tell):
        assert told == [f"another process is compiling llamacpp's tools: waiting for it ({lock})"]


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

    assert told == [
        f"another process is making the same result of merge: waiting for it (in {tmp_path})"
    ]


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
    with outputs._locked_folder(folder, SimpleNamespace(progress=progress)) as mine:
        assert mine == folder
    assert progress.lines == [
        ("note", f"the layout {folder} is in use by another process: waiting for it")
    ]


HOLD = (
    "import fcntl, os, sys; handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT);"
    "fcntl.flock(handle, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
)


@contextmanager
def held_by_another(path: Path) -> Iterator[int]:
    """Hold a file's lock in another process; give its number."""
    argv = (sys.executable, "-c", HOLD, str(path))
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.kill()


def waiters(folder: Path) -> dict[str, Callable[[Callable[[str], None]], object]]:
    """What waits for the lock of the file `lock` in a folder, with what is told then."""
    key = key_of("a result")
    (folder / "locks").mkdir()
    (folder / "locks" / key.hex).hardlink_to(folder / "lock")

    def builder(tell: Callable[[str], None]) -> None:
        with locked(folder / "lock", "is making a builder", tell):
            pass

    return {
        "builder": builder,
        "result": lambda tell: FileStore(folder, tell).produce(key, {}, lambda _: {}),
    }


@pytest.mark.parametrize("who", ["builder", "result"])
def test_who_is_waited_for_is_named_and_the_wait_of_a_thread_can_be_ended(
    tmp_path: Path, who: str
) -> None:
    """Ctrl-C ends the main thread's; work ahead of its turn has to be told."""
    stop, told, ended = os.eventfd(0), list[str](), list[str]()
    (tmp_path / "lock").touch()
    wait = waiters(tmp_path)[who]

    def tell(text: str) -> None:
        told.append(text)
        os.eventfd_write(stop, 1)

    def work() -> None:
        with stopped_by(stop):
            try:
                wait(tell)
            except KeyboardInterrupt:
                ended.append("by Ctrl-C")

    with held_by_another(tmp_path / "lock") as number:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(60)

    assert ended == ["by Ctrl-C"]
    assert len(told) == 1
    # Some file systems do not say whose a lock is.
    assert f"process ({number}) is making" in told[0] or "another process is making" in told[0]
    assert str(tmp_path) in told[0]
