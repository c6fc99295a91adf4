"""Locks between processes: who has to wait is told so, and for what."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def locked(path: Path, what: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a file while the block runs; `what` is what its holder does meanwhile."""
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
