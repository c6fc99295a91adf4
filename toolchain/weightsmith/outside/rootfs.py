"""Starts an image without a container engine: its program on its own root file system.

`image_sandbox.py` is the sandbox; here is also read which of its limits hold.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

from weightsmith.core.cpus import flags
from weightsmith.core.errors import CheckFailed, EnvironmentFailure, UsageError, too_many_processes
from weightsmith.core.ports import Endpoint, Launcher, StartSpec
from weightsmith.core.trees import walk
from weightsmith.outside import process
from weightsmith.outside.ownership import private_folder
from weightsmith.outside.privileges import NOBODY, is_root
from weightsmith.outside.sandbox_facts import Facts, words
from weightsmith.outside.start_errors import no_program, unstartable

_SCHEME = "oci:"
_NO_ID = (1 << 32) - 1
"""Means no user or group in system calls; every smaller number is valid."""
_LARGEST_TABLE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StartInfo:
    """How an image's configuration says to start it."""

    argv: tuple[str, ...]
    """Entrypoint and command, joined."""
    env: Mapping[str, str]
    workdir: str = "/"
    user: str = ""
    """`user[:group]`, by name or number, as in the configuration; empty for root."""


Unpack = Callable[[str, Path], StartInfo]
"""Unpacks the image of a layout folder (first argument, without `oci:`) into an empty folder."""


class RootfsLauncher:
    """Starts an image from an OCI layout folder, without an engine.

    The root file system is unpacked below `cache` and becomes the program's only one, read-only, in
    its own namespaces, without capabilities, as a user who is nobody outside (if we are root) or
    the caller (otherwise); a relay is the only way in. If the kernel does not allow that, the
    server is on the machine's network, on a free loopback port set by `spec.port_variable`.
    Then root starts it as nobody, without capabilities, with the folder as its root. Other users
    start it as themselves, with the paths in its arguments and environment changed to the folder,
    which works only for programs that need no libraries of the image.
    """

    name = "rootfs"

    def __init__(self, unpack: Unpack, cache: Path) -> None:
        self._unpack = unpack
        self._cache = cache

    def cpu_flags(self) -> frozenset[str]:
        """Return what this machine's CPU can do."""
        return flags()

    @contextlib.contextmanager
    def serve(self, image: str, spec: StartSpec) -> Iterator[Endpoint]:
        """Start `image` (`oci:DIR`); stop it and delete its files when the context ends.

        Does not wait: the caller polls the server's health. Raises UsageError for another kind of
        reference, CheckFailed for an image that cannot be started, EnvironmentFailure if root's
        privileges cannot be dropped.
        """
        if not image.startswith(_SCHEME):
            raise UsageError(
                f"{image!r} cannot be started without a container engine",
                hint="start an engine, or give the image as oci:DIR",
            )
        # Below the cache, where leftovers of killed processes are found and deleted.
        with private_folder(self._cache) as folder:
            root = folder / "root"
            root.mkdir()
            # The image's user must be able to enter.
            root.chmod(0o755)
            info = self._unpack(image.removeprefix(_SCHEME), root)
            if not info.argv:
                raise no_program(image)
            if is_root():
                try:
                    give_to(root, NOBODY)
                except OSError as problem:  # root in a namespace without other users
                    raise not_confined(image, problem.strerror or str(problem)) from None
            with contextlib.ExitStack() as servers:
                yield _start_strongest(image, root, info, spec, servers)


def _start_strongest(
    image: str, root: Path, info: StartInfo, spec: StartSpec, servers: contextlib.ExitStack
) -> Endpoint:
    """Start the server in the strongest sandbox that this machine supports."""
    try:
        return _in_namespaces(image, root, info, spec, servers)
    except NotAllowed:
        port = servers.enter_context(_port(spec))
        moved = {spec.port_variable: str(port)} if spec.port_variable else {}
        if spec.host_variable:
            moved[spec.host_variable] = "127.0.0.1"
        at_port = replace(spec, env={**spec.env, **moved})
        return _in_host_network(image, root, info, at_port, port, servers)


def _in_namespaces(
    image: str, root: Path, info: StartInfo, spec: StartSpec, servers: contextlib.ExitStack
) -> Endpoint:
    """Start the server in its own namespaces, with a relay as the only way in."""
    with contextlib.ExitStack() as attempt:
        listener = attempt.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        inside = _inside(image, root, info, spec)
        server, found = attempt.enter_context(
            start_sandboxed(inside, spec, "apart", Relay(listener=listener, port=spec.port))
        )
        port = listener.getsockname()[1]
        servers.push(attempt.pop_all())
    return _endpoint(port, server, found, lambda: _in_namespaces(image, root, info, spec, servers))


def _in_host_network(
    image: str,
    root: Path,
    info: StartInfo,
    spec: StartSpec,
    port: int,
    servers: contextlib.ExitStack,
) -> Endpoint:
    """Start the server in this machine's network; as root, unprivileged and in its own files."""
    inside = _inside(image, root, info, spec)
    mode: Mode = "folder"
    if not is_root():
        env = dict(zip(inside.env, relocated(root, tuple(inside.env.values())), strict=True))
        argv = relocated(root, info.argv)
        inside, mode = replace(inside, argv=argv, env=env, workdir=str(root)), "bare"
    server, found = servers.enter_context(start_sandboxed(inside, spec, mode))
    again = partial(_in_host_network, image, root, info, spec, port, servers)
    return _endpoint(port, server, found, again)


def _inside(image: str, root: Path, info: StartInfo, spec: StartSpec) -> SandboxedProgram:
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp"}  # noqa: S108 - inside
    return SandboxedProgram(
        image=image,
        root=root,
        argv=info.argv,
        program=info.argv[0],
        env={**environment, **info.env, **spec.env},
        workdir=info.workdir or "/",
        user=user_ids(root, info.user),
    )


def _endpoint(
    port: int, server: process.Server, found: Facts, again: Callable[[], Endpoint]
) -> Endpoint:
    return Endpoint(
        url=f"http://127.0.0.1:{port}",
        logs=server.logs,
        alive=server.alive,
        stop=server.stop,
        restart=again,
        confinement=words(found),
    )


class EitherLauncher:
    """Starts layouts from their root file system, and other images in the container engine."""

    def __init__(self, engine: Launcher, layouts: Launcher) -> None:
        self._engine = engine
        self._layouts = layouts
        self.name = engine.name

    def serve(self, image: str, spec: StartSpec) -> AbstractContextManager[Endpoint]:
        """Start `image`."""
        launcher = self._layouts if image.startswith(_SCHEME) else self._engine
        return launcher.serve(image, spec)

    def cpu_flags(self) -> frozenset[str] | None:
        """Return what the engine's CPU can do, None if unknown."""
        return self._engine.cpu_flags()


def free_port() -> int:
    """Return a currently free loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _port(spec: StartSpec) -> Iterator[int]:
    """Yield the port to serve on, reserved against other builds until the block ends.

    The server binds the port only later, and servers that share a port would even answer each
    other's requests.
    """
    while spec.port_variable:
        port = free_port()
        # An abstract socket name, per network namespace as ports are; it disappears with us.
        with socket.socket(socket.AF_UNIX) as mark:
            try:
                mark.bind(f"\0weightsmith-port-{port}")
            except OSError:
                continue
            yield port
            return
    yield spec.port


def give_to(root: Path, user: int) -> None:
    """Make a user and its group the owner of a folder and everything in it."""
    for step in walk(root):
        os.chown(step.name, user, user, dir_fd=step.parent, follow_symlinks=False)


def user_ids(root: Path, user: str) -> tuple[int, int]:
    """Return user and group numbers of an image's user, looked up in the image's /etc.

    Raises CheckFailed for an unknown name or an invalid number.
    """
    name, _, group = user.partition(":")
    known = _table(root, "passwd")
    number, own_group = (int(name or "0"), 0) if (name or "0").isdecimal() else (-1, 0)
    for entry in known:
        if name == entry[0] or (number >= 0 and entry[2] == str(number)):
            number, own_group = _number(entry[2]), _number(entry[3])
            break
    if group.isdecimal():
        own_group = int(group)
    elif group:
        named = (_number(entry[2]) for entry in _table(root, "group") if entry[0] == group)
        own_group = next(named, -1)
    if not (0 <= number < _NO_ID and 0 <= own_group < _NO_ID):
        raise CheckFailed(
            f"the image's user {user[:200]!r} is not in its /etc/passwd or /etc/group",
            hint="name the user by number in the image's configuration",
        )
    return number, own_group


def _number(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 11 else -1


def _table(root: Path, name: str) -> list[list[str]]:
    """Return the rows of a file in the image's /etc; not if it is a link, which could leave it."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        etc = os.open(root / "etc", flags | os.O_DIRECTORY)
        try:
            with os.fdopen(os.open(name, flags, dir_fd=etc), "rb") as file:
                text = file.read(_LARGEST_TABLE).decode(errors="replace")
        finally:
            os.close(etc)
    except OSError:
        return []
    return [entry for line in text.splitlines() if len(entry := line.split(":")) >= 4]


def relocated(root: Path, words: Sequence[str]) -> tuple[str, ...]:
    """Return the words with every path of the root file system changed to its folder here.

    A path starts with a top-level folder of the root file system, at the start of the word or after
    `=` or `:`.
    """
    tops = {f"/{path.name}" for path in root.iterdir() if path.name not in {"dev", "proc", "sys"}}
    return tuple(_relocate(str(root), tops, word) for word in words)


def _relocate(root: str, tops: set[str], word: str) -> str:
    for separator in ("=", ":"):
        if separator in word:
            return separator.join(_relocate(root, tops, part) for part in word.split(separator))
    top = "/" + word[1:].partition("/")[0]
    return f"{root}{word}" if word.startswith("/") and top in tops else word


Mode = Literal["apart", "folder", "bare"]
"""In its own namespaces; with a folder as its root; or only as the calling user."""
_STACK = 8 << 20
"""Bytes of a thread's stack, by default."""
_THREADS = 32
"""Of a server, beside two for each CPU: llama.cpp's has seven, and one for each request at once."""
_CODE = (
    "import sys; sys.path.insert(0, sys.argv[1]);"
    " from weightsmith.outside.image_sandbox import main; main(int(sys.argv[2]))"
)


class NotAllowed(EnvironmentFailure):
    """Raised if this machine does not support this kind of sandbox; another kind may work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxedProgram:
    """An image's program and the root file system it is started in."""

    image: str
    root: Path
    argv: Sequence[str]
    env: Mapping[str, str]
    workdir: str
    program: str
    """Its name in the image; `argv` may have its path on this machine."""
    user: tuple[int, int]
    """User and group inside the sandbox."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relay:
    """A way into an isolated network: a listening socket outside, and the port inside."""

    listener: socket.socket
    port: int


@contextlib.contextmanager
def start_sandboxed(
    inside: SandboxedProgram, spec: StartSpec, mode: Mode, relay: Relay | None = None
) -> Iterator[tuple[process.Server, Facts]]:
    """Start the program and yield the facts about its sandbox; stop it when the context ends.

    Raises NotAllowed if this sandbox is not supported here, CheckFailed if the image cannot be
    started.
    """
    with contextlib.ExitStack() as open_files:
        # In memory, since a full TMPDIR would end the start without a name.
        settings = open_files.enter_context(os.fdopen(os.memfd_create("settings"), "w+b"))
        reading, writing = os.pipe()
        pipe = open_files.enter_context(os.fdopen(reading, "rb"))
        inherited = [settings.fileno(), writing, *([relay.listener.fileno()] if relay else ())]
        try:
            _write(settings, {**_settings(inside, spec, mode, relay), "tell": writing})
            # Not the image's environment: its variables would affect this Python's loader.
            command = [sys.executable, "-I", "-S", "-c", _CODE]
            command += [str(Path(__file__).parents[2]), str(settings.fileno()), str(inside.root)]
            limits = process.ResourceLimits(resident_bytes=_most_memory(spec), grouped=True)
            server = open_files.enter_context(
                process.start(command, env=process.scrubbed(), limits=limits, inherited=inherited)
            )
        finally:
            os.close(writing)
        yield server, _read_facts(inside, pipe.read(), server)


def _settings(
    inside: SandboxedProgram, spec: StartSpec, mode: Mode, relay: Relay | None
) -> dict[str, Any]:
    return {
        "way": mode,
        "root": str(inside.root),
        "home": os.path.expanduser("~"),  # noqa: PTH111 - never raises
        "argv": list(inside.argv),
        "env": dict(inside.env),
        "workdir": inside.workdir,
        "user": list(inside.user),
        "memory_bytes": _most_memory(spec),
        "shm_bytes": spec.shm_bytes,
        "gpu": spec.use_gpu,
        "relay": [relay.listener.fileno(), relay.port] if relay else None,
        "network": Path("/proc/self/ns/net").stat().st_ino,
    }


def _most_memory(spec: StartSpec) -> int:
    """Return the memory limit; 0 with a GPU, whose memory is mapped into the process."""
    return 0 if spec.use_gpu or not spec.memory_bytes else memory_limit(spec)


def memory_limit(spec: StartSpec) -> int:
    """Return the bytes that a server may write to, with room for its threads' stacks.

    The limit counts whole stacks, used or not, and servers start two threads for each CPU.
    """
    return spec.memory_bytes + _STACK * (2 * (os.cpu_count() or 1) + _THREADS)


def _write(file: IO[bytes], settings: Mapping[str, Any]) -> None:
    file.write(json.dumps(settings).encode())
    file.seek(0)


def _read_facts(inside: SandboxedProgram, pipe: bytes, server: process.Server) -> Facts:
    """Return the facts that the process reported before it executed the program."""
    lines = [json.loads(line) for line in pipe.splitlines()]
    problem = next((line for line in lines if "failed" in line), None)
    if problem is None and lines:
        return dict(lines[0])
    if problem is None:
        raise EnvironmentFailure(
            f"{inside.image} could not be started:\n{server.logs(5)}",
            hint="check whether this machine is out of memory or processes",
        )
    if problem["failed"] == "start":
        raise unstartable(inside.image, inside.program, problem["errno"], problem["why"])
    if problem["errno"] == errno.EAGAIN and (limited := too_many_processes(problem["why"])):
        raise limited  # a weaker sandbox would not help
    raise not_confined(inside.image, problem["why"])


def not_confined(image: str, why: str) -> NotAllowed:
    """Return the error for a start that would leave privileges to the image."""
    return NotAllowed(
        f"{image} was not started, because it would not be confined: {why}",
        hint="run as a user other than root, or start a container engine, which can confine it",
    )
