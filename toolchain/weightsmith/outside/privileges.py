"""Privileges of this process: drops them for good, and finds out what it can do in its sandbox.

Reports once claimed isolation for images that could write to the machine. So what is reported is
what was read and tried from inside, just before the program runs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import socket
from contextlib import suppress
from pathlib import Path

from weightsmith.outside import seccomp
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


Facts = dict[str, str | int | bool]
_NOBODYS = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
"""Documentation addresses (RFC 5737, RFC 3849): nothing is sent, only a route is looked up."""


def facts(host_network: int, home: str) -> Facts:
    """Return the facts for this process; what cannot be checked counts as not restricted.

    `host_network` is the inode of the machine's network namespace, `home` the home folder of the
    user that the program runs as; empty if no file of this machine is visible.
    """
    header, sets = (ctypes.c_uint32 * 2)(_HEADER_VERSION, 0), (ctypes.c_uint32 * 6)()
    check(libc.capget(header, sets), "capget")
    held = any(sets) or _any(_AMBIENT, _AMBIENT_IS_SET)
    users, groups = ("/".join(map(str, sorted(set(n)))) for n in (os.getresuid(), os.getresgid()))
    return {
        "user": f"{users}:{groups}",
        "outside": _number_outside(os.getuid()),
        "held capabilities": held,
        "capabilities": held or _any(_IN_BOUNDING),
        # Whether a program started from here could have more.
        "new privileges": libc.prctl(_GET_NO_NEW_PRIVILEGES, 0, 0, 0, 0) != 1,
        "writable root": not _is_sealed(),
        "network": _has_network(host_network),
        "other processes": _sees_others(),
        # Container engines, D-Bus and ssh-agent read and write files for their clients.
        "files of yours": not home or _reaches(home) or _has_family(socket.AF_UNIX),
        "keys": seccomp.uses_keys(),
        "memory": max(0, resource.getrlimit(resource.RLIMIT_DATA)[0]),
    }


def unmet(found: Facts, *, as_root: bool) -> str:
    """Return the first required restriction that does not hold; '' if all hold.

    Only a start by root can drop all capabilities, so only that requires it.
    """
    if found["new privileges"]:
        return "it could gain privileges"
    if found["held capabilities"] or (as_root and found["capabilities"]):
        return "it would have capabilities"
    if as_root and found["outside"] == 0:
        return "it would be root outside"
    return ""


def words(found: Facts) -> tuple[str, ...]:
    """Return the restrictions that hold, for people."""
    mapped = f" ({found['outside']} outside)" if str(found["user"]).startswith("0:") else ""
    memory = int(found["memory"])
    said = (
        f"user {found['user']}{mapped}",
        "" if found["writable root"] else "read-only root",
        "" if found["network"] else "no network",
        "" if found["capabilities"] else "no capabilities",
        "" if found["new privileges"] else "no new privileges",
        "" if found["other processes"] else "own processes alone",
        "" if found["files of yours"] else "none of your files",
        "" if found["keys"] else "none of your keys",
        f"{memory / 2**20:.0f} MiB of memory" if memory else "",
    )
    return tuple(word for word in said if word)


def _any(*question: int) -> bool:
    rest = (0,) * (4 - len(question))
    return any(libc.prctl(*question, n, *rest) == 1 for n in range(_MOST_CAPABILITIES))


def _number_outside(user: int) -> int:
    """Return a user's number outside this user namespace."""
    with suppress(OSError):
        for line in Path("/proc/self/uid_map").read_text().splitlines():
            inside, outside, count = map(int, line.split())
            if inside <= user < inside + count:
                return outside + user - inside
    return user


def _is_sealed() -> bool:
    """Say whether files can be created neither in the root nor in the working directory."""
    for path in (Path("/.weightsmith-probe"), Path(".weightsmith-probe")):
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except OSError as problem:
            if problem.errno != errno.EROFS:
                return False
        else:
            path.unlink()
            return False
    return True


def _has_network(host_network: int) -> bool:
    """Say whether there is a network: the machine's own, another interface, a route, or vsock."""
    if _has_family(socket.AF_VSOCK):
        return True
    try:
        if os.stat("/proc/self/ns/net").st_ino == host_network:  # noqa: PTH116 - a magic link
            return True
        if [name for _, name in socket.if_nameindex()] != ["lo"]:
            return True
    except OSError:
        return True
    for family, address in _NOBODYS:
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return True
    return False


def _reaches(home: str) -> bool:
    """Say whether the user's folder can be read, or does not exist so it cannot be tried."""
    try:
        os.close(os.open(home, os.O_RDONLY | os.O_DIRECTORY))
    except OSError as problem:
        return problem.errno != errno.EACCES
    return True


def _has_family(family: int) -> bool:
    try:
        socket.socket(family).close()
    except OSError:
        return False
    return True


def _sees_others() -> bool:
    """Say whether processes other than the namespace's first and ourselves are visible."""
    try:
        seen = {int(name) for name in os.listdir("/proc") if name.isdecimal()}  # noqa: PTH208
    except OSError:
        return True
    return seen != {1, os.getpid()}
