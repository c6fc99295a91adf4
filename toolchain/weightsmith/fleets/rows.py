"""What became of each cell and each shared task, and of the fleet as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from weightsmith.building.pipeline import ASSEMBLY
from weightsmith.core.errors import CheckFailed, EnvironmentFailure, WeightsmithError
from weightsmith.core.json_objects import OMITTED, JsonObject
from weightsmith.fleets.requests import CellSuite, CellSummary, Failure, TaskReply

REFUSED, NOT_MADE = "refused", "not made"
WAITING, RUNNING, ENDED = "waiting", "running", "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class CellRow(JsonObject):
    """One cell of the fleet's table."""

    adapter: str
    target: str
    verdict: str = ""
    """`passed`, `not proven`, `refused` or `not made`; empty until it has ended."""
    score: float | None = None
    """From 0 to 1; null without questions."""
    answered: str = ""
    """Whose score it is: `image` or, where that was not started, `dequantized` (its weights in
    transformers)."""
    digest: str | None = None
    seconds: float = 0.0
    cached: bool = False
    """Whether nothing had to be made: assembling and publishing may have been left."""
    error: str | None = None
    hint: str | None = None
    exit_code: int = 0
    interval: tuple[float, ...] | None = None
    """95 %, of the score."""
    drop: float | None = None
    """Loss of score against base and adapter."""
    suites: tuple[CellSuite, ...] = field(default=(), metadata=OMITTED)
    """Every suite, if there are several; `score` and `drop` are the first one's."""
    size: int | None = None
    """Bytes of the weights."""
    image: str = ""
    """Its reference, or `oci:FOLDER`."""
    report: str = ""
    """Path of its report.html."""
    node: str = ""
    tries: int = 0
    state: str = WAITING


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRow(JsonObject):
    """One task that several cells wait for."""

    task: str
    kind: str
    cells: int
    cached: bool = False
    seconds: float = 0.0
    error: str | None = None
    node: str = ""
    tries: int = 0
    state: str = WAITING


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetRows(JsonObject):
    """The fleet as it stands."""

    cells: tuple[CellRow, ...]
    shared: tuple[SharedRow, ...]
    bytes_moved: int = 0
    """Sent to registries, and to and from the shared cache."""
    cpu_seconds: float = 0.0
    """Of all tasks, and of the fleet's own process."""
    own_cpu_seconds: float = 0.0
    """Of the fleet's own process: planning, pages, and what was cached."""
    seconds: float = 0.0
    stages: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Stage -> how often it was `run` and how often it was `cached`."""

    @property
    def ended(self) -> int:
        """How many cells have ended."""
        return sum(row.state == ENDED for row in self.cells)

    @property
    def share_cached(self) -> float:
        """Share of the stages that did not have to be run, from 0 to 1."""
        run = sum(count.get("run", 0) for count in self.stages.values())
        cached = sum(count.get("cached", 0) for count in self.stages.values())
        return cached / (run + cached) if run + cached else 0.0

    def error(self) -> WeightsmithError | None:
        """Return what the command ends with: None if every cell passed or was published."""
        made = [row for row in self.cells if row.verdict == NOT_MADE]
        refused = [row for row in self.cells if row.verdict == REFUSED]
        if not made and not refused:
            return None
        said = [f"{len(made)} could not be made"] if made else []
        said += [f"{len(refused)} refused"] if refused else []
        first = (made or refused)[0]
        text = (
            f"of {len(self.cells)} cells, {' and '.join(said)}; {first.adapter} x {first.target}: "
            f"{first.error}"
        )
        hint = first.hint or "the page of the fleet has every reason"
        kind = EnvironmentFailure if made else CheckFailed
        return kind(text, hint=hint, details=self.to_json())


Changed = Callable[[FleetRows], None]
"""Is told how the fleet stands, whenever that changes."""


def of_reply(row: CellRow, reply: TaskReply) -> CellRow:
    """Return a cell's row with what its build replied."""
    built = reply.row or CellSummary()
    found = replace(
        row,
        state=ENDED,
        verdict=built.verdict,
        score=built.score,
        answered=built.answered,
        digest=built.digest,
        seconds=row.seconds + reply.seconds,
        cached=bool(reply.stages)
        and all(was for name, was in reply.stages.items() if name not in ASSEMBLY),
        interval=built.interval,
        drop=built.drop,
        suites=built.suites,
        size=built.size,
        image=built.image,
        report=built.report,
        node=reply.node,
    )
    return failed(found, reply.error) if reply.error else found


def failed(row: CellRow, failure: Failure) -> CellRow:
    """Return a cell's row with why it failed: its author or model (2 to 4), or the machine."""
    return replace(
        row,
        state=ENDED,
        verdict=REFUSED if failure.exit_code in (2, 3, 4) else NOT_MADE,
        digest=None,
        cached=False,
        error=failure.message,
        hint=failure.hint or None,
        exit_code=failure.exit_code,
    )


@dataclass(slots=True)
class Spent:
    """What all replies together spent; they themselves are not kept, since they hold reports."""

    bytes_moved: int = 0
    cpu_seconds: float = 0.0
    """Of the nodes."""
    stages: dict[str, dict[str, int]] = field(default_factory=dict)
    """Stage -> how often it was `run`, and how often it was `cached`."""

    def add(self, reply: TaskReply) -> None:
        """Add a reply."""
        self.bytes_moved += reply.bytes_moved
        self.cpu_seconds += reply.cpu_seconds if reply.node else 0.0
        for name, cached in reply.stages.items():
            row = self.stages.setdefault(name, {"run": 0, "cached": 0})
            row["cached" if cached else "run"] += 1
