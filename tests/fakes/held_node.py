"""A node's program for tests of clusters: `python -m tests.fakes.held_node`.

With words, such as `fleet --file …`, it is the command line, whose nodes are such programs; what
failed because of its machine is tried again at once.

A node does every task as any node does. But where the folder of the clusters has the file `hold`,
with a node's name and `merge` or `push`, that node stays in the middle of its next one of these,
until it is killed or the file `go` is there. A hold is for one node, once: `held` is then its
process.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

FOLDER = "WEIGHTSMITH_TEST_CLUSTERS_FOLDER"
ANY = "any"
_PATIENCE = 600.0


def hold(what: str) -> None:
    """Stay here, if somebody wants that of this node."""
    folder = Path(os.environ[FOLDER])
    number = (os.environ.get("SLURMD_NODENAME") or os.environ["WEIGHTSMITH_STORE"])[-1]
    try:
        node, wanted = (folder / "hold").read_text().split()
        if wanted != what or node not in (ANY, number):
            return
        (folder / "hold").rename(folder / "taken")  # by one of those who see it
    except (OSError, ValueError):
        return
    (folder / "part").write_text(str(os.getpid()))
    (folder / "part").rename(folder / "held")
    until = time.monotonic() + _PATIENCE
    while not (folder / "go").exists() and time.monotonic() < until:
        time.sleep(0.1)


def _held_runner(run: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(run)
    def held(self: object, job: Any, progress: Any, **more: Any) -> Any:
        done = run(self, job, progress, **more)
        if type(job).__name__ == "MergeJob":
            hold("merge")  # its files are there, and not yet a result
        return done

    return held


def _held_send(send: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(send)
    def held(session: Any, blob: Any, body: Callable[[], Iterator[bytes]], *rest: Any) -> Any:
        def chunks() -> Iterator[bytes]:
            for chunk in body():
                yield chunk[:1000]
                if not session.base.endswith("cache/"):
                    hold("push")
                yield chunk[1000:]

        return send(session, blob, chunks, *rest)

    return held


def main() -> int:
    """Do a task, with stores of this node's own."""
    if name := os.environ.get("SLURMD_NODENAME"):
        os.environ["WEIGHTSMITH_STORE"] = f"{os.environ[FOLDER]}/store-{name}"
    from weightsmith.fleets import node_program as node
    from weightsmith.oci import transfers
    from weightsmith.outside.local import LocalRunner

    LocalRunner.run = _held_runner(LocalRunner.run)  # type: ignore[method-assign]
    transfers.send = _held_send(transfers.send)
    return node.main()


def command_line() -> None:
    from weightsmith.building import wiring
    from weightsmith.cli import program
    from weightsmith.fleets import running

    wiring.NODE = (sys.executable, "-m", "tests.fakes.held_node")
    running._PAUSES = (1.0, 1.0)
    program.main()


if __name__ == "__main__":
    sys.exit(command_line() if sys.argv[1:] else main())
