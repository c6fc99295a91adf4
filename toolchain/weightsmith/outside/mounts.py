"""Mounts an image's file system and makes it the root of this process."""

from __future__ import annotations

import os
import platform
import stat
from contextlib import suppress
from pathlib import Path

from weightsmith.outside.sandbox_launcher import check, libc

_READ_ONLY, _NO_SETUID, _NO_DEVICES, _NO_PROGRAMS, _REMOUNT = 1, 2, 4, 8, 32
_NO_ACCESS_TIMES, _RELATIVE_ACCESS_TIMES = 0x400, 0x20_0000
_BIND, _RECURSIVE, _PRIVATE = 0x1000, 0x4000, 0x4_0000
_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_MEMORY_DEVICES = {"null": 3, "zero": 5, "full": 7, "random": 8, "urandom": 9}
"""Minor numbers, see mem(4) and random(4)."""
_LINKS = {
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
    "ptmx": "pts/ptmx",
}
_SHARED_MEMORY, _SHARED_MEMORY_WITH_GPU = 64 << 20, 1 << 30
"""Container engines' default."""


def mount(source: str, target: str | Path, kind: str, flags: int, options: str = "") -> None:
    """Mount a file system; raises OSError."""
    words = [os.fsencode(word) if word else None for word in (source, str(target), kind, options)]
    check(libc.mount(words[0], words[1], words[2], flags, words[3]), f"mount {target}")


def furnish(root: Path, memory_bytes: int, shm_bytes: int, *, gpu: bool) -> None:
    """Make `root` a mount with its own /dev, /proc, /sys and /tmp, and change to it.

    /tmp holds at most `memory_bytes`; 0 for the kernel's default, half of the machine's memory.
    The process must be the first of a process namespace, in its own mount namespace. Raises OSError
    if the kernel does not allow it.
    """
    mount("", "/", "", _RECURSIVE | _PRIVATE)
    mount(str(root), root, "", _BIND)
    os.chdir(root)
    for name in ("dev", "proc", "sys", "tmp"):
        _make_folder(Path(name))
    size = f",size={memory_bytes}" if memory_bytes else ""
    mount("tmpfs", "tmp", "tmpfs", _NO_SETUID | _NO_DEVICES, f"mode=1777{size}")
    _furnish_devices(Path("dev"), shm_bytes, gpu=gpu)
    quiet = _NO_SETUID | _NO_DEVICES | _NO_PROGRAMS
    try:
        mount("proc", "proc", "proc", quiet)
    except OSError:  # such as in a container that hides parts of /proc
        mount("/proc", "proc", "", _BIND | _RECURSIVE)
    with suppress(FileNotFoundError):  # a kernel without keys
        mount("dev/null", "proc/keys", "", _BIND)  # lists keys of everybody who has the same number
    with suppress(OSError):  # the same; servers work without it
        mount("sysfs", "sys", "sysfs", quiet | _READ_ONLY)


def _make_folder(path: Path) -> None:
    """Create a folder, replacing what the image has there; the copy is ours to change."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        path.mkdir()


def _furnish_devices(folder: Path, shm_bytes: int, *, gpu: bool) -> None:
    flags = _NO_SETUID | _NO_PROGRAMS
    mount("tmpfs", folder, "tmpfs", flags | _NO_DEVICES, "mode=0755,size=256k")
    host = Path("/dev")
    found = [host / name for name in _DEVICES]
    # The kernel driver's devices; the libraries are the image's own.
    found += sorted(host.glob("nvidia*")) if gpu else []
    for device in found:
        if device.is_char_device():
            (folder / device.name).touch()
            mount(str(device), folder / device.name, "", _BIND)
    for name, target in _LINKS.items():
        (folder / name).symlink_to(target)
    least = _SHARED_MEMORY_WITH_GPU if gpu and len(found) > len(_DEVICES) else _SHARED_MEMORY
    for name in ("shm", "pts"):
        (folder / name).mkdir()
    size = f"mode=1777,size={max(shm_bytes, least)}"
    mount("tmpfs", folder / "shm", "tmpfs", flags | _NO_DEVICES, size)
    with suppress(OSError):  # servers do not need it
        mount("devpts", folder / "pts", "devpts", flags, "newinstance,mode=0600,ptmxmode=0666")
    _remount(folder, _READ_ONLY)


def make_devices(folder: Path) -> None:
    """Create the devices that every program expects, if they cannot be mounted.

    Root in a container may do this; what is not allowed is skipped.
    """
    _make_folder(folder)
    for name, number in _MEMORY_DEVICES.items():
        with suppress(OSError):
            os.mknod(folder / name, stat.S_IFCHR, os.makedev(1, number))
            (folder / name).chmod(0o666)


def change_root() -> None:
    """Make the working directory, a mount, the root; nothing else stays visible."""
    pivot = _PIVOT_ROOT.get(platform.machine(), -1)
    if libc.syscall(pivot, b".", b".") == 0:
        check(libc.umount2(b".", _DETACH), "umount2")
    else:  # the machine's root cannot be pivoted: it is an initial ramdisk
        os.chroot(".")
    os.chdir("/")


def seal() -> None:
    """Make the root read-only, without devices and set-user-id programs."""
    _remount(Path("/"), _READ_ONLY | _NO_SETUID | _NO_DEVICES)


def _remount(place: Path, flags: int) -> None:
    # Existing flags must be repeated, or the kernel refuses.
    present = os.statvfs(place).f_flag
    flags |= present & (_NO_SETUID | _NO_DEVICES | _NO_PROGRAMS | _NO_ACCESS_TIMES)
    flags |= _RELATIVE_ACCESS_TIMES if present & getattr(os, "ST_RELATIME", 4096) else 0
    mount("", place, "", _REMOUNT | _BIND | flags)
