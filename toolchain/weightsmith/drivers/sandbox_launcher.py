"""Executes a program after setting up this process: limits, namespaces, user.

Run as a file by `process.py`: `python -I -S sandbox_launcher.py SETTINGS PROGRAM [ARG…]` with
SETTINGS a JSON object. It is a process of its own so that no Python code has to run in a fork of
the threaded control plane, and so that the death signal is set last: the kernel clears it when a
process changes its user or gets new capabilities.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

NEW_USER, NEW_NETWORK = 0x1000_0000, 0x4000_0000
SET_DEATH_SIGNAL, NO_NEW_PRIVILEGES = 1, 38
FAILED = 125
"""Exit code for a failure before the program started, as in other tools of this kind."""

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
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {outside_user} 1"),
        ("gid_map", f"{group} {outside_group} 1"),
    ):
        Path("/proc/self", name).write_text(text)


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


def enter_sandbox(settings: dict[str, Any]) -> None:
    """Enter a job's sandbox; see `job_sandbox.py`."""
    sandbox, landlock, seccomp = sibling("job_sandbox"), sibling("landlock"), sibling("seccomp")
    wanted = sandbox.JobSandbox(**settings["sandbox"])
    with contextlib.suppress(OSError):  # as on machines whose system calls are not known
        seccomp.leave_keys()
    parent_gone = sandbox.enter(wanted, settings["parent"])
    limit(settings)
    sandbox.restrict(wanted, landlock, seccomp)
    if parent_gone is None:
        die_with_parent(settings["parent"])
    else:
        check(libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "prctl")
        if parent_gone():
            os._exit(FAILED)


def limit(settings: dict[str, Any]) -> None:
    """Apply resource limits."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if settings.get("memory_bytes"):
        # Limits what the process writes to, not the weight files that it maps.
        resource.setrlimit(resource.RLIMIT_DATA, (settings["memory_bytes"],) * 2)


def prepare(settings: dict[str, Any]) -> None:
    """Apply all settings, the death signal last."""
    if settings.get("sandbox"):
        enter_sandbox(settings)
        return
    limit(settings)
    die_with_parent(settings["parent"])


def attempt(what: str, action: Callable[[], object]) -> None:
    """Run `action`; if it fails, print one line and exit."""
    try:
        action()
    except OSError as problem:
        os.write(2, f"cannot {what}: {problem}\n".encode())
        os._exit(FAILED)


if __name__ == "__main__":
    program = sys.argv[2:]
    attempt(f"prepare for {program[0]}", lambda: prepare(json.loads(sys.argv[1])))
    attempt(f"start {program[0]}", lambda: os.execvp(program[0], program))  # noqa: S606
