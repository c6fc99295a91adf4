"""Fleets of a user's folder in memory: their engine, a file, and a run of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.ports import Ended, NodeTask
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import canonical
from weightsmith.fleets.node import answer
from weightsmith.fleets.ordering import foreseen, ordered, run_fleet
from weightsmith.fleets.requests import TaskRequest
from weightsmith.fleets.rows import FleetRows
from weightsmith.steps.tools import Tools

from tests.fakes.memory import Memory


def by_tools(tools: Tools) -> Callable[[str], str]:
    return lambda text: canonical(answer(TaskRequest.from_json(parse(text)), tools)).decode()


@dataclass
class MemoryFleet:
    """An engine of two nodes; one task is done each time that somebody waits."""

    do: Callable[[str], str]
    """Takes a request, and returns the reply."""
    remote: bool = False
    name: str = "memory"
    nodes: tuple[str, ...] = ("one", "two")
    lost: list[str] = field(default_factory=list)
    """Names of tasks whose node is lost the next time they run."""
    done: list[str] = field(default_factory=list)
    """Names of the tasks that ran, in order."""
    placed: list[tuple[str, str]] = field(default_factory=list)
    """Tasks with their nodes."""
    closed: bool = False
    faults: dict[str, BaseException] = field(default_factory=dict)
    """Name of a task -> what is raised where it would run, such as an interrupt."""
    _queue: list[NodeTask] = field(default_factory=list)

    def check(self, version: str) -> None:
        if not self.nodes:
            raise EnvironmentFailure("no node is there", hint="start one")

    def submit(self, works: Sequence[NodeTask]) -> None:
        self._queue += works

    def wait(self, seconds: float) -> Sequence[Ended]:
        if not self._queue:
            return ()
        work = self._queue.pop(0)
        if work.name in self.faults:
            raise self.faults.pop(work.name)
        node = next((name for name in self.nodes if name not in work.avoid), self.nodes[0])
        self.placed.append((work.name, node))
        if work.name in self.lost:
            self.lost.remove(work.name)
            return [Ended(id=work.id, node=node, text="", why="its node was lost")]
        self.done.append(work.name)
        return [Ended(id=work.id, node=node, text=self.do(work.text))]

    def running(self) -> frozenset[str]:
        return frozenset(work.id for work in self._queue[:1])

    def close(self) -> None:
        self.closed = True
        self._queue.clear()


Q4, Q5 = "llamacpp-q4_k_m", "llamacpp-q5_k_m"
GOOD = "not proven"
"""The verdict of all that goes well: eight questions prove little."""


def write_fleet(memory: Memory, **changes: Any) -> Path:
    """Write fleet.yaml: both adapters, each with its own questions, for two targets."""
    fleet = {
        "recipe": "recipe.yaml",
        "adapters": ["./a", {"source": "./b", "evaluate": {"data": "b.jsonl"}}],
        "targets": [Q4, Q5],
        **changes,
    }
    path = memory.home / "fleet.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in fleet.items() if value}))
    return path


def run(
    memory: Memory, path: Path, engine: MemoryFleet | None = None, **choices: Any
) -> tuple[FleetRows, MemoryFleet]:
    """Run a fleet with the tools of a test; its journal then tells of this run alone."""
    memory.journal.events.clear()
    memory.runner.jobs.clear()
    engine = engine or MemoryFleet(by_tools(memory.tools))
    outputs, tools = choices.pop("outputs", {}), choices.pop("tools", memory.tools)
    fleet = ordered(path, **choices)
    graph = foreseen(fleet, memory.dist, tools)
    rows = run_fleet(
        fleet, graph, engine, tools,
        dist=memory.dist, outputs=outputs, options={}, cpus=0, changed=lambda _: None,
    )  # fmt: skip
    return rows, engine


def facts(rows: FleetRows) -> list[tuple[str, str, str]]:
    return [(row.adapter, row.target, row.verdict) for row in rows.cells]
