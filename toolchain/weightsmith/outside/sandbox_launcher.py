"""Executes a program after setting up its process: limits, namespaces, user.

Run as a file by `process.py`: `python -I -S sandbox_launcher.py SETTINGS PROGRAM [ARG…]` with
SETTINGS a JSON object. It is a process of its own so that no Python code has to run in a fork of
the threaded control plane, and so that the death signal is set last: the kernel clears it when a
process changes its user or gets new capabilities.

The program runs in a child. The launcher waits as its guard, and ends as the program does: once the
program or the control plane has ended, it ends all that the program started, whatever session that
is in. Until then it holds the control plane's locks, so that nobody else takes over a folder that
is still written to.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

NEW_USER, NEW_NETWORK = 0x1000_0000, 0x4000_0000
SET_DEATH_SIGNAL, NO_NEW_PRIVILEGES, _ADOPT_ORPHANS = 1, 38, 36
END = signal.SIGHUP
"""Tells the launcher to end the program, with all that it started."""
STOP = signal.SIGUSR1
"""Tells the launcher to send the program SIGTERM, and nothing that the program started."""
_PATIENCE = 10.0
"""Seconds for killed processes to go."""
FAILED = 125
"""Exit code for a failure before the program started, as in other tools of this kind."""
_BLOCKED = {signal.SIGCHLD, END, STOP, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}
"""What the guard waits for, and what the program's group gets: the program decides."""

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise OSError if a C library call failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Leave the parent's namespaces of these kinds."""
    check(libc.unshare(flags), "unshare")


def map_ids(user: int, group: int) -> None:
    """Map the caller's user and group to these numbers in the new user namespace."""
    outside_user, outside_group = os.getuid(), os.getgid()
    unshare(NEW_USER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {outside_user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {outside_group} 1")


def die_with_parent(parent: int) -> None:
    """Ask to be killed when the thread that started us ends; exit now if it has ended already."""
    check(libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "prctl")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def sibling(name: str) -> ModuleType:
    """Import a file from this folder, which isolated Python does not search."""
    path = Path(__file__).with_name(f"{name}.py")
    module = sys.modules[name] = ModuleType(name)
    importlib.machinery.SourceFileLoader(name, str(path)).exec_module(module)
    return module


def guard(parent: int, locks: Sequence[int], others: Sequence[int]) -> None:
    """Continue in a child; stay as its guard, with the locks, and end as it does.

    `others` are the open files that only the child keeps. The child is killed when the guard ends.
    """
    check(libc.prctl(_ADOPT_ORPHANS, 1, 0, 0, 0), "prctl")
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored ones would not be told
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    check(libc.prctl(SET_DEATH_SIGNAL, END, 0, 0, 0), "prctl")
    if os.getppid() != parent:
        os._exit(FAILED)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        for lock in locks:
            os.close(lock)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        check(libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "prctl")
        # The guard's number is not visible in a namespace of processes; the pipe's end tells.
        if select.select([reading], [], [], 0)[0]:
            os._exit(FAILED)
        return
    for other in (reading, *others):
        os.close(other)
    end_as(watch(child))


def watch(child: int) -> int:
    """Wait for the child's end, or for an order to end it; return its status when all is gone."""
    status = None
    while status is None:
        got = signal.sigwait({signal.SIGCHLD, END, STOP})
        ended = reap()
        if got == STOP and child not in ended:
            os.kill(child, signal.SIGTERM)
        if got == END and child not in ended:
            os.kill(child, signal.SIGKILL)
            ended[child] = os.waitpid(child, 0)[1]
        status = ended.get(child)
    until = time.monotonic() + _PATIENCE
    while (left := descendants(os.getpid())) and time.monotonic() < until:
        for each in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(each, signal.SIGKILL)
        reap()
        time.sleep(0.002)
    return status


def reap() -> dict[int, int]:
    """Return number and status of each child that has ended."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while (one := os.waitpid(-1, os.WNOHANG))[0]:
            ended[one[0]] = one[1]
    return ended


def descendants(process: int) -> list[int]:
    """Return all that a process has started and that is still there, as /proc shows it."""
    found = [process]
    for each in found:  # not recursive: they may be a chain of any length
        for task in Path(f"/proc/{each}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, task.read_text().split())
    return found[1:]


def end_as(status: int) -> NoReturn:
    """End as another process did: with its exit code, or by its signal."""
    if os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        number = os.WTERMSIG(status)
        with contextlib.suppress(OSError):  # SIGKILL's cannot be set
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def limit(memory_bytes: int) -> None:
    """Apply resource limits; 0 for none of memory."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes:
        # Limits what the process writes to, not the weight files that it maps.
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes,) * 2)


def prepare(
    *,
    parent: int,
    locks: Sequence[int],
    inherited: Sequence[int],
    memory_bytes: int,
    sandbox: Mapping[str, object] | None,
) -> None:
    """Apply all settings, the death signal last; for jobs enter their sandbox."""
    if not sandbox:
        guard(parent, locks, inherited)
        limit(memory_bytes)
        return
    jobs, landlock, seccomp = sibling("job_sandbox"), sibling("landlock"), sibling("seccomp")
    wanted = jobs.JobSandbox(**sandbox)
    with contextlib.suppress(OSError):  # as on machines whose system calls are not known
        seccomp.leave_keys()
    jobs.enter(wanted)
    guard(parent, locks, inherited)
    jobs.furnish(wanted)
    limit(memory_bytes)
    jobs.restrict(wanted, landlock, seccomp)
    # The kernel cleared it with the capabilities.
    check(libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "prctl")


def attempt(what: str, action: Callable[[], object]) -> None:
    """Run `action`; if it fails, print one line and exit."""
    try:
        action()
    except OSError as problem:
        os.write(2, f"cannot {what}: {problem}\n".encode())
        os._exit(FAILED)


if __name__ == "__main__":
    program = sys.argv[2:]
    attempt(f"prepare for {program[0]}", lambda: prepare(**json.loads(sys.argv[1])))
    attempt(f"start {program[0]}", lambda: os.execvp(program[0], program))  # noqa: S606
