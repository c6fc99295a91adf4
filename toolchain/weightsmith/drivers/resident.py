"""Ends a program that holds more memory than it may, with all that it started.

`RLIMIT_DATA` alone cannot do it: it also counts private mappings of files, and safetensors maps
whole checkpoints that way.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

_PROC = Path("/proc")
_ANONYMOUS = re.compile(r"RssAnon:\s+(\d+) kB")
_SHARED_ONCE = re.compile(r"Pss_Anon:\s+(\d+) kB")
"""Takes longer to read: the kernel walks all pages."""
_SECONDS = 0.25
"""Between two looks: memory is filled at a few gigabytes per second."""


@contextlib.contextmanager
def watched(pid: int, most: int, end: Callable[[], None]) -> Iterator[None]:
    """While the block runs, call `end` once if a process and its children hold more than `most`.

    In bytes of anonymous memory, pages of files not counted; 0 for no limit.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_SECONDS):
            if _held(pid, _anonymous) > most and _held(pid, _own_share) > most:
                end()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    if most:
        watcher.start()
    try:
        yield
    finally:
        over.set()
        if most:
            watcher.join()


def _family(pid: int) -> Iterator[int]:
    """Yield a process and all its descendants, as far as they can be seen."""
    yield pid
    for task in _PROC.glob(f"{pid}/task/*/children"):
        with contextlib.suppress(OSError):
            for child in task.read_text("ascii").split():
                yield from _family(int(child))


def _held(pid: int, count: Callable[[int], int]) -> int:
    return sum(map(count, _family(pid)))


def _anonymous(pid: int) -> int:
    """Return a process's bytes of anonymous memory, with all pages it shares since a fork."""
    return _number(_PROC / str(pid) / "status", _ANONYMOUS) or 0


def _own_share(pid: int) -> int:
    """Return the same with its share of such pages, where the kernel says it."""
    found = _number(_PROC / str(pid) / "smaps_rollup", _SHARED_ONCE)
    return _anonymous(pid) if found is None else found


def _number(path: Path, pattern: re.Pattern[str]) -> int | None:
    """Return the bytes that a pattern finds in a file; None if it or the process is not there."""
    try:
        found = pattern.search(path.read_text("utf-8", "replace"))
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
