"""Builds a sandbox around this process and executes an untrusted image's program in it.

Run by `image_launcher.py` in its own process. That process stays outside and waits. Its child is
process 1 of a process namespace: it makes the image's file system the only one, drops all
privileges, starts the program, forwards SIGTERM, reaps orphans and reports the exit status. The
program's own process checks which limits hold, from inside, just before it executes the program.

If we are root, the program's user on the host is 65532, whatever user the image names, so that
images whose user is root still start; keeping root without its capabilities would leave it all of
root's files. Only the program gets the image's environment, which could affect the loader of the
process that starts it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import resource
import select
import signal
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from weightsmith.outside import landlock, privileges, seccomp
from weightsmith.outside.sandbox_launcher import (
    FAILED,
    NEW_NETWORK,
    NEW_USER,
    check,
    die_with_parent,
    end_as,
    libc,
    map_ids,
    unshare,
)

NEW_MOUNTS, NEW_NAMES, NEW_IPC, NEW_PROCESSES = 0x0002_0000, 0x0400_0000, 0x0800_0000, 0x2000_0000

PROCESSES = 16384
"""Processes and threads of a server: engines start several for each CPU and GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSettings:
    """What a program is started with, and in which sandbox; as JSON in an open file."""

    way: Literal["apart", "folder", "bare"]
    """In its own namespaces; with a folder as its root; or only as the calling user."""
    root: str
    home: str
    """The calling user's."""
    argv: tuple[str, ...]
    env: Mapping[str, str]
    workdir: str
    user: tuple[int, int]
    """User and group inside."""
    memory_bytes: int
    """That it may write to; 0 for no limit."""
    shm_bytes: int
    gpu: bool
    network: int
    """Inode of the machine's network namespace."""
    relay: tuple[int, int] | None = None
    """The only way in, with namespaces: a listening socket outside, and the port inside."""
    tell: int = -1
    """Pipe for what is found or fails."""
    parent: int = 0
    """The launcher, which ends with the control plane."""
    as_root: bool = False


def main(settings_file: int) -> NoReturn:
    """Execute the program in the settings; report failures on the pipe `tell`."""
    with os.fdopen(settings_file, "rb") as file:
        given = json.loads(file.read())
    given |= {"parent": os.getppid(), "as_root": privileges.is_root()}
    settings = SandboxSettings(**given)
    os.set_inheritable(settings.tell, False)
    os.umask(0o022)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):  # its keys are then kept from the program by the filter alone
        seccomp.leave_keys()
    {"apart": in_namespaces, "folder": in_folder, "bare": as_caller}[settings.way](settings)
    raise AssertionError("exec returned")


@contextmanager
def _reporting(settings: SandboxSettings, step: str) -> Iterator[None]:
    """If the block fails, report the step and the reason, and exit."""
    try:
        yield
    except (OSError, ValueError) as problem:
        report = {
            "failed": step,
            "errno": getattr(problem, "errno", None) or 0,
            "why": getattr(problem, "strerror", None) or str(problem),
        }
        os.write(settings.tell, json.dumps(report).encode() + b"\n")
        os._exit(FAILED)


def in_namespaces(settings: SandboxSettings) -> None:
    """Start the program in its own namespaces, wait for it, and exit with its status."""

    def restrict_relay() -> None:
        os.close(settings.tell)
        if settings.as_root:
            privileges.become_nobody()

    with _reporting(settings, "separate"):
        if settings.relay is None:
            raise ValueError("no way in")
        if not settings.as_root:
            map_ids(*settings.user)
        unshare(NEW_NETWORK | NEW_IPC | NEW_NAMES)
        # In a new network namespace, `lo` is down.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sh14x", b"lo", _UP))
        end_relay = start_relay(*settings.relay, restrict_relay)
        unshare(NEW_PROCESSES)
        die_with_parent(settings.parent)
    ask, answer, ended = os.pipe(), os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        for other in (ask[0], answer[1], ended[0]):
            os.close(other)
        _first_process(settings, answer[0], ask[1], ended[1])
    signal.signal(signal.SIGTERM, lambda number, _: os.kill(child, number))
    for own in (ask[1], answer[0], ended[1], settings.tell):
        os.close(own)
    if os.read(ask[0], 1):
        os.write(answer[1], b"y" if privileges.map_ids_of(child, *settings.user) else b"n")
    status = os.read(ended[0], 16)
    _, own_status = os.waitpid(child, 0)
    end_relay()
    end_as(int(status) if status else own_status)


def _first_process(settings: SandboxSettings, answer: int, ask: int, ended: int) -> NoReturn:
    """Run as process 1: seal the sandbox, start the program, reap orphans."""
    with _reporting(settings, "separate"):
        unshare(NEW_MOUNTS)
        root = Path(settings.root)
        furnish(root, settings.memory_bytes, settings.shm_bytes, gpu=settings.gpu)
        if libc.syscall(_PIVOT_ROOT.get(platform.machine(), -1), b".", b".") == 0:
            check(libc.umount2(b".", _DETACH), "umount2")
        else:  # the machine's root cannot be pivoted: it is an initial ramdisk
            os.chroot(".")
        os.chdir("/")
    _enter(settings)
    with _reporting(settings, "confine"):
        _remount(Path("/"), _READ_ONLY | _NO_SETUID | _NO_DEVICES)
        if settings.as_root:
            _leave_root(settings.user, ask, answer)
        else:
            privileges.forbid_user_namespaces()
            privileges.drop_capabilities()
        os.close(ask)
        privileges.forbid_privileges()
        # Last: the kernel clears it whenever a process changes its user or capabilities.
        die_with_parent(0)  # inside, processes of the outer namespace have the number 0
    if select.select([answer], [], [], 0)[0]:
        os._exit(FAILED)  # the parent had already ended
    program = os.fork()
    if program == 0:
        _become(settings)
    os.close(settings.tell)

    def hand_on(number: int, _: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(program, number)

    signal.signal(signal.SIGTERM, hand_on)
    while True:
        number, status = os.wait()
        if number == program:
            os.write(ended, str(status).encode())
            os._exit(0)


def _enter(settings: SandboxSettings) -> None:
    """Change to the image's working directory; create it if missing, as engines do."""
    folder = Path(settings.workdir or "/")
    with _reporting(settings, "start"):
        with suppress(FileExistsError):
            folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)


def _leave_root(user: tuple[int, int], ask: int, answer: int) -> None:
    """Become nobody outside and `user` inside; nobody in both without user namespaces."""
    os.setgroups([])
    try:
        unshare(NEW_USER)
    except OSError:
        privileges.become_nobody()
        return
    os.write(ask, b"?")
    if os.read(answer, 1) != b"y":
        raise OSError(0, "the user could not be mapped to an unprivileged one")
    privileges.forbid_user_namespaces()
    privileges.become(*user)


def in_folder(settings: SandboxSettings) -> None:
    """Execute the program with its folder as root, without privileges or namespaces."""
    with _reporting(settings, "confine"):
        os.chroot(settings.root)
        os.chdir("/")
        _make_folder(Path("/dev"))
        for name, number in _MEMORY_DEVICES.items():
            with suppress(OSError):  # root in a container may do this, but not everywhere
                os.mknod(f"/dev/{name}", stat.S_IFCHR, os.makedev(1, number))
                Path("/dev", name).chmod(0o666)
    _enter(settings)
    with _reporting(settings, "confine"):
        privileges.become_nobody()
        privileges.forbid_privileges()
        die_with_parent(settings.parent)
    _become(settings)


def as_caller(settings: SandboxSettings) -> None:
    """Execute the program as the calling user, who is not root and gains no privileges.

    With Landlock it can only use the image's files and the system's.
    """
    with _reporting(settings, "confine"):
        if privileges.is_root():
            raise PermissionError("root's privileges cannot be dropped")
        os.chdir(settings.workdir)
        privileges.drop_capabilities()
        privileges.forbid_privileges()
        version = landlock.abi()
        if version:
            devices = ("null", "zero", "full", "random", "urandom")
            rules = [(settings.root, landlock.RUN)]
            rules += [(f"{settings.root}/tmp", landlock.WRITE)]  # noqa: S108 - the image's
            rules += [(folder, landlock.RUN) for folder in ("/usr", "/lib", "/lib64")]
            rules += [(folder, landlock.READ) for folder in ("/etc", "/proc", "/sys")]
            rules += [(f"/dev/{device}", landlock.USE) for device in devices]
            landlock.restrict(rules, version, sockets=True)
        die_with_parent(settings.parent)
    _become(settings)


def _become(settings: SandboxSettings) -> NoReturn:
    """Check the sandbox from inside, report the facts, and execute the program."""
    # Processes and threads together; in older kernels with the user's others.
    _, allowed = resource.getrlimit(resource.RLIMIT_NPROC)
    most = PROCESSES if allowed == resource.RLIM_INFINITY else min(PROCESSES, allowed)
    resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
    if settings.memory_bytes:
        # Limits what the process writes to, not the weight files that it maps.
        resource.setrlimit(resource.RLIMIT_DATA, (settings.memory_bytes,) * 2)
    bare = settings.way == "bare"
    with suppress(OSError):  # without system call filters; the facts then have less
        # Where its files are its own, it may truncate them.
        version = {"apart": landlock.TRUNCATES, "folder": 0}.get(settings.way, landlock.abi())
        machine = seccomp.machine()
        seccomp.install(seccomp.job_filter(machine, landlock=version, sockets=True, serves=bare))
    with _reporting(settings, "confine"):
        found = privileges.facts(settings.network, settings.home if bare else "")
        if lacking := privileges.unmet(found, as_root=settings.as_root):
            raise PermissionError(lacking)
    os.write(settings.tell, json.dumps(found).encode() + b"\n")
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # ignored by Python, and exec would keep that
        signal.signal(number, signal.SIG_DFL)
    with _reporting(settings, "start"):
        os.execvpe(settings.argv[0], settings.argv, settings.env)  # noqa: S606
    raise AssertionError("exec returned")


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


def _remount(place: Path, flags: int) -> None:
    # Existing flags must be repeated, or the kernel refuses.
    present = os.statvfs(place).f_flag
    flags |= present & (_NO_SETUID | _NO_DEVICES | _NO_PROGRAMS | _NO_ACCESS_TIMES)
    flags |= _RELATIVE_ACCESS_TIMES if present & getattr(os, "ST_RELATIME", 4096) else 0
    mount("", place, "", _REMOUNT | _BIND | flags)


_SET_FLAGS, _UP = 0x8914, 1
"""SIOCSIFFLAGS and IFF_UP, see netdevice(7)."""
_LAST_WORDS = 5.0
"""Seconds for clients to read what a server sent before it ended."""


def start_relay(listening: int, port: int, reduce: Callable[[], None]) -> Callable[[], None]:
    """Start a relay as a child of this process, and return what ends it; it ends with this process.

    At its end it first passes on what the server still sent, for a few seconds at most.

    A socket stays in the network namespace it was created in: `listening` is outside, and the relay
    connects to `port` in its own. `reduce` drops its privileges.
    """
    parent, (ending, keep) = os.getpid(), os.pipe()
    relay = os.fork()
    if relay == 0:
        try:
            os.close(keep)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the server may still send its reply
            for number in (0, 1, 2):
                os.dup2(os.open(os.devnull, os.O_RDWR), number)
            reduce()
            die_with_parent(parent)
            listener = socket.socket(fileno=listening)
            replies: list[threading.Event] = []
            while listening in select.select([listening, ending], [], [])[0]:
                outer, _ = listener.accept()
                replies = [replied for replied in replies if not replied.is_set()]
                replies.append(threading.Event())
                carried = (outer, port, replies[-1])
                threading.Thread(target=_carry, args=carried, daemon=True).start()
            until = time.monotonic() + _LAST_WORDS
            for replied in replies:
                replied.wait(max(0, until - time.monotonic()))
        finally:
            os._exit(0)
    os.close(listening)
    os.close(ending)

    def end() -> None:
        os.close(keep)
        os.waitpid(relay, 0)

    return end


def _carry(outer: socket.socket, port: int, replied: threading.Event) -> None:
    """Carry a connection to its end; `replied` is set once the server sends nothing more."""
    inner = socket.socket()  # create_connection would import the idna codec
    try:
        inner.connect(("127.0.0.1", port))
    except OSError:
        inner.close()
        outer.close()  # the server does not listen yet
        replied.set()
        return

    def reply() -> None:
        _copy(inner, outer)
        replied.set()

    back = threading.Thread(target=reply, daemon=True)
    back.start()
    _copy(outer, inner)
    back.join()
    for each in (outer, inner):
        each.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while chunk := source.recv(65536):
            target.sendall(chunk)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        # `close` does not wake the thread that reads the other way, so the client would wait.
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
