"""What goes to a node and what comes back: one JSON object each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from weightsmith import __version__
from weightsmith.core.errors import WeightsmithError
from weightsmith.core.json_objects import JsonObject
from weightsmith.core.resources import images, package, templates
from weightsmith.core.trees import below
from weightsmith.core.values import Digest, Json, key_of

BASE, CELL = "base", "cell"
"""Kinds of tasks, the first and the last; between them are those that steps are shared as."""
VERDICTS = ("passed", "not proven", "refused")
DIFFERENT = "another version of weightsmith"
"""Begins the error of a node that runs other code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRequest(JsonObject):
    """One task for a node."""

    id: str
    kind: str
    version: str
    """Of the code that asks; a node with another refuses."""
    adapter: str
    recipe: Mapping[str, Json]
    """A whole recipe; its folders are absolute paths, or names in `payloads`."""
    lock: Mapping[str, Json]
    """The pins of its sources and bases."""
    targets: tuple[str, ...]
    stages: tuple[str, ...] = ()
    """The names of those to run; all of a build for a cell."""
    questions: tuple[Mapping[str, Json], ...] = ()
    """For the base's task: the `evaluate` sections that several adapters share."""
    outputs: Mapping[str, Json] = field(default_factory=dict)
    tools: Mapping[str, Json] = field(default_factory=dict)
    """What the user chose of runner, memory, network and cache."""
    dist: str = ""
    """The folder of results."""
    token: str = ""
    """A file in it, which a node sees that shares the folder."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Name -> base64 of a small file that the recipe names."""
    payloads: Mapping[str, Digest] = field(default_factory=dict)
    """Name -> the cache's key of a folder that the recipe names."""

    def __post_init__(self) -> None:
        """Raise ValueError for a task without stages, and for a name outside the task's folder."""
        if self.kind != CELL and not self.stages:
            raise ValueError(f"a task of this kind needs stages: {self.kind!r}")
        for name in (*self.files, *self.payloads):
            require_inside(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure(JsonObject):
    """Why a task failed, with the exit code of the command line."""

    message: str
    hint: str = ""
    exit_code: int = 1

    @classmethod
    def of(cls, error: WeightsmithError) -> Failure:
        """Return an error as a failure; names of files in it may be no text."""
        message, hint = (
            text.encode(errors="backslashreplace").decode() for text in (error.message, error.hint)
        )
        return cls(message=message, hint=hint, exit_code=error.exit_code)


@dataclass(frozen=True, slots=True, kw_only=True)
class CellSuite(JsonObject):
    """One of a cell's suites: its verdict, the last score, and what was lost, from 0 to 1."""

    name: str
    verdict: str
    score: float
    drop: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CellSummary(JsonObject):
    """What the fleet's table shows of a cell's build; see CellRow."""

    verdict: str = "passed"
    score: float | None = None
    answered: str = ""
    interval: tuple[float, ...] | None = None
    drop: float | None = None
    suites: tuple[CellSuite, ...] = ()
    """Every suite, if there are several."""
    size: int | None = None
    digest: str | None = None
    image: str = ""
    report: str = ""
    uploaded_bytes: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for a verdict that there is not."""
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict is none: {self.verdict!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskReply(JsonObject):
    """What became of one task."""

    id: str
    node: str
    seconds: float
    cpu_seconds: float
    row: CellSummary | None = None
    """Of a cell that was built or refused."""
    error: Failure | None = None
    stages: Mapping[str, bool] = field(default_factory=dict)
    """Stage -> whether it was cached."""
    lock: Mapping[str, Json] = field(default_factory=dict)
    bytes_moved: int = 0
    """Sent to registries, and to and from the shared cache."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Reports as base64, by their path in the folder of results, if the node does not share it."""

    def __post_init__(self) -> None:
        """Raise ValueError for a name outside the folder of results."""
        for name in self.files:
            require_inside(name)

    @classmethod
    def of_failure(cls, id_: str, node: str, failure: Failure) -> TaskReply:
        """Return the reply of a task that could not begin."""
        return cls(id=id_, node=node, seconds=0.0, cpu_seconds=0.0, error=failure)


def require_inside(name: str) -> None:
    """Raise ValueError for a name that would lead out of a folder, or names no file."""
    parts = name.split("/")
    if any(part in {"", ".", ".."} for part in parts) or "\0" in name:
        raise ValueError(f"not the name of a file in a folder: {name!r}")


@cache
def version() -> str:
    """Return the version and the digest of all code and templates: what two nodes must share."""
    rows: list[tuple[str, Digest]] = []
    for folder in (package(), templates(), images()):
        for path in below(folder):
            name = path.relative_to(folder)
            if path.is_file() and not {"__pycache__", "_resources"} & set(name.parts):
                rows.append((name.as_posix(), Digest.of(path.read_bytes())))
    return f"{__version__} ({key_of(sorted(rows)).short})"
