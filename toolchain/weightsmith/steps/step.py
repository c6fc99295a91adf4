"""A step of a build: what its result depends on, what making it takes, and how it is made.

A build is a graph of steps. Four readers walk it and know no step by name: one runs it, one
explains it (`plan`), one records it (build.json), and a fleet unites many of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from weightsmith.core.errors import CheckFailed
from weightsmith.core.json_objects import JsonObject
from weightsmith.core.values import Digest, JsonValue, StageInputs, Tree, Writable, key_of, plain
from weightsmith.evaluating.replay import ReplaySet
from weightsmith.evaluating.results import Result
from weightsmith.forward.memory import LayerTime
from weightsmith.models.facts import ModelFacts, read_facts
from weightsmith.recipe.file import RecipeFile
from weightsmith.serving.targets import Target
from weightsmith.steps.joined import JoinedJob
from weightsmith.steps.outputs import ImageOutputs
from weightsmith.steps.replays import ReplayRequest
from weightsmith.steps.sizes import ForeseenTree
from weightsmith.steps.stage_result import StageResult
from weightsmith.steps.tools import Tools

T = TypeVar("T")
F = TypeVar("F")
T_co = TypeVar("T_co", covariant=True)
"""What running a step gives."""
F_co = TypeVar("F_co", covariant=True)
"""What is known of that before the step ran."""

HERE = "here"
"""Where a result is that is on this machine."""
WEIGHTS = "quantize"
"""The name, in plans and records, of whatever makes a target's weights."""
MERGE_FIRST = "merge comes first"
NOT_YET = "its weights do not exist yet"


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetBuild:
    """One target of a build, and where its results go."""

    file: RecipeFile
    target: Target
    folder: Path
    """For build.json, the report and the rendered files."""
    outputs: ImageOutputs
    candidate_layout: Path | None
    """None to start the image in the engine, else the layout next to which it starts."""
    update_lock: bool = False
    """Pin bases again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Whether a step's result exists; if not, why it has to be made."""

    cached: bool
    why: str = ""
    where: str = ""
    """`here`, or the address of the shared cache that has it; empty for what does not exist."""


CACHED = State(cached=True)
"""There is nothing to make."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow(JsonObject):
    """A row of a plan: a step's state and what it takes; sizes in bytes."""

    stage: str
    target: str
    cached: bool
    where: str
    why: str
    read_bytes: int
    write_bytes: int
    peak_memory_bytes: int
    disk_bytes: int
    """Most that is on the disk at a time because of it, with what it writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen(Generic[F_co]):
    """What will come out of a step, and its rows in the plan."""

    value: F_co
    rows: tuple[PlanRow, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeseenWeights:
    """Weights that a step gives; sizes in bytes."""

    model: ModelFacts
    """Of a packed base that is merged, as it will be: plain."""
    size: int
    """Of all files; an estimate until they exist."""
    weight_bytes: int
    tree: Tree | None = None
    """None until they exist."""
    missing: str = ""
    """Why they do not exist yet."""
    planned: int = 0
    """The estimate of `weight_bytes`, also once they exist; 0 for what is only copied."""
    note: str = ""
    """What a plan says of their size, for people."""

    @classmethod
    def of(cls, tree: Tree) -> ForeseenWeights:
        """Return those of a checkpoint's folder, which may lack them."""
        model, here = read_facts(tree.root), not isinstance(tree, ForeseenTree)
        return cls(
            model=model,
            size=tree.size,
            weight_bytes=tree.weight_bytes,
            tree=tree if here else None,
            missing="" if here else "the base's weights are not here",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The tasks with the scores of what was asked so far."""

    results: tuple[Result, ...]
    started: str = ""
    """The platform whose image was started and tested; "" if none was."""
    replay: ReplaySet | None = None
    """What the started image answered, for other machines; None if it was not asked."""
    requests: tuple[ReplayRequest, ...] = ()
    """What a replay set asks, also if the image was not started."""
    tolerance: float = 0.0
    """Of a replay set, in nats."""
    speed: float = 0.0
    """Tokens per second of one request, where `auto` prefers speed."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Step(Generic[T_co, F_co]):
    """One step of a build. Its fields are the steps that it needs, and its part of the recipe."""

    name: ClassVar[str]
    """In plans, records and progress. Steps of one target that share it share a record."""
    recipe_number: ClassVar[int] = 1
    """Raised whenever the same inputs would give different bytes."""
    in_every_plan: ClassVar[bool] = False
    """Whether it is in a plan for which the sources are not known yet."""
    prefetched: ClassVar[bool] = False
    """May be run ahead of its turn, while steps run that allow it (`allows_prefetch`)."""
    allows_prefetch: ClassVar[bool] = False
    """May run while another step is run ahead of its turn."""
    proves: ClassVar[bool] = False
    """Runs to find a fault of the model: what it refuses is recorded, as what is judged."""
    asks: ClassVar[bool] = False
    """Judges what an image answers: a candidate of `auto` that it refuses was tested."""
    before_publishing: ClassVar[bool] = False
    """A tested image waits for it: an error of it ends that image."""
    publishes: ClassVar[bool] = False
    """What it gives can be seen by others, so it is recorded at once."""
    reads_record: ClassVar[bool] = False
    """Needs build.json to be written with all that was published before."""
    way_out: ClassVar[str] = ""
    """What to change in the recipe if it needs too much memory."""

    of: TargetBuild | None = None
    """The target that it belongs to; None for a step that all targets share."""

    def foresee(self, seen: Foresight) -> Foreseen[F_co]:
        """Return what running will give and take, from headers alone; refuse what running would."""
        raise NotImplementedError

    def permit(self, seen: Foresight) -> None:
        """Raise InputRefused for a model that it cannot be made of, once it is foreseen."""

    def run(self, have: Results, tools: Tools) -> StageResult[T_co]:
        """Return the step's result; raises what its stage raises."""
        raise NotImplementedError

    def judge(self, have: Results) -> None:
        """Raise CheckFailed if the result that is there now must not be published."""

    def inputs(self, _have: Results, _tools: Tools) -> StageInputs | None:
        """Return what the result that is there depended on, for the record; None for nothing."""
        return None

    def failed(self, _error: CheckFailed) -> T_co | None:
        """Return what is recorded of a run that failed; None for nothing."""
        return None

    def seconds(self, _layer: LayerTime, _seen: Foresight) -> float | None:
        """Return how long it takes, from the time of one layer; None if it runs no model."""
        return None

    @property
    def shared_as(self) -> str:
        """The kind of a fleet's task that ends with this step; "" if it is not shared by itself."""
        return ""

    @property
    def joins(self) -> AnyStep | None:
        """The step in whose process its job may run, before that step's own; None for none."""
        return None

    def join(self, _have: Results, _tools: Tools) -> JoinedJob | None:
        """Return the job for that process; None if there is nothing to run."""
        return None

    def builders(self) -> tuple[str, ...]:
        """Return the builders that its jobs run in."""
        return ()

    @property
    def options(self) -> Writable:
        """The part of the recipe that it depends on, beside the steps that it needs."""
        return None

    @property
    def target(self) -> str:
        """Its target's name; "" if all targets share it."""
        return self.of.target.name if self.of else ""

    @property
    def needs(self) -> tuple[AnyStep, ...]:
        """The steps that must have run before."""
        return tuple(_steps_in(getattr(self, one.name) for one in fields(self)))

    @cached_property
    def derivation(self) -> Digest:
        """What tells its result from others before anything was run.

        As in Nix: the step, its options, and the derivations of what it needs (Dolstra, The Purely
        Functional Software Deployment Model, 2006, section 5.4).
        """
        needed = [step.derivation for step in self.needs]
        return key_of([self.name, self.recipe_number, plain(self.options), needed])

    def row(
        self,
        state: State,
        *,
        name: str = "",
        read: int = 0,
        write: int = 0,
        memory: int = 0,
        disk: int | None = None,
    ) -> PlanRow:
        """Return a row of the plan; `disk` is `write` if not given."""
        return PlanRow(
            stage=name or self.name,
            target=self.target,
            cached=state.cached,
            where=(state.where or HERE) if state.cached else "",
            why=state.why,
            read_bytes=read,
            write_bytes=write,
            peak_memory_bytes=memory,
            disk_bytes=write if disk is None else disk,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class TargetStep(Step[T_co, F_co]):
    """A step of one target."""

    of: TargetBuild

    @property
    def file(self) -> RecipeFile:
        """The recipe."""
        return self.of.file


AnyStep = Step[object, object]


class UnforeseenStep(TargetStep[T_co, None]):
    """A step of one target of which only running shows anything: the plan has no row for it."""

    def foresee(self, _seen: Foresight) -> Foreseen[None]:
        """Foresee nothing."""
        return Foreseen(value=None)


def _steps_in(values: Iterator[object]) -> Iterator[AnyStep]:
    for value in values:
        if isinstance(value, Step):
            yield value
        elif isinstance(value, tuple):
            yield from _steps_in(iter(value))


class Results:
    """What the steps of a build have given so far, in their order."""

    def __init__(self) -> None:
        self._outcomes: dict[AnyStep, StageResult[Any]] = {}
        self.joined: dict[AnyStep, JoinedJob] = {}
        """Both steps whose jobs run in one process -> that job."""

    def __getitem__(self, step: Step[T, object]) -> T:
        """Return what a step gave; KeyError if it has not run."""
        value: T = self._outcomes[step].value
        return value

    def get(self, step: Step[T, object] | None) -> T | None:
        """Return what a step gave; None if it has not run."""
        return self._outcomes[step].value if step in self._outcomes else None

    def put(self, step: Step[T, object], outcome: StageResult[T]) -> None:
        """Add what a step gave."""
        self._outcomes[step] = outcome

    def copy(self) -> Results:
        """Return the same for another thread, which adds its own."""
        other = Results()
        other._outcomes = dict(self._outcomes)
        return other

    def outcomes(self, of: TargetBuild | None) -> Iterator[tuple[AnyStep, StageResult[object]]]:
        """Yield the steps of a target, and those that all share, with what they gave."""
        for step, outcome in self._outcomes.items():
            if step.of in (None, of):
                yield step, outcome


class Foresight:
    """What was foreseen of the steps so far, and what there is to judge by."""

    def __init__(
        self,
        tools: Tools,
        earlier: Mapping[tuple[str, str], Mapping[str, JsonValue]] | None = None,
    ) -> None:
        """Take, by step and target, what the last build's results depended on."""
        self.tools = tools
        self._earlier = earlier or {}
        self._foreseen: dict[AnyStep, Foreseen[Any]] = {}

    def __getitem__(self, step: Step[object, F]) -> F:
        """Return what a step will give; KeyError if it was not foreseen."""
        value: F = self._foreseen[step].value
        return value

    def rows(self, step: AnyStep) -> tuple[PlanRow, ...]:
        """Return a step's rows; () if it was not foreseen."""
        return self._foreseen[step].rows if step in self._foreseen else ()

    def know(self, step: Step[object, F], value: F) -> None:
        """Take what a step has given already."""
        self._foreseen[step] = Foreseen(value=value)

    def see(self, step: Step[object, F]) -> F:
        """Foresee a step, and return what it will give; raises what running would refuse."""
        self._foreseen[step] = found = step.foresee(self)
        return found.value

    def state(self, step: AnyStep, inputs: StageInputs) -> State:
        """Return whether the store has a result, and if not, which inputs changed."""
        if found := self.tools.store.find(inputs.key):
            return State(cached=True, where=found.where or HERE)
        changed = inputs.changed_since(self._earlier.get((step.name, step.target)))
        if changed == "":
            return State(cached=False, why="its result was removed from the store")
        why = changed if changed.startswith("never") else f"changed: {changed}"
        return State(cached=False, why=why)
