"""Starts an image without a container engine: its program on its own root file system.

`image_sandbox.py` is the sandbox; here is also read which of its limits hold.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from weightsmith.core.cpus import flags
from weightsmith.core.devices import Devices
from weightsmith.core.errors import CheckFailed, EnvironmentFailure, UsageError, too_many_processes
from weightsmith.core.ports import Endpoint, Launcher, StartSpec
from weightsmith.core.trees import give
from weightsmith.outside import process
from weightsmith.outside.hardware import devices, driver_libraries
from weightsmith.outside.image_sandbox import SandboxSettings
from weightsmith.outside.ownership import private_folder
from weightsmith.outside.privileges import NOBODY, Facts, is_root, words
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

    def devices(self, image: str) -> Devices:
        """Return this machine's."""
        del image
        return devices()

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
            info = replace(info, argv=(*info.argv, *spec.arguments))
            if spec.use_gpu:
                spec = replace(spec, env={**_lay_driver(root, info), **spec.env})
            if is_root():
                try:
                    give(root, NOBODY, NOBODY)
                except OSError as problem:  # root in a namespace without other users
                    raise not_confined(image, problem.strerror or str(problem)) from None
            with contextlib.ExitStack() as servers:
                try:
                    endpoint = _in_namespaces(image, root, info, spec, servers)
                except NotAllowed:
                    port = servers.enter_context(_reserved_port(spec))
                    moved = {spec.port_variable: str(port)} if spec.port_variable else {}
                    if spec.host_variable:
                        moved[spec.host_variable] = "127.0.0.1"
                    spec = replace(spec, env={**spec.env, **moved})
                    endpoint = _in_host_network(image, root, info, spec, port, servers)
                yield endpoint


_DRIVER = "/usr/local/nvidia/lib64"
"""Where images of CUDA look for the driver's libraries, which no image has."""


def _lay_driver(root: Path, info: StartInfo) -> Mapping[str, str]:
    """Copy this machine's GPU driver into the image's files; return how its programs find it."""
    if not (libraries := driver_libraries()):
        return {}
    folder = root
    for name in Path(_DRIVER).parts[1:]:
        folder /= name
        if folder.is_symlink() or not folder.is_dir():  # a link could lead out
            folder.unlink(missing_ok=True)
            folder.mkdir()
    for library in libraries:
        (folder / library.name).unlink(missing_ok=True)
        shutil.copyfile(library, folder / library.name)
    known = info.env.get("LD_LIBRARY_PATH", "")
    return {"LD_LIBRARY_PATH": f"{_DRIVER}:{known}" if known else _DRIVER}


def _in_namespaces(
    image: str, root: Path, info: StartInfo, spec: StartSpec, servers: contextlib.ExitStack
) -> Endpoint:
    """Start the server in its own namespaces, with a relay as the only way in."""
    with contextlib.ExitStack() as attempt:
        listener = attempt.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128))
        inside = replace(_settings(root, info, spec), relay=(listener.fileno(), spec.port))
        server, found = attempt.enter_context(start_sandboxed(image, info.argv[0], inside))
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
    inside = replace(_settings(root, info, spec), way="folder")
    if not is_root():
        env = dict(zip(inside.env, relocated(root, tuple(inside.env.values())), strict=True))
        argv = relocated(root, info.argv)
        inside = replace(inside, way="bare", argv=argv, env=env, workdir=str(root))
    server, found = servers.enter_context(start_sandboxed(image, info.argv[0], inside))
    again = partial(_in_host_network, image, root, info, spec, port, servers)
    return _endpoint(port, server, found, again)


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


def _settings(root: Path, info: StartInfo, spec: StartSpec) -> SandboxSettings:
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp"}  # noqa: S108 - inside
    return SandboxSettings(
        way="apart",
        root=str(root),
        home=os.path.expanduser("~"),  # noqa: PTH111 - never raises
        argv=info.argv,
        env={**environment, **info.env, **spec.env},
        workdir=info.workdir or "/",
        user=user_ids(root, info.user),
        # Not with a GPU, whose memory is mapped into the process.
        memory_bytes=memory_limit(spec) if spec.memory_bytes and not spec.use_gpu else 0,
        shm_bytes=spec.shm_bytes,
        gpu=spec.use_gpu,
        network=Path("/proc/self/ns/net").stat().st_ino,
    )


class EitherLauncher:
    """Starts layouts from their root file system, and other images in the container engine."""

    def __init__(self, engine: Launcher, layouts: Launcher) -> None:
        self._engine = engine
        self._layouts = layouts
        self.name = engine.name

    def serve(self, image: str, spec: StartSpec) -> AbstractContextManager[Endpoint]:
        """Start `image`."""
        return self._starting(image).serve(image, spec)

    def cpu_flags(self) -> frozenset[str] | None:
        """Return what the engine's CPU can do, None if unknown."""
        return self._engine.cpu_flags()

    def devices(self, image: str) -> Devices | None:
        """Return those of the launcher that starts `image`."""
        return self._starting(image).devices(image)

    def _starting(self, image: str) -> Launcher:
        return self._layouts if image.startswith(_SCHEME) else self._engine


def free_port() -> int:
    """Return a currently free loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _reserved_port(spec: StartSpec) -> Iterator[int]:
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


def user_ids(root: Path, user: str) -> tuple[int, int]:
    """Return user and group numbers of an image's user, looked up in the image's /etc.

    Raises CheckFailed for an unknown name or an invalid number.
    """
    name, _, group = user.partition(":")
    number, own_group = (int(name or "0"), 0) if (name or "0").isdecimal() else (-1, 0)
    for entry in _table(root, "passwd"):
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

    def moved(part: str) -> str:
        top = "/" + part[1:].partition("/")[0]
        return f"{root}{part}" if part.startswith("/") and top in tops else part

    return tuple("".join(map(moved, re.split("([=:])", word))) for word in words)


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


@contextlib.contextmanager
def start_sandboxed(
    image: str, program: str, settings: SandboxSettings
) -> Iterator[tuple[process.Server, Facts]]:
    """Start the program and yield the facts about its sandbox; stop it when the context ends.

    `program` is its name in the image; `argv` may have its path on this machine. Raises NotAllowed
    if this sandbox is not supported here, CheckFailed if the image cannot be started.
    """
    with contextlib.ExitStack() as open_files:
        # In memory, since a full TMPDIR would end the start without a name.
        given = open_files.enter_context(os.fdopen(os.memfd_create("settings"), "w+b"))
        reading, writing = os.pipe()
        pipe = open_files.enter_context(os.fdopen(reading, "rb"))
        inherited = [given.fileno(), writing, *([settings.relay[0]] if settings.relay else ())]
        try:
            given.write(json.dumps(asdict(replace(settings, tell=writing))).encode())
            given.seek(0)
            # Not the image's environment: its variables would affect this Python's loader.
            command = [sys.executable, "-I", "-S", "-c", _CODE]
            command += [str(Path(__file__).parents[2]), str(given.fileno()), settings.root]
            limits = process.ResourceLimits(resident_bytes=settings.memory_bytes, grouped=True)
            server = open_files.enter_context(
                process.start(command, env=process.scrubbed(), limits=limits, inherited=inherited)
            )
        finally:
            os.close(writing)
        # What the process reported before it executed the program.
        lines = [json.loads(line) for line in pipe.read().splitlines()]
        problem = next((line for line in lines if "failed" in line), None)
        if problem is None and not lines:
            raise EnvironmentFailure(
                f"{image} could not be started:\n{server.logs(5)}",
                hint="check whether this machine is out of memory or processes",
            )
        if problem is None:
            yield server, dict(lines[0])
        elif problem["failed"] == "start":
            raise unstartable(image, program, problem["errno"], problem["why"])
        elif problem["errno"] == errno.EAGAIN and (limited := too_many_processes(problem["why"])):
            raise limited  # a weaker sandbox would not help
        else:
            raise not_confined(image, problem["why"])


def memory_limit(spec: StartSpec) -> int:
    """Return the bytes that a server may write to, with room for its threads' stacks.

    The limit counts whole stacks, used or not, and servers start two threads for each CPU.
    """
    return spec.memory_bytes + _STACK * (2 * (os.cpu_count() or 1) + _THREADS)


def not_confined(image: str, why: str) -> NotAllowed:
    """Return the error for a start that would leave privileges to the image."""
    return NotAllowed(
        f"{image} was not started, because it would not be confined: {why}",
        hint="run as a user other than root, or start a container engine, which can confine it",
    )
