"""Gives the rights of this process away, for good."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

from weightsmith.drivers.trampoline import NO_NEW_PRIVILEGES, check, libc

NOBODY = 65532
"""User and group outside of what root starts: nobody's, as in distroless images."""
_IN_BOUNDING, _DROP_FROM_BOUNDING, _SET_DUMPABLE, _GET_NO_NEW_PRIVILEGES = 23, 24, 4, 39
_AMBIENT, _AMBIENT_IS_SET, _CLEAR_ALL = 47, 1, 4
"""Operations of prctl(2)."""
_HEADER_VERSION = 0x2008_0522
"""_LINUX_CAPABILITY_VERSION_3: two words of each set."""
_MOST_CAPABILITIES = 64
_MAP_OF_ALL = "4294967295"


def is_root() -> bool:
    """Say whether we are root outside too, or have other users to become.

    Root of a user namespace with no other user in it is the user who made it, and has no more
    rights outside than that one.
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
    """Let a process in a user namespace of its own be these inside, and nobody outside."""
    try:
        Path(f"/proc/{process}/uid_map").write_text(f"{user} {NOBODY} 1")
        Path(f"/proc/{process}/gid_map").write_text(f"{group} {NOBODY} 1")
    except OSError:
        return False
    return True


def become_nobody() -> None:
    """Give up root outside of any user namespace of ours."""
    os.setgroups([])
    become(NOBODY, NOBODY)


def become(user: int, group: int) -> None:
    """Become a user and a group without a capability, now or later."""
    _drop_bounding()
    os.setresgid(group, group, group)
    os.setresuid(user, user, user)
    _drop_own()


def drop_capabilities() -> None:
    """Give up every capability; without CAP_SETPCAP the bounding set stays as it is."""
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
            return  # the kernel knows no more of them


def _drop_own() -> None:
    check(libc.prctl(_AMBIENT, _CLEAR_ALL, 0, 0, 0), "prctl")
    header = (ctypes.c_uint32 * 2)(_HEADER_VERSION, 0)
    check(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def left() -> dict[str, bool]:
    """Say, as the kernel tells it, which sets of capabilities hold any; and whether one can gain.

    `gain` is False where no program that is started from here on can have more rights.
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
    """Let no program that is started from here on gain rights, and none look into this process."""
    check(libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    check(libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0), "prctl")


def forbid_user_namespaces() -> None:
    """Let no process of this user namespace make another, in which it would have all rights.

    Only to be called in a user namespace of our own: the limit is that namespace's.
    """
    with suppress(OSError):
        if _MAP_OF_ALL not in Path("/proc/self/uid_map").read_text():
            Path("/proc/sys/user/max_user_namespaces").write_text("0")
