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

import json
import os
import resource
import select
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from weightsmith.outside import landlock, privileges, seccomp
from weightsmith.outside.mounts import change_root, furnish, make_devices, seal
from weightsmith.outside.relay import raise_loopback, start_relay
from weightsmith.outside.sandbox_facts import facts, unmet
from weightsmith.outside.sandbox_launcher import (
    FAILED,
    NEW_NETWORK,
    NEW_USER,
    die_with_parent,
    end_as,
    map_ids,
    unshare,
)

NEW_MOUNTS, NEW_NAMES, NEW_IPC, NEW_PROCESSES = 0x0002_0000, 0x0400_0000, 0x0800_0000, 0x2000_0000

PROCESSES = 16384
"""Processes and threads of a server: engines start several for each CPU and GPU."""


def main(settings_file: int) -> NoReturn:
    """Execute the program in the settings; report failures on the pipe `tell`."""
    with os.fdopen(settings_file, "rb") as file:
        settings = json.loads(file.read())
    os.set_inheritable(settings["tell"], False)
    os.umask(0o022)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):  # its keys are then kept from the program by the filter alone
        seccomp.leave_keys()
    settings["parent"] = os.getppid()  # the launcher, which ends with the control plane
    settings["as_root"] = privileges.is_root()
    {"apart": in_namespaces, "folder": in_folder, "bare": as_caller}[settings["way"]](settings)
    raise AssertionError("exec returned")


@contextmanager
def _reporting(settings: Mapping[str, Any], step: str) -> Iterator[None]:
    """If the block fails, report the step and the reason, and exit."""
    try:
        yield
    except (OSError, ValueError) as problem:
        report = {
            "failed": step,
            "errno": getattr(problem, "errno", None) or 0,
            "why": getattr(problem, "strerror", None) or str(problem),
        }
        os.write(settings["tell"], json.dumps(report).encode() + b"\n")
        os._exit(FAILED)


def in_namespaces(settings: Mapping[str, Any]) -> None:
    """Start the program in its own namespaces, wait for it, and exit with its status."""
    as_root = bool(settings["as_root"])
    with _reporting(settings, "separate"):
        if not as_root:
            map_ids(*settings["user"])
        unshare(NEW_NETWORK | NEW_IPC | NEW_NAMES)
        raise_loopback()
        listening, port = settings["relay"]
        end_relay = start_relay(listening, port, lambda: _restrict_relay(settings))
        unshare(NEW_PROCESSES)
        die_with_parent(settings["parent"])
    ask, answer, ended = os.pipe(), os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        for other in (ask[0], answer[1], ended[0]):
            os.close(other)
        _first_process(settings, (answer[0], ask[1], ended[1]))
    signal.signal(signal.SIGTERM, lambda number, _: os.kill(child, number))
    for own in (ask[1], answer[0], ended[1], settings["tell"]):
        os.close(own)
    if os.read(ask[0], 1):
        os.write(answer[1], b"y" if privileges.map_ids_of(child, *settings["user"]) else b"n")
    status = os.read(ended[0], 16)
    _, own_status = os.waitpid(child, 0)
    end_relay()
    end_as(int(status) if status else own_status)


def _restrict_relay(settings: Mapping[str, Any]) -> None:
    """Drop what the relay does not need: all privileges and all other files."""
    os.close(settings["tell"])
    if settings["as_root"]:
        privileges.become_nobody()


def _first_process(settings: Mapping[str, Any], pipes: tuple[int, int, int]) -> NoReturn:
    """Run as process 1: seal the sandbox, start the program, reap orphans."""
    answer, ask, ended = pipes
    with _reporting(settings, "separate"):
        unshare(NEW_MOUNTS)
        memory, shared = settings["memory_bytes"], settings["shm_bytes"]
        furnish(Path(settings["root"]), memory, shared, gpu=settings["gpu"])
        change_root()
    with _reporting(settings, "start"):
        _enter(settings["workdir"])
    with _reporting(settings, "confine"):
        seal()
        if settings["as_root"]:
            _leave_root(settings["user"], ask, answer)
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
    os.close(settings["tell"])

    def hand_on(number: int, _: object) -> None:
        with suppress(ProcessLookupError):
            os.kill(program, number)

    signal.signal(signal.SIGTERM, hand_on)
    while True:
        number, status = os.wait()
        if number == program:
            os.write(ended, str(status).encode())
            os._exit(0)


def _enter(workdir: str) -> None:
    """Change to the image's working directory; create it if missing, as engines do."""
    folder = Path(workdir or "/")
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


def in_folder(settings: Mapping[str, Any]) -> None:
    """Execute the program with its folder as root, without privileges or namespaces."""
    with _reporting(settings, "confine"):
        os.chroot(settings["root"])
        os.chdir("/")
        make_devices(Path("/dev"))
    with _reporting(settings, "start"):
        _enter(settings["workdir"])
    with _reporting(settings, "confine"):
        privileges.become_nobody()
        privileges.forbid_privileges()
        die_with_parent(settings["parent"])
    _become(settings)


def as_caller(settings: Mapping[str, Any]) -> None:
    """Execute the program as the calling user, who is not root and gains no privileges.

    With Landlock it can only use the image's files and the system's.
    """
    with _reporting(settings, "confine"):
        if privileges.is_root():
            raise PermissionError("root's privileges cannot be dropped")
        os.chdir(settings["workdir"])
        privileges.drop_capabilities()
        privileges.forbid_privileges()
        version = landlock.abi()
        if version:
            landlock.restrict(_reach(settings["root"]), version, sockets=True)
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


def _filter(way: str) -> bytes:
    """Return the filter of system calls; where its files are its own, it may truncate them."""
    version = {"apart": landlock.TRUNCATES, "folder": 0}.get(way, landlock.abi())
    machine = seccomp.machine()
    return seccomp.job_filter(machine, landlock=version, sockets=True, serves=way == "bare")


def _become(settings: Mapping[str, Any]) -> NoReturn:
    """Check the sandbox from inside, report the facts, and execute the program."""
    # Processes and threads together; in older kernels with the user's others.
    _, allowed = resource.getrlimit(resource.RLIMIT_NPROC)
    most = PROCESSES if allowed == resource.RLIM_INFINITY else min(PROCESSES, allowed)
    resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
    if settings["memory_bytes"]:
        # Limits what the process writes to, not the weight files that it maps.
        resource.setrlimit(resource.RLIMIT_DATA, (settings["memory_bytes"],) * 2)
    with suppress(OSError):  # without system call filters; the facts then have less
        seccomp.install(_filter(settings["way"]))
    with _reporting(settings, "confine"):
        home = settings["home"] if settings["way"] == "bare" else ""
        found = facts(settings["network"], home)
        if lacking := unmet(found, as_root=settings["as_root"]):
            raise PermissionError(lacking)
    os.write(settings["tell"], json.dumps(found).encode() + b"\n")
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # ignored by Python, and exec would keep that
        signal.signal(number, signal.SIG_DFL)
    with _reporting(settings, "start"):
        os.execvpe(settings["argv"][0], settings["argv"], settings["env"])  # noqa: S606
    raise AssertionError("exec returned")
