"""Starts the program of an image by way of `enclosure.py`, and hears from it what holds."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from weightsmith.drivers import process
from weightsmith.drivers.inventory import Facts
from weightsmith.drivers.starting import unstartable
from weightsmith.errors import EnvironmentFailure
from weightsmith.ports import StartSpec

Way = Literal["apart", "folder", "bare"]
"""In namespaces of its own; in a folder as its root; or as the user who asks."""
_CODE = (
    "import sys; sys.path.insert(0, sys.argv[1]);"
    " from weightsmith.drivers.enclosure import main; main(int(sys.argv[2]))"
)


class NotAllowed(EnvironmentFailure):
    """Raised where this machine does not let us start a program in that way; another may do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Enclosed:
    """A program of an image, and the place that it is started in."""

    image: str
    root: Path
    argv: Sequence[str]
    env: Mapping[str, str]
    workdir: str
    program: str
    """What it is called in the image; `argv` may have the path to it here."""
    user: tuple[int, int]
    """User and group, as the program sees them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relay:
    """A way into the network of a program that has none: a listening socket, and its port there."""

    listener: socket.socket
    port: int


@contextlib.contextmanager
def start_enclosed(
    inside: Enclosed, spec: StartSpec, way: Way, relay: Relay | None = None
) -> Iterator[tuple[process.Server, Facts]]:
    """Start the program, stopped with all its children when the context ends; yield what holds.

    Raises NotAllowed where this way is closed here, CheckFailed where the image cannot be started.
    """
    with contextlib.ExitStack() as open_files:
        settings = open_files.enter_context(tempfile.TemporaryFile())
        reading, writing = os.pipe()
        told = open_files.enter_context(os.fdopen(reading, "rb"))
        handing = [settings.fileno(), writing, *([relay.listener.fileno()] if relay else ())]
        try:
            _write(settings, {**_settings(inside, spec, way, relay), "tell": writing})
            # Not with the image's environment: its variables would rule the loader of this Python.
            command = [sys.executable, "-I", "-S", "-c", _CODE]
            command += [str(Path(__file__).parents[2]), str(settings.fileno()), str(inside.root)]
            server = open_files.enter_context(
                process.start(command, env=process.scrubbed(), handing=handing)
            )
        finally:
            os.close(writing)
        yield server, _heard(inside, told.read(), server)


def _settings(inside: Enclosed, spec: StartSpec, way: Way, relay: Relay | None) -> dict[str, Any]:
    return {
        "way": way,
        "parent": os.getpid(),
        "root": str(inside.root),
        "home": os.path.expanduser("~"),  # noqa: PTH111 - never raises
        "argv": list(inside.argv),
        "env": dict(inside.env),
        "workdir": inside.workdir,
        "user": list(inside.user),
        # A GPU's memory is mapped into the process, so no such limit would hold.
        "memory_bytes": 0 if spec.use_gpu else spec.memory_bytes,
        "shm_bytes": spec.shm_bytes,
        "gpu": spec.use_gpu,
        "relay": [relay.listener.fileno(), relay.port] if relay else None,
        "network": Path("/proc/self/ns/net").stat().st_ino,
    }


def _write(file: IO[bytes], settings: Mapping[str, Any]) -> None:
    file.write(json.dumps(settings).encode())
    file.seek(0)


def _heard(inside: Enclosed, told: bytes, server: process.Server) -> Facts:
    """Return what the program's process found; told is all that it said before it became it."""
    lines = [json.loads(line) for line in told.splitlines()]
    problem = next((line for line in lines if "failed" in line), None)
    if problem is None and lines:
        return dict(lines[0])
    if problem is None:
        raise EnvironmentFailure(
            f"{inside.image} could not be started:\n{server.logs(5)}",
            hint="see whether this machine runs out of memory or processes",
        )
    if problem["failed"] == "start":
        raise unstartable(inside.image, inside.program, problem["errno"], problem["why"])
    raise not_confined(inside.image, problem["why"])


def not_confined(image: str, why: str) -> NotAllowed:
    """Return the error for a start in which rights would be left to the image."""
    return NotAllowed(
        f"{image} was not started, since it would not be confined here: {why}",
        hint="run it as another user than root, or where a container engine answers: engines can "
        "confine what they start",
    )
