"""Becomes a program on a machine that withholds some of the kernel's means from ordinary users.

`python hardened.py WITHOUT[,WITHOUT…] PROGRAM [ARG…]`, with `namespaces` (as Docker's filter does),
`capabilities` (as Ubuntu's AppArmor does: a user namespace can be entered, and is of no use there),
`seccomp` and `landlock`. The kernel itself refuses, by a filter that stays on. It drops root first.
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

_UNSHARE, _SECCOMP, _PRCTL, _LANDLOCK, _MOUNT, _SETHOSTNAME = 272, 317, 157, 444, 165, 170
_NEW_USER = 0x1000_0000


def sibling(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "toolchain" / "weightsmith" / "outside" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(without: list[str], argv: list[str]) -> None:
    seccomp = sibling("seccomp")

    def when(argument: int, value: int, code: int) -> list[tuple[int, int, int, int]]:
        return [(0x20, 0, 0, 16 + 8 * argument), (0x15, 0, 1, value), (0x06, 0, 0, 0x50000 | code)]

    def refuse(code: int) -> list[tuple[int, int, int, int]]:
        return [(0x06, 0, 0, 0x50000 | code)]

    allow = [(0x06, 0, 0, 0x7FFF0000)]
    blocks = []

    def block(number: int, codes: list[tuple[int, int, int, int]]) -> None:
        blocks.append([(0x15, 0, len(codes), number), *codes])

    if "namespaces" in without:
        block(_UNSHARE, refuse(errno.EPERM))
    if "capabilities" in without:
        # Anything but a user namespace alone.
        block(
            _UNSHARE,
            [(0x20, 0, 0, 16), (0x15, 1, 0, _NEW_USER), *refuse(errno.EPERM), *allow],
        )
    if "seccomp" in without:
        block(_SECCOMP, refuse(errno.ENOSYS))
        block(_PRCTL, [*when(0, 22, errno.EINVAL), *allow])
    if "landlock" in without:
        block(_LANDLOCK, refuse(errno.ENOSYS))
    if os.getuid() == 0 and os.environ.get("HARDENED_AS"):
        user = int(os.environ["HARDENED_AS"])
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    seccomp.install(seccomp.program("x86_64", blocks))
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    main(sys.argv[1].split(","), sys.argv[2:])
