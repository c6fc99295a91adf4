"""What a run of a fleet keeps of its replies."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from weightsmith.core.ports import Ended, NodeTask
from weightsmith.core.values import canonical
from weightsmith.fleets.cells import AdapterBuild, Cell
from weightsmith.fleets.graph import FleetTask, Graph, Needs
from weightsmith.fleets.requests import CELL, CellSummary, TaskReply
from weightsmith.fleets.running import FleetRun, Order
from weightsmith.steps.lock import Lock

REPORT = 300_000
CELLS = 60


class Elsewhere:
    """An engine whose nodes send their reports back."""

    remote = False

    def __init__(self) -> None:
        self.works: list[NodeTask] = []

    def check(self, _version: str) -> None: ...

    def submit(self, works: Sequence[NodeTask]) -> None:
        self.works += works

    def wait(self, _seconds: float) -> Sequence[Ended]:
        work = self.works.pop()
        reply = TaskReply(
            id=work.id,
            node="far",
            seconds=2.0,
            cpu_seconds=1.5,
            row=CellSummary(verdict="passed"),
            stages={"merge": False, "publish": True},
            bytes_moved=7,
            files={f"{work.id}/report.html": "A" * REPORT},
        )
        return [Ended(id=work.id, node="far", text=canonical(reply).decode())]

    def running(self) -> frozenset[str]:
        return frozenset()

    def close(self) -> None: ...


def cell(number: int) -> FleetTask:
    target: Any = SimpleNamespace(name="llamacpp-q4_k_m")
    file: Any = None
    build = AdapterBuild(adapter=f"a{number}", data={}, file=file, targets=(target,))
    return FleetTask(
        id=f"{number:012x}",
        kind=CELL,
        build=build,
        targets=(target,),
        cells=(Cell(adapter=build.adapter, target=target.name),),
        after=(),
        needs=Needs(cpus=1, memory_bytes=1, disk_bytes=1, gpus=0),
        cached=False,
        rows=(),
    )


def test_reports_of_nodes_are_written_and_not_kept_in_memory(tmp_path: Path) -> None:
    tools: Any = SimpleNamespace(progress=None, moved=lambda: 0)
    order = Order(outputs={}, tools={}, dist=tmp_path, token="t", lock=Lock(path=None))
    graph = Graph(tasks=tuple(map(cell, range(CELLS))))
    run = FleetRun(graph, order, Elsewhere(), tools, [])

    tracemalloc.start()
    try:
        rows = run.go()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 20 * REPORT < CELLS * REPORT
    assert len([*tmp_path.glob("*/report.html")]) == CELLS
    assert rows.stages == {
        "merge": {"run": CELLS, "cached": 0},
        "publish": {"run": 0, "cached": CELLS},
    }
    assert rows.bytes_moved == 7 * CELLS
    assert rows.cpu_seconds >= 1.5 * CELLS
