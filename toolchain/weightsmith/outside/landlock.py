"""Blocks files, signals and abstract sockets for this process with the kernel's Landlock rules.

Run by the sandbox launcher, so it uses only the standard library. Rights and structures are those
of <linux/landlock.h>; https://docs.kernel.org/userspace-api/landlock.html says what each ABI has.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

_CREATE, _ADD, _RESTRICT = 444, 445, 446
"""The three system calls; their numbers are the same on every machine."""
_VERSION, _PATH_BENEATH = 1, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG = 1 << 4, 1 << 5, 1 << 7, 1 << 8
_MAKE_FIFO, _MAKE_SYM, _REFER, _TRUNCATE, _IOCTL = 1 << 10, 1 << 12, 1 << 13, 1 << 14, 1 << 15
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL
"""Rights allowed in a rule for anything but a folder."""
_NO_TCP, _NO_ABSTRACT_SOCKETS, _NO_SIGNALS = 0b11, 0b01, 0b10
_FIRST_WITH = {"refer": 2, "truncate": 3, "tcp": 4, "ioctl": 5, "scopes": 6}
TRUNCATES = _FIRST_WITH["truncate"]
"""The first ABI whose rules say which files may be truncated."""

READ = _READ_FILE | _READ_DIR
RUN = READ | _EXECUTE
WRITE = READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _MAKE_FIFO
WRITE |= _MAKE_SYM | _REFER | _TRUNCATE
USE = _READ_FILE | _WRITE_FILE | _READ_DIR | _IOCTL
"""Rights for devices."""

_libc = ctypes.CDLL(None, use_errno=True)


def abi() -> int:
    """Return the kernel's Landlock ABI version; 0 without Landlock."""
    return max(0, int(_libc.syscall(_CREATE, None, ctypes.c_size_t(0), _VERSION)))


def restrict(rules: Iterable[tuple[str, int]], version: int, *, sockets: bool = False) -> None:
    """Restrict this process to these paths with these rights; missing paths are skipped.

    With any ABI, processes outside the domain cannot be traced either. `sockets` does not restrict
    the network. Raises OSError.
    """
    newer = ((_REFER, "refer"), (_TRUNCATE, "truncate"), (_IOCTL, "ioctl"))
    lacking = sum(right for right, name in newer if version < _FIRST_WITH[name])
    handled = ((_IOCTL << 1) - 1) & ~lacking
    tcp = _NO_TCP if version >= _FIRST_WITH["tcp"] and not sockets else 0
    scopes = 0
    if version >= _FIRST_WITH["scopes"]:
        scopes = _NO_SIGNALS | (0 if sockets else _NO_ABSTRACT_SOCKETS)
    attributes = struct.pack("=QQQ", handled, tcp, scopes)
    ruleset = _call(_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    for path, rights in rules:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            rights &= _OF_FILES
        _call(_ADD, ruleset, _PATH_BENEATH, struct.pack("=Qi", rights & handled, place), 0)
        os.close(place)
    _call(_RESTRICT, ruleset, 0)
    os.close(ruleset)


def _call(number: int, *words: object) -> int:
    result = int(_libc.syscall(number, *words))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"landlock: {os.strerror(code)}")
    return result
