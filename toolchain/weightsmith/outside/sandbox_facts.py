"""Finds out from inside a sandbox what this process can do, by reading and by trying.

Reports once claimed isolation for images that could write to the machine. So what is reported is
what was tried, just before the program runs.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
from contextlib import suppress
from pathlib import Path

from weightsmith.outside import seccomp
from weightsmith.outside.privileges import left

Facts = dict[str, str | int | bool]
_NOBODYS = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
"""Documentation addresses (RFC 5737, RFC 3849): nothing is sent, only a route is looked up."""


def facts(host_network: int, home: str) -> Facts:
    """Return the facts for this process; what cannot be checked counts as not restricted.

    `host_network` is the inode of the machine's network namespace, `home` the home folder of the
    user that the program runs as; empty if no file of this machine is visible.
    """
    rights = left()
    users, groups = ("/".join(map(str, sorted(set(n)))) for n in (os.getresuid(), os.getresgid()))
    return {
        "user": f"{users}:{groups}",
        "outside": _number_outside(os.getuid()),
        "held capabilities": rights["own"],
        "capabilities": rights["own"] or rights["bounding"],
        "new privileges": rights["gain"],
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
