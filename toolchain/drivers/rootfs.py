"""Starts an image without a container engine: its own programs on its own root file system."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from toolchain.drivers import process
from toolchain.drivers.ownership import private_folder
from toolchain.errors import EnvironmentFailure, UsageError
from toolchain.ports import Endpoint, Launcher, StartSpec

_SCHEME = "oci:"


@dataclass(frozen=True, slots=True, kw_only=True)
class StartInfo:
    """What an image's configuration says of starting it."""

    argv: tuple[str, ...]
    """Entrypoint and command together."""
    env: Mapping[str, str]
    workdir: str = "/"
    user: str = ""
    """`user[:group]`, by name or number, as in the configuration; empty for root."""


Unpack = Callable[[str, Path], StartInfo]
"""Unpacks the image in a layout folder (first argument, without `oci:`) into an empty folder."""


class RootfsLauncher:
    """Starts an image that lies in an OCI layout folder, with no engine.

    The root file system is unpacked to a folder below `cache` and entered: by root as the image's
    own user, by others in a user namespace. Where the kernel allows neither, the program is
    started directly, with the paths in its arguments and environment pointed into the folder;
    only programs that need no libraries of the image work that way. It has a network of its own
    with a relay as the one way in; where the kernel does not allow that it shares the host's, and
    the server is moved to a free loopback port by the variable that `spec.port_variable` names.
    """

    name = "rootfs"

    def __init__(self, unpack: Unpack, cache: Path) -> None:
        self._unpack = unpack
        self._cache = cache

    @contextlib.contextmanager
    def serve(self, image: str, spec: StartSpec) -> Iterator[Endpoint]:
        """Start `image` (`oci:DIR`), stop it and delete its files when the context ends.

        Waits for nothing: the caller asks the server's health. Raises UsageError for another kind
        of reference, EnvironmentFailure where the program cannot be started.
        """
        if not image.startswith(_SCHEME):
            raise UsageError(
                f"{image!r} cannot be started without a container engine",
                hint="start an engine, or give the image as oci:DIR",
            )
        # Below the cache, where what a killed process leaves is found and deleted.
        with private_folder(self._cache) as folder:
            root = folder / "root"
            root.mkdir()
            # Other users must get in: the image's user is one of them.
            root.chmod(0o755)
            info = self._unpack(image.removeprefix(_SCHEME), root)
            if not info.argv:
                raise EnvironmentFailure(
                    f"{image} names no program to start", hint="bake it again, with an entrypoint"
                )
            with contextlib.ExitStack() as servers:
                if process.can_leave_network() and process.can_enter_root(root):
                    yield _relayed(root, info, spec, servers)
                    return
                port = servers.enter_context(_port(spec))
                moved = {spec.port_variable: str(port)} if spec.port_variable else {}
                if spec.host_variable:
                    moved[spec.host_variable] = "127.0.0.1"
                yield _served(root, info, replace(spec, env={**spec.env, **moved}), port, servers)


def _relayed(
    root: Path, info: StartInfo, spec: StartSpec, servers: contextlib.ExitStack
) -> Endpoint:
    """Start the server in a network of its own, with a relay as the one way in."""
    listener = servers.enter_context(socket.socket())
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    relay = process.Relay(listener=listener, port=spec.port)
    server = servers.enter_context(_started(root, info, spec, relay))
    return Endpoint(
        url=f"http://127.0.0.1:{listener.getsockname()[1]}",
        logs=server.logs,
        alive=server.alive,
        stop=server.stop,
        restart=lambda: _relayed(root, info, spec, servers),
        confinement=_confinement(root, info, spec, "no network"),
    )


def _confinement(root: Path, info: StartInfo, spec: StartSpec, network: str) -> tuple[str, ...]:
    found = (
        f"user {info.user or 'root'}" if process.can_enter_root(root) else "",
        "read-only root" if process.is_sealed_root(root) else "",
        network,
        f"{spec.memory_bytes / 2**20:.0f} MiB of memory" if spec.memory_bytes else "",
    )
    return tuple(word for word in found if word)


def _served(
    root: Path, info: StartInfo, spec: StartSpec, port: int, servers: contextlib.ExitStack
) -> Endpoint:
    """Start the server, to be ended with the stack, and return where it answers."""
    server = servers.enter_context(_started(root, info, spec))
    return Endpoint(
        url=f"http://127.0.0.1:{port}",
        logs=server.logs,
        alive=server.alive,
        stop=server.stop,
        restart=lambda: _served(root, info, spec, port, servers),
        confinement=_confinement(root, info, spec, ""),
    )


class EitherLauncher:
    """Starts layouts from their own root file system, and all else in the container engine."""

    def __init__(self, engine: Launcher, layouts: Launcher) -> None:
        self._engine = engine
        self._layouts = layouts
        self.name = engine.name

    def serve(self, image: str, spec: StartSpec) -> AbstractContextManager[Endpoint]:
        """Start `image` where it is."""
        launcher = self._layouts if image.startswith(_SCHEME) else self._engine
        return launcher.serve(image, spec)


def free_port() -> int:
    """Return a loopback port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _port(spec: StartSpec) -> Iterator[int]:
    """Yield the port to serve on, kept from other builds until the block ends.

    Between finding it free and the server's taking it lies a moment, and servers that share ports
    would even answer each other's questions.
    """
    while spec.port_variable:
        port = free_port()
        # A name in the abstract namespace, which is the ports' own: gone when we are.
        with socket.socket(socket.AF_UNIX) as mark:
            try:
                mark.bind(f"\0weightsmith-port-{port}")
            except OSError:
                continue
            yield port
            return
    yield spec.port


@contextlib.contextmanager
def _started(
    root: Path, info: StartInfo, spec: StartSpec, relay: process.Relay | None = None
) -> Iterator[process.Server]:
    memory = 0 if spec.use_gpu else spec.memory_bytes
    limits = process.Limits(memory_bytes=memory, network=relay is None)
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp"}  # noqa: S108 - inside
    environment |= {**info.env, **spec.env}
    if process.can_enter_root(root):
        user, group = user_ids(root, info.user)
        inside = process.Root(folder=root, user=user, group=group, workdir=info.workdir or "/")
        with process.start(
            info.argv, env=environment, limits=limits, root=inside, relay=relay
        ) as server:
            yield server
        return
    argv = pointed_into(root, info.argv)
    env = dict(zip(environment, pointed_into(root, tuple(environment.values())), strict=True))
    with process.start(argv, cwd=root, env=env, limits=limits) as server:
        yield server


def user_ids(root: Path, user: str) -> tuple[int, int]:
    """Return user and group numbers of an image's user, looked up in its own /etc.

    Raises EnvironmentFailure for a name that the image does not know.
    """
    name, _, group = user.partition(":")
    known = _table(root / "etc" / "passwd")
    number, own_group = (int(name or "0"), 0) if (name or "0").isdecimal() else (-1, 0)
    for entry in known:
        if name == entry[0] or (number >= 0 and entry[2] == str(number)):
            number, own_group = int(entry[2]), int(entry[3])
            break
    if group.isdecimal():
        own_group = int(group)
    elif group:
        own_group = next((int(e[2]) for e in _table(root / "etc" / "group") if e[0] == group), -1)
    if number < 0 or own_group < 0:
        raise EnvironmentFailure(
            f"the image's user {user!r} is not in its /etc/passwd or /etc/group",
            hint="name the user by number in the image's configuration",
        )
    return number, own_group


def _table(path: Path) -> list[list[str]]:
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError:
        return []
    return [entry for line in text.splitlines() if len(entry := line.split(":")) >= 4]


def pointed_into(root: Path, words: Sequence[str]) -> tuple[str, ...]:
    """Return the words with every path of the root file system pointed into its folder.

    A word is such a path where it begins, alone or after `=` or `:`, with a top-level folder of
    the root file system.
    """
    tops = {f"/{path.name}" for path in root.iterdir() if path.name not in {"dev", "proc", "sys"}}
    return tuple(_pointed(str(root), tops, word) for word in words)


def _pointed(root: str, tops: set[str], word: str) -> str:
    for separator in ("=", ":"):
        if separator in word:
            return separator.join(_pointed(root, tops, part) for part in word.split(separator))
    top = "/" + word[1:].partition("/")[0]
    return f"{root}{word}" if word.startswith("/") and top in tops else word
