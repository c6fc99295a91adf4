"""Becomes another program after putting this process in order: limits, namespaces, user.

Run as a file by `process.py`: `python -I -S trampoline.py SETTINGS PROGRAM [ARG…]` with SETTINGS a
JSON object. It stands between so that no Python code has to run in a forked copy of the (threaded)
control plane, and so that the death signal is set last: the kernel forgets it whenever a process
changes its user or gets new capabilities.
"""

from __future__ import annotations

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
"""Exit code for a failure before the program started, as other tools of this kind use it."""

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> None:
    """Raise OSError for a failed call of the C library."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Leave the parent's namespaces of these kinds."""
    check(libc.unshare(flags), "unshare")


def map_ids(user: int, group: int) -> None:
    """Call the caller's own user and group by these numbers inside the new user namespace."""
    outside_user, outside_group = os.getuid(), os.getgid()
    unshare(NEW_USER)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {outside_user} 1"),
        ("gid_map", f"{group} {outside_group} 1"),
    ):
        Path("/proc/self", name).write_text(text)


def die_with_parent(parent: int) -> None:
    """Be killed when the thread that started us ends, and at once if it has ended already."""
    check(libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "prctl")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def sibling(name: str) -> ModuleType:
    """Import a file beside this one: isolated Python looks for none there."""
    path = Path(__file__).with_name(f"{name}.py")
    module = sys.modules[name] = ModuleType(name)
    importlib.machinery.SourceFileLoader(name, str(path)).exec_module(module)
    return module


def imprison(settings: dict[str, Any]) -> None:
    """Apply the settings of a job; see `jail.py`."""
    jail, landlock, filters = sibling("jail"), sibling("landlock"), sibling("filters")
    wanted = jail.Jail(**settings["jail"])
    parent_gone = jail.enter(wanted, settings["parent"])
    limit(settings)
    jail.restrict(wanted, landlock, filters)
    if parent_gone is None:
        die_with_parent(settings["parent"])
    else:
        check(libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "prctl")
        if parent_gone():
            os._exit(FAILED)


def limit(settings: dict[str, Any]) -> None:
    """Bound what the program may use."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if settings.get("memory_bytes"):
        # Counts what the process writes to, not the weight files that it maps.
        resource.setrlimit(resource.RLIMIT_DATA, (settings["memory_bytes"],) * 2)


def prepare(settings: dict[str, Any]) -> None:
    """Apply all settings, the death signal last."""
    if settings.get("jail"):
        imprison(settings)
        return
    limit(settings)
    die_with_parent(settings["parent"])


def attempt(what: str, action: Callable[[], object]) -> None:
    """Do it, or say in one line what could not be done and end."""
    try:
        action()
    except OSError as problem:
        os.write(2, f"cannot {what}: {problem}\n".encode())
        os._exit(FAILED)


if __name__ == "__main__":
    program = sys.argv[2:]
    attempt(f"prepare for {program[0]}", lambda: prepare(json.loads(sys.argv[1])))
    attempt(f"start {program[0]}", lambda: os.execvp(program[0], program))  # noqa: S606
