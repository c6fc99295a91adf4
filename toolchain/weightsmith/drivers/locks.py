"""Locks between processes, with a message to those that wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def locked(path: Path, what: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold a file's lock while the block runs; `what` says what its holder is doing."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tell(f"another process {what}: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
