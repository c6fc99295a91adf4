"""A fleet on this machine: as many tasks at once as its CPUs, memory, disk and GPUs allow."""

from __future__ import annotations

import os
import queue
import shutil
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weightsmith.core.errors import WeightsmithError
from weightsmith.core.ports import Ended, NodeTask
from weightsmith.outside import process
from weightsmith.outside.hardware import free_memory
from weightsmith.outside.lines import RESULT

_LONGEST_NAME = 200
"""Characters; file systems take 255 bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a machine has for all tasks together; 0 bytes where it is not known."""

    cpus: int
    memory_bytes: int
    disk_bytes: int
    gpus: int

    def holds(self, works: Sequence[NodeTask]) -> bool:
        """Return whether these tasks fit at the same time."""
        kinds = ("cpus", "memory_bytes", "disk_bytes", "gpus")
        there = {kind: getattr(self, kind) for kind in kinds if getattr(self, kind)}
        return all(sum(getattr(work, kind) for work in works) <= n for kind, n in there.items())


def local_room(folder: Path) -> Room:
    """Return what this machine has free, on the disk of `folder`."""
    there = next(one for one in (folder, *folder.parents) if one.exists())
    return Room(
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=free_memory(),
        disk_bytes=shutil.disk_usage(there).free,
        gpus=len(list(Path("/proc/driver/nvidia/gpus").glob("*"))),
    )


@dataclass(slots=True)
class LocalFleet:
    """Runs each task as a process; the first in the queue that fits is started first."""

    argv: Sequence[str]
    """The program of a node: it reads a request and prints a reply."""
    room: Room
    logs: Path
    """Folder for what the tasks print on standard error."""
    name: str = "local"
    remote: bool = False
    _queue: list[NodeTask] = field(default_factory=list)
    _running: dict[str, NodeTask] = field(default_factory=dict)
    _threads: list[threading.Thread] = field(default_factory=list)
    _ended: queue.SimpleQueue[Ended] = field(default_factory=queue.SimpleQueue)
    _stop: int = field(default_factory=lambda: os.eventfd(0))

    def check(self, version: str) -> None:
        """Do nothing: this machine is here and has this version."""

    def submit(self, works: Sequence[NodeTask]) -> None:
        """Queue tasks, and start what fits."""
        self._queue += works
        self._start()

    def wait(self, seconds: float) -> Sequence[Ended]:
        """Return the tasks that have ended since; wait for one at most so many seconds."""
        try:
            found = [self._ended.get(timeout=seconds)]
        except queue.Empty:
            return ()
        while not self._ended.empty():
            found.append(self._ended.get())
        for ended in found:
            self._running.pop(ended.id, None)
        self._start()
        return found

    def running(self) -> frozenset[str]:
        """Return the ids of the tasks that have a process."""
        return frozenset(self._running)

    def close(self) -> None:
        """End every process, with time to clean up, and wait for it."""
        self._queue.clear()
        if self._stop < 0:
            return
        if self._running:
            os.eventfd_write(self._stop, 1)
        for thread in self._threads:
            thread.join()
        os.close(self._stop)
        self._stop = -1

    def _start(self) -> None:
        for work in list(self._queue):
            if self._running and not self.room.holds([*self._running.values(), work]):
                continue
            self._queue.remove(work)
            self._running[work.id] = work
            thread = threading.Thread(target=self._run, args=(work,), daemon=True)
            self._threads = [one for one in self._threads if one.is_alive()] + [thread]
            thread.start()

    def _run(self, work: NodeTask) -> None:
        replies: list[str] = []
        why = ""
        # Of a base with a long path, the end of it.
        name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in work.name)
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            path = self.logs / f"{name[-_LONGEST_NAME:]}.log"
            with path.open("a", encoding="utf-8", buffering=1) as log:
                done = process.run(
                    self.argv,
                    env=dict(os.environ),
                    input=work.text.encode(),
                    on_line=replies.append,
                    on_error_line=lambda line: print(line, file=log),
                    longest_line=RESULT,
                    stop=self._stop,
                )
            if not replies:
                last = next((line for line in reversed(done.tail) if line.strip()), "")
                why = f"it ended with {process.describe_exit(done.returncode)}: {last}"
        except InterruptedError:
            why = "it was ended"
        except (WeightsmithError, OSError) as error:  # whatever it is, somebody waits for the task
            why = str(error)
        text = replies[-1] if replies else ""
        self._ended.put(Ended(id=work.id, node=socket.gethostname(), text=text, why=why))
