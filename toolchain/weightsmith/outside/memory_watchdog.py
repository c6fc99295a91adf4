"""Ends a program that holds more memory than it may, with all that it started.

`RLIMIT_DATA` alone cannot do it: it also counts private mappings of files, and safetensors maps
whole checkpoints that way; and it does not count memory that processes share.

For a job on 1.07 billion weights that holds 0.5 GB it counted 6.9 GB. Pages that are shared since a
fork count once; files in memory count too, and `memfd_create` is refused, since such a file belongs
to no process. Between two looks a program can fill a gigabyte, so where a control group may be made
(by root, or where one was delegated) the kernel holds an image's program to its limit too. Not a
job: a group counts pages of files, and a merge reads weights of many times its limit again.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from weightsmith.outside.sandbox_launcher import descendants

_PROC = Path("/proc")
_GROUPS = Path("/sys/fs/cgroup")
_IN_MEMORY = re.compile(r"^\d+ \d+ (\S+) \S+ (\S+) .* - tmpfs ", re.MULTILINE)
_SECONDS = 0.25
"""Between two looks: memory is filled at a few gigabytes per second."""


@contextlib.contextmanager
def memory_limit(
    pid: int, most: int, end: Callable[[], None], *, shared: bool = True, grouped: bool = False
) -> Iterator[Callable[[], None]]:
    """While the block runs, call `end` once if what a launcher started holds more than `most`.

    Yields what looks at once. In bytes; 0 for no limit. Pages of files do not count; memory that
    the processes share does, and what lies in file systems in memory that only they see, unless not
    `shared`. `grouped`: the kernel limits them too, pages of files included, where it lets us make
    a control group.
    """
    if not most:
        yield lambda: None
        return
    over, lock = threading.Event(), threading.Lock()
    group = _group(pid, most) if grouped else None

    def was_enforced() -> bool:
        counts = [group / name for name in ("memory.events", "memory.oom_control")] if group else ()
        told = "".join(path.read_text() for path in counts if path.exists())
        return re.search(r"^oom_kill [1-9]", told, re.MULTILINE) is not None

    def look() -> None:
        with lock:
            if over.is_set():
                return
            # Counting pages once takes longer, so only if it may matter.
            held = all(_held(pid, once=once, shared=shared) > most for once in (False, True))
            if held or was_enforced():
                over.set()
                end()

    def watch() -> None:
        while not over.wait(_SECONDS):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield look
    finally:
        look()
        over.set()
        watcher.join()
        if group:
            _remove(group)


def _group(pid: int, most: int) -> Path | None:
    """Put a process into a control group with a limit of `most` bytes; None if not allowed.

    Source: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of Linux.
    """
    lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    ours = {names: path for _, names, path in (line.split(":", 2) for line in lines)}
    for kind, place, limit, swap in (
        ("", _GROUPS, "memory.max", "memory.swap.max"),
        ("memory", _GROUPS / "memory", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes"),
    ):
        group = place / ours.get(kind, "").lstrip("/") / f"weightsmith-{os.getpid()}-{pid}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            _set(group / limit, most)
            with contextlib.suppress(FileNotFoundError):  # without swap
                _set(group / swap, most if kind else 0)
            _set(group / "cgroup.procs", pid)
        except OSError:  # without the controller, or not delegated
            _remove(group)
        else:
            return group
    return None


def _set(path: Path, value: int) -> None:
    with path.open("r+") as file:  # never makes a file where there is no control group
        file.write(str(value))


def _remove(group: Path) -> None:
    """Remove a group, whose processes are the caller's again if some are left."""
    for _ in range(20):  # what was just killed may be in it for a moment
        with contextlib.suppress(OSError):
            for left in (group / "cgroup.procs").read_text().split():
                (group.parent / "cgroup.procs").write_text(left)
        try:
            return group.rmdir()
        except FileNotFoundError:
            return None
        except OSError:
            time.sleep(0.05)
    return None


def lies_in_memory(*places: Path) -> bool:
    """Say whether one of the places is in a file system in memory."""
    ours = _file_systems_in_memory(os.getpid())
    numbers = [place.stat().st_dev for place in places if place.exists()]
    return any(f"{os.major(number)}:{os.minor(number)}" in ours for number in numbers)


def _held(pid: int, *, once: bool, shared: bool) -> int:
    """Return the bytes that a launcher's descendants hold.

    `once` counts pages that several have once, where the kernel says it.
    """
    family = descendants(pid)  # without the launcher, our own
    held = sum(_bytes(each, "Anon", once=once) for each in family)
    if not shared:
        return held
    mapped = sum(_bytes(each, "Shmem", once=once) for each in family)
    # File systems in memory that these processes see and we do not.
    others = {_mounts_of(each): each for each in family}
    others.pop(_mounts_of(os.getpid()), None)
    ours = _file_systems_in_memory(os.getpid()) if others else {}
    places = {
        device: f"/proc/{each}/root{place}"
        for each in others.values()
        for device, place in _file_systems_in_memory(each).items()
        if device not in ours
    }
    in_files = 0
    for place in places.values():
        with contextlib.suppress(OSError):
            found = os.statvfs(place)
            in_files += (found.f_blocks - found.f_bfree) * found.f_frsize
    # A file in memory may be mapped too: it must not count twice.
    return held + max(mapped, in_files)


def _bytes(pid: int, kind: str, *, once: bool) -> int:
    """Return a process's `Anon` or `Shmem`, in bytes; 0 if it is not there."""
    # The second takes longer to read: the kernel walks all pages.
    rows = [("status", f"Rss{kind}"), ("smaps_rollup", f"Pss_{kind}")][: 1 + once]
    for name, row in reversed(rows):
        with contextlib.suppress(OSError):
            text = (_PROC / str(pid) / name).read_text("utf-8", "replace")
            if found := re.search(rf"^{row}:\s+(\d+) kB", text, re.MULTILINE):
                return int(found[1]) * 1024
    return 0


def _mounts_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/mnt")  # noqa: PTH115 - a magic link
    return ""


def _file_systems_in_memory(pid: int) -> dict[str, str]:
    """Return device and mount point of each that a process sees."""
    with contextlib.suppress(OSError):
        return dict(_IN_MEMORY.findall((_PROC / str(pid) / "mountinfo").read_text("utf-8")))
    return {}
