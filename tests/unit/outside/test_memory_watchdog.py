"""A program is watched with all that it starts."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from weightsmith.outside import memory_watchdog, process

FILL = "import time; held = b'x' * {size}; print('filled', flush=True); time.sleep(600 * {sleep})"
IN_CHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"


SHARED = """
import mmap, os, sys, time
held = mmap.mmap(-1, {size})
for place in range(0, {size}, 1 << 20):
    held[place:place + (1 << 20)] = b"x" * (1 << 20)
print("filled", flush=True); time.sleep(600 * {sleep})
"""


def run(code: str, **limits: Any) -> tuple[int, tuple[str, ...]]:
    """Run a program that may hold 200 MiB; return how it ended, and what it said."""
    most = process.ResourceLimits(**{"resident_bytes": 200 << 20, **limits})
    done = process.run([sys.executable, "-c", code], limits=most)
    return done.returncode, done.tail


@pytest.mark.slow
def test_a_program_that_holds_too_much_is_killed_and_one_that_holds_less_is_not() -> None:
    """Memory that processes may share counts too, and what they start."""
    code = FILL.format(size=400 << 20, sleep=1)
    for large in (code, IN_CHILD.format(code=code), SHARED.format(size=400 << 20, sleep=1)):
        assert run(large)[0] == -9
    for small in (FILL, SHARED):
        assert run(small.format(size=50 << 20, sleep=0)) == (0, ("filled",))


def test_where_a_programs_files_lie_in_memory_what_it_maps_of_them_does_not_count() -> None:
    code = SHARED.format(size=400 << 20, sleep=0)

    assert run(code, shared=False) == (0, ("filled",))
    assert memory_watchdog.lies_in_memory(Path("/dev/shm"))
    assert not memory_watchdog.lies_in_memory(Path("/proc"))


@pytest.mark.slow
def test_pages_that_forked_children_share_count_once() -> None:
    code = (
        "import os, time; held = b'x' * (150 << 20)\n"
        "for _ in range(2):\n"
        "    if not os.fork():\n"
        "        time.sleep(1.5); os._exit(0)\n"
        "os.wait(); os.wait(); print('done')"
    )

    assert run(code, resident_bytes=250 << 20) == (0, ("done",))


def test_the_kernel_holds_a_program_to_its_limit_between_two_looks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory_watchdog, "_SECONDS", 60)
    for fill in (SHARED, FILL):
        with process.start(["/bin/sleep", "60"]) as probe:
            group = memory_watchdog._group(probe.process.pid, 200 << 20)
        if group is None:
            pytest.skip("no control group may be made here")
        memory_watchdog._remove(group)
        assert not group.exists()
        assert run(fill.format(size=400 << 20, sleep=0), grouped=True) == (-9, ())
    assert not list(group.parent.glob(f"weightsmith-{os.getpid()}-*"))


def test_a_group_goes_once_what_was_killed_in_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group, rmdir, busy = tmp_path / "group", Path.rmdir, [OSError(errno.EBUSY, "busy")] * 2
    group.mkdir()

    def remove(path: Path) -> None:
        if busy:
            raise busy.pop()
        rmdir(path)

    monkeypatch.setattr(Path, "rmdir", remove)
    memory_watchdog._remove(group)
    assert not group.exists()


def test_what_the_kernel_ended_is_said_to_have_held_too_much() -> None:
    limits = process.ResourceLimits(resident_bytes=200 << 20, grouped=True)
    code = FILL.format(size=400 << 20, sleep=1)

    with process.start([sys.executable, "-c", code], limits=limits) as server:
        server.process.wait(timeout=240)

    assert "held more than its 200 MiB" in server.logs(5)


CHAIN = """
if [ $1 -gt 0 ]; then /bin/sh "$0" $(($1 - 1)) "$2"; else "$2" -I -S -c \\
    'import time; held = b"x" * (300 << 20); print("filled", flush=True); time.sleep(60)'; fi
exit
"""


@pytest.mark.slow
def test_the_last_of_a_long_chain_of_processes_counts_and_ends_too(tmp_path: Path) -> None:
    (tmp_path / "chain").write_text(CHAIN)
    limits = process.ResourceLimits(resident_bytes=200 << 20)

    words = ["/bin/sh", tmp_path / "chain", "1100", sys.executable]
    done = process.run(words, limits=limits, timeout=50)

    assert (done.returncode, done.tail) == (-9, ("filled",))
