"""Starts an image's program in the sandbox of `image_sandbox.py`, and reads which limits hold."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from weightsmith.core.errors import EnvironmentFailure, too_many_processes
from weightsmith.core.ports import StartSpec
from weightsmith.outside import process
from weightsmith.outside.sandbox_facts import Facts
from weightsmith.outside.start_errors import unstartable

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
