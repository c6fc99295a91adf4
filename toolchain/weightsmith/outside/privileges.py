"""Drops this process's privileges, permanently."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

from weightsmith.outside.sandbox_launcher import NO_NEW_PRIVILEGES, check, libc

NOBODY = 65532
"""Outer user and group of programs started by root: nobody, as in distroless images."""
_IN_BOUNDING, _DROP_FROM_BOUNDING, _SET_DUMPABLE, _GET_NO_NEW_PRIVILEGES = 23, 24, 4, 39
_AMBIENT, _AMBIENT_IS_SET, _CLEAR_ALL = 47, 1, 4
"""Operations of prctl(2)."""
_HEADER_VERSION = 0x2008_0522
"""_LINUX_CAPABILITY_VERSION_3: two words of each set."""
_MOST_CAPABILITIES = 64
_MAP_OF_ALL = "4294967295"


def is_root() -> bool:
    """Say whether we are root outside too, or can switch to other users.

    Root in a user namespace without other users is its creator, and has no more privileges
    outside than that user.
    """
    if os.geteuid() != 0:
        return False
    try:
        rows = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    except FileNotFoundError:  # a kernel without user namespaces
        return True
    return any(
        (int(start), int(outside)) == (0, 0) or int(start) <= NOBODY < int(start) + int(count)
        for start, outside, count in rows
    )


def map_ids_of(process: int, user: int, group: int) -> bool:
    """Map a process in its own user namespace to these ids inside and to nobody outside."""
    try:
        Path(f"/proc/{process}/uid_map").write_text(f"{user} {NOBODY} 1")
        Path(f"/proc/{process}/gid_map").write_text(f"{group} {NOBODY} 1")
    except OSError:
        return False
    return True


def become_nobody() -> None:
    """Stop being root outside our user namespaces."""
    os.setgroups([])
    become(NOBODY, NOBODY)


def become(user: int, group: int) -> None:
    """Switch to a user and a group without capabilities, permanently."""
    _drop_bounding()
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)
    _drop_own()


def drop_capabilities() -> None:
    """Drop every capability; without CAP_SETPCAP the bounding set stays."""
    with suppress(PermissionError):
        _drop_bounding()
    _drop_own()


def _drop_bounding() -> None:
    for number in range(_MOST_CAPABILITIES):
        try:
            check(libc.prctl(_DROP_FROM_BOUNDING, number, 0, 0, 0), "prctl")
        except OSError as problem:
            if isinstance(problem, PermissionError):
                raise
            return  # the last one of this kernel


def _drop_own() -> None:
    check(libc.prctl(_AMBIENT, _CLEAR_ALL, 0, 0, 0), "prctl")
    header = (ctypes.c_uint32 * 2)(_HEADER_VERSION, 0)
    check(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def left() -> dict[str, bool]:
    """Say which capability sets are not empty, and whether privileges can be gained (`gain`).

    `gain` is False if no program started from here can have more privileges.
    """
    header, words = (ctypes.c_uint32 * 2)(_HEADER_VERSION, 0), (ctypes.c_uint32 * 6)()
    check(libc.capget(header, words), "capget")
    return {
        "own": any(words) or _any(_AMBIENT, _AMBIENT_IS_SET),
        "bounding": _any(_IN_BOUNDING),
        "gain": libc.prctl(_GET_NO_NEW_PRIVILEGES, 0, 0, 0, 0) != 1,
    }


def _any(*question: int) -> bool:
    rest = (0,) * (4 - len(question))
    return any(libc.prctl(*question, n, *rest) == 1 for n in range(_MOST_CAPABILITIES))


def forbid_privileges() -> None:
    """Set no_new_privs for all programs started from here, and make this process untraceable."""
    check(libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    check(libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0), "prctl")


def forbid_user_namespaces() -> None:
    """Forbid new user namespaces, in which a process would have all capabilities.

    Call it only in our own user namespace: the limit applies to that namespace.
    """
    with suppress(OSError):
        if _MAP_OF_ALL not in Path("/proc/self/uid_map").read_text():
            Path("/proc/sys/user/max_user_namespaces").write_text("0")
