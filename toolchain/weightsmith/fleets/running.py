"""Runs a graph on an engine: submits what is ready, collects replies, says how it stands.

A cell that ended with exit code 2, 3 or 4 would do so on every machine. One that ended with 5, or
whose node is lost, is tried on two more nodes, after 10 seconds and after a minute: without a
pause, every cell that begins while a cache restarts would use up its tries.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.files import write_folder
from weightsmith.core.ports import Ended, FleetEngine, NodeTask, Silent
from weightsmith.core.safe_parse import RECORD, parse
from weightsmith.core.values import JsonValue, canonical
from weightsmith.fleets.graph import FleetTask, Graph
from weightsmith.fleets.node import answer
from weightsmith.fleets.payloads import packed
from weightsmith.fleets.requests import CELL, DIFFERENT, Failure, TaskReply, TaskRequest, version
from weightsmith.fleets.rows import (
    ENDED,
    RUNNING,
    WAITING,
    CellRow,
    Changed,
    FleetRows,
    SharedRow,
    Spent,
    failed,
    of_reply,
)
from weightsmith.recipe.sources import is_remote
from weightsmith.steps.lock import Lock, write_lock
from weightsmith.steps.tools import Tools

_PAUSES = (10.0, 60.0)
"""Seconds before the second and the third try of a task that failed because of its machine.

So a cache or a registry that is started again, which takes a minute, ends no cell."""
_UPLOAD = 3600.0
"""Seconds that a shared task waits for its uploads."""
_TURN = 1.0
"""Seconds between two looks at what runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the user asked of every build."""

    outputs: Mapping[str, JsonValue]
    tools: Mapping[str, JsonValue]
    dist: Path
    token: str
    lock: Lock
    cpus: int = 0
    """CPUs for each task; 0 for what the plan says."""


@dataclass(slots=True)
class FleetRun:
    """One run of a graph; `go` runs it to its end."""

    graph: Graph
    order: Order
    engine: FleetEngine
    tools: Tools
    told: Sequence[Changed]
    _spent: Spent = field(default_factory=Spent)
    _rows: dict[str, CellRow | SharedRow] = field(default_factory=dict)
    _failures: dict[str, Failure] = field(default_factory=dict)
    """Of shared tasks: what those that wait for them fail with."""
    _done: set[str] = field(default_factory=set)
    _given: set[str] = field(default_factory=set)
    """Tasks that the engine has."""
    _avoid: dict[str, frozenset[str]] = field(default_factory=dict)
    """Task -> nodes on which it failed before."""
    _not_before: dict[str, float] = field(default_factory=dict)
    """Task -> when it may be tried again."""
    _began: float = field(default_factory=time.monotonic)
    _version: str = field(default_factory=version)
    _lock: Lock | None = None

    def go(self) -> FleetRows:
        """Run every task, and return what became of each cell.

        What is cached is finished here, without the engine. Raises EnvironmentFailure if the
        engine fails; an interrupt ends all tasks. What was finished is kept in either case.
        """
        for task in self.graph.tasks:
            if task.kind == CELL:
                row = CellRow(adapter=task.cells[0].adapter, target=task.cells[0].target)
                self._rows[task.id] = failed(row, task.failure) if task.failure else row
            else:
                self._rows[task.id] = SharedRow(
                    task=task.name, kind=task.kind, cells=len(task.cells)
                )
            if task.failure:
                self._done.add(task.id)
        self._tell()
        try:
            self._finish_cached()
            if not self._is_over():
                self.engine.check(self._version)
            while not self._is_over():
                self._submit()
                for ended in self.engine.wait(_TURN):
                    self._take(ended)
                self._say_what_runs()
        finally:
            try:
                self.engine.close()
            finally:
                if self._lock and self._lock != self.order.lock:
                    write_lock(self.order.lock, self._lock, self.tools.progress)
        self._tell()
        return self.rows()

    def rows(self) -> FleetRows:
        """Return how the fleet stands."""
        own = sum(os.times()[:2])
        return FleetRows(
            cells=tuple(row for row in self._rows.values() if isinstance(row, CellRow)),
            shared=tuple(row for row in self._rows.values() if isinstance(row, SharedRow)),
            bytes_moved=self._spent.bytes_moved + self.tools.moved(),
            cpu_seconds=round(own + self._spent.cpu_seconds, 3),
            own_cpu_seconds=round(own, 3),
            seconds=round(time.monotonic() - self._began, 3),
            stages={name: dict(row) for name, row in self._spent.stages.items()},
        )

    def _finish_cached(self) -> None:
        """Finish what needs no stage to be run: nothing is given to the engine for it."""
        for task in self.graph.shared:
            if task.cached:
                self._done.add(task.id)
                self._change(task, state=ENDED, cached=True)
        for task in self.graph.cells:
            if task.cached and task.id not in self._done:
                quiet = replace(self.tools, progress=Silent())
                reply = replace(answer(self._request(task), quiet), cpu_seconds=0.0)
                self._end(task, reply)

    def _change(self, task: FleetTask, **changes: str | bool | float | None) -> None:
        self._rows[task.id] = replace(self._rows[task.id], **changes)  # type: ignore[arg-type]

    def _is_over(self) -> bool:
        return all(task.id in self._done for task in self.graph.tasks)

    def _submit(self) -> None:
        """Give the engine every task whose predecessors have ended well."""
        works, now = [], time.monotonic()
        for task in self.graph.tasks:
            waits = self._not_before.get(task.id, now) > now
            if task.id in self._done or task.id in self._given or waits:
                continue
            if broken := [self._failures[key] for key in task.after if key in self._failures]:
                self._fail(task, broken[0])
                continue
            if not self._done.issuperset(task.after):
                continue
            try:
                works.append(self._work(task))
            except (UsageError, InputRefused) as error:  # what it names cannot go to a node
                self._fail(task, Failure.of(error))
                continue
            except EnvironmentFailure as error:  # the cache takes nothing now
                self._take_failure(task, TaskReply.of_failure(task.id, "", Failure.of(error)))
                continue
            self._given.add(task.id)
        if works:
            self.engine.submit(works)

    def _work(self, task: FleetTask) -> NodeTask:
        request, needs = self._request(task), task.needs
        if self.engine.remote:
            request = packed(request, self.tools, again=task.id in self._not_before)
            if task.kind != CELL:  # the cells find its results in the cache, or make them again
                request = replace(request, tools={**request.tools, "upload_seconds": _UPLOAD})
        return NodeTask(
            id=task.id,
            name=task.name,
            text=canonical(request).decode(),
            cpus=self.order.cpus or needs.cpus,
            memory_bytes=needs.memory_bytes,
            disk_bytes=needs.disk_bytes,
            gpus=needs.gpus,
            avoid=self._avoid.get(task.id, frozenset()),
        )

    def _request(self, task: FleetTask) -> TaskRequest:
        lock, outputs = self._lock or self.order.lock, dict(self.order.outputs)
        if outputs.get("layout"):  # of several, each has a folder of its own
            place = Path(str(outputs["layout"])) / task.build.adapter / task.targets[0].name
            outputs["layout"] = str(place)
        return TaskRequest(
            id=task.id,
            kind=task.kind,
            version=self._version,
            adapter=task.build.adapter,
            recipe=task.build.data,
            lock={"sources": lock.sources, "bases": lock.bases},
            targets=tuple(target.name for target in task.targets),
            stages=task.stages,
            questions=task.questions,
            outputs=outputs,
            tools={"memory": f"{task.needs.memory_bytes}B", **self.order.tools},
            dist=str(self.order.dist),
            token=self.order.token,
        )

    def _take(self, ended: Ended) -> None:
        """Take a task's reply; what failed because of its machine is tried elsewhere."""
        task = next(task for task in self.graph.tasks if task.id == ended.id)
        reply = _read(ended)
        failure = reply.error
        if failure and failure.message.startswith(DIFFERENT):
            raise EnvironmentFailure(failure.message, hint=failure.hint)
        if ended.node:
            self._avoid[task.id] = self._avoid.get(task.id, frozenset()) | {ended.node}
        if failure and failure.exit_code == 5:
            self._take_failure(task, reply)
        else:
            self._change(task, tries=self._rows[task.id].tries + 1)
            self._end(task, reply)

    def _take_failure(self, task: FleetTask, reply: TaskReply) -> None:
        """Let a task be tried again after a pause, unless it was tried often enough."""
        tries = self._rows[task.id].tries
        self._change(task, tries=tries + 1)
        if not self.engine.remote or tries >= len(_PAUSES):
            self._end(task, reply)
            return
        why, where = reply.error.message if reply.error else "", f" on {reply.node}"
        self.tools.progress.warn(
            f"{task.name}{where if reply.node else ''}: {why}; tried again in {_PAUSES[tries]:g} s"
        )
        self._spent.add(replace(reply, stages={}))
        self._given.discard(task.id)
        self._not_before[task.id] = time.monotonic() + _PAUSES[tries]
        self._change(task, state=WAITING)

    def _end(self, task: FleetTask, reply: TaskReply) -> None:
        self._spent.add(reply)
        self._done.add(task.id)
        # Later tasks use the same commits and base images.
        before, pinned = self._lock or self.order.lock, reply.lock
        sources = {n: row for n, row in pinned.get("sources", {}).items() if is_remote(n)}
        bases: dict[str, Any] = dict(before.bases)
        for name, platforms in pinned.get("bases", {}).items():
            bases[name] = {**platforms, **bases.get(name, {})}
        self._lock = replace(before, sources={**sources, **before.sources}, bases=bases)
        try:  # a node with a folder of its own has sent its reports: they go where the user's are
            reports = {name: base64.b64decode(text) for name, text in reply.files.items()}
            if reports:  # all at once: the disk is waited for once for each folder
                write_folder(self.order.dist, reports)
        except ValueError as error:
            self.tools.progress.warn(f"the reports of {reply.node} did not arrive whole: {error}")
        row, failure = self._rows[task.id], reply.error
        if isinstance(row, CellRow):
            row = of_reply(row, reply)
            if reply.files and row.report:  # it came back: it is below the folder of results now
                name = next((n for n in reply.files if row.report.endswith(n)), row.report)
                row = replace(row, report=str(self.order.dist / name))
            self._rows[task.id] = row
        else:
            self._change(
                task,
                state=ENDED,
                seconds=reply.seconds,
                cached=bool(reply.stages) and all(reply.stages.values()),
                node=reply.node,
                error=failure.message if failure else None,
            )
            if failure:
                self._failures[task.id] = failure
        self._tell()

    def _fail(self, task: FleetTask, failure: Failure) -> None:
        self._done.add(task.id)
        row = self._rows[task.id]
        if isinstance(row, CellRow):
            self._rows[task.id] = failed(row, failure)
        else:
            self._failures[task.id] = failure
            self._change(task, state=ENDED, error=failure.message)
        self._tell()

    def _say_what_runs(self) -> None:
        running, before = self.engine.running(), dict(self._rows)
        for task in self.graph.tasks:
            if task.id in self._given and task.id not in self._done:
                self._change(task, state=RUNNING if task.id in running else WAITING)
        if before != self._rows:
            self._tell()

    def _tell(self) -> None:
        rows = self.rows()
        for changed in self.told:
            changed(rows)


def _read(ended: Ended) -> TaskReply:
    """Return a task's reply; one that was lost, or says nothing that can be read, is a failure."""
    why = ended.why
    if ended.text:
        try:
            return TaskReply.from_json(parse(ended.text, largest=RECORD))
        except ValueError as error:
            why = f"its reply cannot be read: {error}"
    failure = Failure(message=why or "it ended without a reply", hint="", exit_code=5)
    return TaskReply.of_failure(ended.id, ended.node, failure)
