"""Runs operations that are killed at a chosen moment, which neither clock nor chance decides.

A moment is something that the operation does to the world outside it: a file opened, renamed or
locked, a connection made, a piece sent or received. One process loads everything once, and does
each operation in a child of its own that sends itself the signal at the n-th moment.
"""

import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from tests.paths import ROOT

_SEEN = {
    *("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.utime"),
    *("os.scandir", "os.symlink", "fcntl.flock", "socket.connect"),
}


class Moments:
    """A process that does operations, each in a child that can be killed."""

    def __init__(self, folder: Path) -> None:
        paths = f"{ROOT / 'toolchain'}:{ROOT}"
        environment = {**os.environ, "PYTHONPATH": paths, "WEIGHTSMITH_HOME": str(folder)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.moments"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def count(self, operation: str, **words: Any) -> int:
        code, moments = self._do(operation, words, 0, 0)
        assert code == 0, f"{operation}: exit code {code}"
        return moments

    def end_at(self, moment: int, number: int, operation: str, **words: Any) -> int:
        return self._do(operation, words, moment, number)[0]

    def with_files(self, spare: int, operation: str, **words: Any) -> int:
        """Do an operation that may open so many files more at once; return its exit code."""
        return self._do(operation, words, 0, spare)[0]

    def _do(self, operation: str, words: Mapping[str, Any], at: int, number: int) -> list[int]:
        self._process.stdin.write(json.dumps([operation, words, at, number]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextmanager
def killed_at(moment: int, number: int) -> Iterator[Callable[[], int]]:
    """Send this process a signal at a moment; yield what says how many there were."""
    seen, lock = 0, threading.Lock()

    def happens() -> None:
        nonlocal seen
        with lock:
            seen += 1
            now = seen
        if now == moment:
            os.kill(os.getpid(), number)

    def heard(event: str, words: tuple[object, ...]) -> None:
        # Python's own files, opened when something is first imported, are no part of it.
        if event in _SEEN and not str(words[0]).endswith((".py", ".pyc")):
            happens()

    class Watched(socket.socket):
        def send(self, *words: Any) -> int:
            happens()
            return super().send(*words)

        def sendall(self, *words: Any) -> None:
            happens()
            super().sendall(*words)

        def recv(self, *words: Any) -> bytes:
            happens()
            return super().recv(*words)

    socket.socket = Watched  # type: ignore[misc]
    sys.addaudithook(heard)
    yield lambda: seen


def push(layout: str, to: str) -> None:
    from weightsmith.api.commands.images import copy_image
    from weightsmith.building.wiring import make_registry
    from weightsmith.core.ports import Silent

    with make_registry() as registry:
        _spare_no_more()
        copy_image(f"oci:{layout}", to, registry, Silent(), force=True)


def publish(source: str, layout: str, swap: bool) -> None:
    """Give a layout its image, as `build` does after the image has passed."""
    from weightsmith.oci.layout import read_layout
    from weightsmith.provenance.evidence import Evidence
    from weightsmith.steps import outputs
    from weightsmith.steps.outputs import ImageOutputs, deliver

    from tests.fakes.memory import memory_tools

    if not swap:
        outputs.exchange = lambda *_: False  # type: ignore[assignment]
    image = read_layout(Path(source))
    _spare_no_more()
    tools = memory_tools(Path(layout).parent)
    deliver(image, "x:1", ImageOutputs(layout=Path(layout)), [Evidence()], tools)


def pull(source: str, layout: str, root: str) -> None:
    """Bring an image from a registry: into a layout, and unpacked below a cache."""
    from weightsmith.building.wiring import make_registry
    from weightsmith.oci.layout import write_layout
    from weightsmith.oci.references import Reference
    from weightsmith.oci.unpack import unpack
    from weightsmith.outside.ownership import private_folder

    with make_registry() as registry:
        image = registry.pull(Reference.parse(source), platform="linux/amd64")
        write_layout(image, Path(layout))
        with private_folder(Path(root)) as folder:
            unpack(image, folder / "root")


def load(source: str, name: str) -> None:
    """Load an image into the container engine, as `build --load` does."""
    from dataclasses import replace

    from weightsmith.oci import layout
    from weightsmith.oci.layout import read_layout
    from weightsmith.outside.docker import DockerEngine
    from weightsmith.provenance.evidence import Evidence
    from weightsmith.steps.outputs import ImageOutputs, deliver

    from tests.fakes.memory import memory_tools

    layout._LARGE = 1  # type: ignore[misc]
    tools = replace(memory_tools(Path(source).parent), engine=DockerEngine())
    deliver(read_layout(Path(source)), name, ImageOutputs(load=True), [Evidence()], tools)


def merge(folder: str) -> None:
    from weightsmith.api.commands.merge import merge_folders
    from weightsmith.api.commands.requests import MergeCommand

    from tests.fakes.memory import memory_tools
    from tests.fakes.tiny import write_adapter, write_model

    work = Path(folder)
    if not (work / "base").exists():
        write_model(work / "base")
        write_adapter(work / "a", seed=1)
    asked = MergeCommand(base=str(work / "base"), adapters=(str(work / "a"),), out=work / "out")
    _spare_no_more()
    merge_folders(asked, memory_tools(work))


_OPERATIONS = {each.__name__: each for each in (push, publish, pull, load, merge)}
_spare = 0


def _spare_no_more() -> None:
    """Let this process open as many more files as the test gives it."""
    if _spare:
        unused = os.dup(0)
        os.close(unused)
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (unused + _spare, most))


def _serve() -> None:
    for name in ("docker", "weightsmith.api.commands.images", "weightsmith.api.commands.merge"):
        import_module(name)  # each child would do that anew, which takes most of its time
    import tests.fakes.memory  # noqa: F401 - the same

    gc.freeze()
    for line in sys.stdin:
        operation, words, moment, number = json.loads(line)
        ours, theirs = os.pipe()
        child = os.fork()
        if not child:
            _act(operation, words, moment, number, theirs)
        os.close(theirs)
        with os.fdopen(ours, "rb") as told:
            moments = int(told.read() or b"0")
        _, status = os.waitpid(child, 0)
        sys.stdout.write(json.dumps([os.waitstatus_to_exitcode(status), moments]) + "\n")
        sys.stdout.flush()


def _act(operation: str, words: Mapping[str, Any], moment: int, number: int, tell: int) -> None:
    """Do an operation and end: with 130 after SIGTERM, as every command does."""
    from weightsmith.cli.command import _guarded
    from weightsmith.core.errors import WeightsmithError

    global _spare
    code, _spare = 1, 0 if moment else number
    os.fsync = lambda _: None  # type: ignore[assignment]  # what it is for is no killed process
    try:
        with killed_at(moment, number) as moments:
            _guarded(_OPERATIONS[operation], dict(words))
        os.write(tell, str(moments()).encode())
        code = 0
    except KeyboardInterrupt:
        code = 130
    except WeightsmithError as error:
        code = error.exit_code if error.hint else 99
        sys.stderr.write(f"{error.message}; {error.hint}\n")
    except BaseException:  # noqa: BLE001 - told on standard error
        sys.excepthook(*sys.exc_info())
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os._exit(code)


if __name__ == "__main__":
    _serve()
