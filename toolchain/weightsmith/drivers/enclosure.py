"""Becomes the program of an image, which others made: nothing of this machine is in its reach.

Run by `enclosing.py` in a process of its own. That process stays outside and waits; its child is
process 1 of a process namespace, makes the image's file system the only one, gives every right
away and starts the program; it hands on SIGTERM, takes in orphans, and says how the program
ended. What holds is looked at by the program's own process, from inside, in the moment before it
becomes the program.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from weightsmith.drivers import filters, landlock, rights
from weightsmith.drivers.inventory import facts, unmet
from weightsmith.drivers.mounts import change_root, furnish, make_devices, seal
from weightsmith.drivers.relay import raise_loopback, start_relay
from weightsmith.drivers.trampoline import (
    FAILED,
    NEW_NETWORK,
    NEW_USER,
    die_with_parent,
    map_ids,
    unshare,
)

NEW_MOUNTS, NEW_NAMES, NEW_IPC, NEW_PROCESSES = 0x0002_0000, 0x0400_0000, 0x0800_0000, 0x2000_0000


def main(settings_file: int) -> NoReturn:
    """Become the program that the settings name; say on the pipe `tell` how that went."""
    with os.fdopen(settings_file, "rb") as file:
        settings = json.loads(file.read())
    os.set_inheritable(settings["tell"], False)
    os.umask(0o022)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    settings["as_root"] = rights.is_root()
    {"apart": apart, "folder": in_folder, "bare": bare}[settings["way"]](settings)
    raise AssertionError("another program runs by now")


@contextmanager
def _told(settings: Mapping[str, Any], step: str) -> Iterator[None]:
    """Where the block fails, say at which step and why, and end."""
    try:
        yield
    except (OSError, ValueError) as problem:
        told = {
            "failed": step,
            "errno": getattr(problem, "errno", None) or 0,
            "why": getattr(problem, "strerror", None) or str(problem),
        }
        os.write(settings["tell"], json.dumps(told).encode() + b"\n")
        os._exit(FAILED)


def apart(settings: Mapping[str, Any]) -> None:
    """Start the program in namespaces of its own, wait for it, and end as it ended."""
    as_root = bool(settings["as_root"])
    with _told(settings, "separate"):
        if not as_root:
            map_ids(*settings["user"])
        unshare(NEW_NETWORK | NEW_IPC | NEW_NAMES)
        raise_loopback()
        listening, port = settings["relay"]
        start_relay(listening, port, lambda: _reduce(settings))
        unshare(NEW_PROCESSES)
        die_with_parent(settings["parent"])
    ask, answer, ended = os.pipe(), os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        for other in (ask[0], answer[1], ended[0]):
            os.close(other)
        _first_process(settings, (answer[0], ask[1], ended[1]))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the program's group has it, and it decides
    for own in (ask[1], answer[0], ended[1], settings["tell"]):
        os.close(own)
    if os.read(ask[0], 1):
        os.write(answer[1], b"y" if rights.map_ids_of(child, *settings["user"]) else b"n")
    status = os.read(ended[0], 16)
    _, own_status = os.waitpid(child, 0)
    _end_as(int(status) if status else own_status)


def _reduce(settings: Mapping[str, Any]) -> None:
    """Leave to the relay what it needs, which is no right and no other file."""
    os.close(settings["tell"])
    if settings["as_root"]:
        rights.become_nobody()


def _end_as(status: int) -> NoReturn:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        with suppress(OSError):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else FAILED)


def _first_process(settings: Mapping[str, Any], pipes: tuple[int, int, int]) -> NoReturn:
    """Be process 1: close everything behind us, start the program, take in what it leaves."""
    answer, ask, ended = pipes
    with _told(settings, "separate"):
        unshare(NEW_MOUNTS)
        furnish(Path(settings["root"]), settings["shm_bytes"], gpu=settings["gpu"])
        change_root()
    with _told(settings, "start"):
        _enter(settings["workdir"])
    with _told(settings, "confine"):
        seal()
        if settings["as_root"]:
            _leave_root(settings["user"], ask, answer)
        else:
            rights.forbid_user_namespaces()
            rights.drop_capabilities()
        os.close(ask)
        rights.forbid_privileges()
        # Last of all: the kernel forgets it whenever a process changes its user or its rights.
        die_with_parent(0)  # as seen from in here, what is outside has the number 0
    if select.select([answer], [], [], 0)[0]:
        os._exit(FAILED)  # it had ended before
    program = os.fork()
    if program == 0:
        _become(settings)
    os.close(settings["tell"])
    home = os.getpgid(0)

    def hand_on(number: int, _: object) -> None:
        with suppress(ProcessLookupError):
            if os.getpgid(program) != home:  # else it has the signal, as its group has
                os.kill(program, number)

    signal.signal(signal.SIGTERM, hand_on)
    while True:
        number, status = os.wait()
        if number == program:
            os.write(ended, str(status).encode())
            os._exit(0)


def _enter(workdir: str) -> None:
    """Go to the image's working directory; it is made where it is not there, as by engines."""
    folder = Path(workdir or "/")
    with suppress(FileExistsError):
        folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)


def _leave_root(user: tuple[int, int], ask: int, answer: int) -> None:
    """Be nobody outside, whoever inside; nobody inside too where there are no user namespaces."""
    os.setgroups([])
    try:
        unshare(NEW_USER)
    except OSError:
        rights.become_nobody()
        return
    os.write(ask, b"?")
    if os.read(answer, 1) != b"y":
        raise OSError(0, "the user could not be mapped to one without rights")
    rights.forbid_user_namespaces()
    rights.become(*user)


def in_folder(settings: Mapping[str, Any]) -> None:
    """Become the program below its own folder, without rights; all else stays the machine's."""
    with _told(settings, "confine"):
        os.chroot(settings["root"])
        os.chdir("/")
        make_devices(Path("/dev"))
    with _told(settings, "start"):
        _enter(settings["workdir"])
    with _told(settings, "confine"):
        rights.become_nobody()
        rights.forbid_privileges()
        _refuse_calls(0)
        die_with_parent(settings["parent"])
    _become(settings)


def bare(settings: Mapping[str, Any]) -> None:
    """Become the program as the user who asks, who is not root and gets no further rights.

    Where the kernel has rules for that, it keeps to the image's files and the system's.
    """
    with _told(settings, "confine"):
        if rights.is_root():
            raise PermissionError("root's rights cannot be taken away")
        os.chdir(settings["workdir"])
        rights.drop_capabilities()
        rights.forbid_privileges()
        version = landlock.abi()
        if version:
            landlock.restrict(_reach(settings["root"]), version, sockets=True)
        _refuse_calls(version, serves=True)
        die_with_parent(settings["parent"])
    _become(settings)


def _reach(root: str) -> Iterator[tuple[str, int]]:
    yield root, landlock.RUN
    yield f"{root}/tmp", landlock.WRITE  # noqa: S108 - the image's
    for folder in ("/usr", "/lib", "/lib64"):
        yield folder, landlock.RUN
    for folder in ("/etc", "/proc", "/sys"):
        yield folder, landlock.READ
    for device in ("null", "zero", "full", "random", "urandom"):
        yield f"/dev/{device}", landlock.USE


def _refuse_calls(version: int, *, serves: bool = False) -> None:
    """Refuse the ways into other processes, where a filter can be had."""
    with suppress(OSError):
        code = filters.job_filter(filters.machine(), landlock=version, sockets=True, serves=serves)
        filters.install(code)


def _become(settings: Mapping[str, Any]) -> NoReturn:
    """Look around, say what holds, and become the program."""
    if settings["memory_bytes"]:
        # Counts what the process writes to, not the weight files that it maps.
        resource.setrlimit(resource.RLIMIT_DATA, (settings["memory_bytes"],) * 2)
    with _told(settings, "confine"):
        home = settings["home"] if settings["way"] == "bare" else ""
        found = facts(settings["network"], home)
        if lacking := unmet(found, as_root=settings["as_root"]):
            raise PermissionError(lacking)
    os.write(settings["tell"], json.dumps(found).encode() + b"\n")
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and that is inherited
        signal.signal(number, signal.SIG_DFL)
    with _told(settings, "start"):
        os.execvpe(settings["argv"][0], settings["argv"], settings["env"])  # noqa: S606
    raise AssertionError("another program runs by now")
