"""Locks between processes, with a message to those that wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from weightsmith.core.waiting import PAUSE, check_stopped, holder


@contextmanager
def locked(path: Path, what: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold a file's lock while the block runs; `what` says what its holder is doing."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tell(f"{holder(path)} {what}: waiting for it ({path})")
        while not lock.is_locked:
            check_stopped()
            with suppress(Timeout):
                lock.acquire(timeout=PAUSE)
    try:
        yield
    finally:
        lock.release()
