"""How models are asked many tasks in one job, in few walks over their weights.

A recipe with sixty adapters started sixty jobs, each with 3 CPU seconds of imports. Tasks share a
walk as long as all their texts are read at once within half of the memory that a job may fill: a
batch that has to be split reads the weights again, and nothing is gained. What a model has finished
is written down at once. A process that stays and takes jobs would need its own limits for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

from weightsmith.core.errors import InputRefused
from weightsmith.core.job_inputs import Input, Virtual
from weightsmith.core.jobs import AskedModel, AskedTask, AskedWalk, ReferenceJob
from weightsmith.core.time_limits import job_seconds
from weightsmith.core.values import Json, Tree
from weightsmith.evaluating import asking
from weightsmith.evaluating.subjects import BUILDER, EvaluatedModel, inputs
from weightsmith.evaluating.task import Task
from weightsmith.forward.memory import (
    VIEWS,
    WalkSize,
    all_at_once,
    batch_bytes,
    joint_walk,
    walk_bytes,
)
from weightsmith.models.facts import read_facts
from weightsmith.models.shape import ModelShape
from weightsmith.models.tokenizer_files import TOKENIZER_FILES

_MOST_BYTES = 128 << 20
"""Of the answers of one job: a part of what is read of its result."""
_PER_TOKEN, _PER_ANSWER = 24, 200
_TOKENIZER = 6
"""Bytes in memory for one of a tokenizer's files."""
_MOST_UNITS = 256
"""Of one job: a container gets each adapter's folder by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedSubject:
    """A model, and the task that it is asked."""

    name: str
    """`base`, `adapter` or `merged`."""
    key: str
    """The digest of all that the answers depend on."""
    subject: EvaluatedModel
    task: Task
    draft: str = ""
    """Key of the answers that a correct merge gives too."""


Unit = tuple[AskedSubject, ...]
"""Models that are asked one task; they answer in one walk."""


def asked_of(subjects: Mapping[str, EvaluatedModel], task: Task) -> Unit:
    """Return models by name as those that are asked a task."""
    found = tuple(
        AskedSubject(name=name, key=str(inputs(one, task).key), subject=one, task=task)
        for name, one in subjects.items()
    )
    if task.metric == "choice":
        return found
    like = next((one.key for one in found if one.name == "adapter"), "")
    return tuple(replace(one, draft=like) if one.name == "merged" else one for one in found)


def once(units: Iterable[Unit], known: Iterable[str] = ()) -> Iterator[Unit]:
    """Yield units without models that have answered before: in another one, or `known` by key."""
    seen = set(known)
    for unit in units:
        left = tuple(one for one in unit if one.key not in seen)
        seen.update(one.key for one in left)
        if left:
            yield left


def walk_of(unit: Unit) -> WalkSize:
    """Return what runs side by side: models whose drafts are answers of others follow these."""
    keys = {one.key for one in unit}
    later = sum(one.draft in keys for one in unit)
    adapters = {a.snapshot.digest: a.snapshot.tree for one in unit for a in one.subject.adapters}
    return asking.walk_of(
        unit[0].task,
        views=max(later, len(unit) - later),
        adapter_bytes=sum(map(_loaded_bytes, adapters.values())),
    )


def _loaded_bytes(adapter: Tree) -> int:
    """Return what an adapter takes in memory: float32 factors, and a tokenizer that it brings."""
    spoken = sum(file.size for file in adapter.files if file.path in TOKENIZER_FILES)
    return 2 * adapter.weight_bytes + _TOKENIZER * spoken


def walks(units: Iterable[Unit], shape: ModelShape | None, budget: int) -> list[list[Unit]]:
    """Return units in walks, each of as many as need no further batches for being together.

    Each by itself if the model's dimensions are not known.
    """
    found: list[list[Unit]] = []
    together = WalkSize(views=0, rows=0, tokens=0)
    for unit in sorted(units, key=_chooses):
        alone = walk_of(unit)
        both = joint_walk(together, alone)
        alike = bool(found) and _chooses(found[-1][0]) == _chooses(unit)
        if alike and shape and all_at_once(shape, both, budget):
            found[-1].append(unit)
            together = both
        else:
            found.append([unit])
            together = alone
    return found


def planned_bytes(units: Sequence[Unit], shape: ModelShape, budget: int) -> int:
    """Return the most memory in bytes of a job that asks these units, or only some of them."""
    each = [walk_of(unit) for unit in units]
    largest = max(walk_bytes(shape, one, budget) for one in each)
    whole = reduce(joint_walk, each)
    together = walk_bytes(shape, replace(whole, views=min(whole.views, VIEWS)), budget)
    # Only what fits into half of the budget is put together.
    return max(largest, min(together, budget // 2) if budget else together)


def shape_of(model: Path) -> ModelShape | None:
    """Return a model's dimensions; None if they are not known."""
    try:
        return read_facts(model).shape
    except InputRefused:
        return None


def job_of(units: Sequence[Unit], known: Mapping[str, Sequence[Json]], budget: int) -> ReferenceJob:
    """Return the job that asks these units; whoever runs it sets its output.

    `known` has answers by key, for drafts. The last units are left out if there are too many
    answers or adapters for one job: another one asks them.
    """
    units = list(_readable(units))
    asked = [one for unit in units for one in unit]
    models = {one.subject.model.digest: one.subject.checkpoint for one in asked}
    used = [a for one in asked for a in (*one.subject.adapters, *one.subject.speakers)]
    adapters = {a.snapshot.digest: a.snapshot.tree for a in used}
    places = list(models), list(adapters)
    keys = {one.key for one in asked}
    size = sum(model.tree.size for model in models.values())
    shape = shape_of(asked[0].subject.model.root)
    groups = [
        (group, reduce(joint_walk, map(walk_of, group))) for group in walks(units, shape, budget)
    ]
    peak = max(walk_bytes(shape, walk, budget) for _, walk in groups) if shape else 0
    return ReferenceJob(
        builder=BUILDER,
        models=tuple(map(Input.checkpoint, models.values())),
        adapters=tuple(map(Input.tree, adapters.values())),
        walks=tuple(
            AskedWalk(
                tasks=tuple(
                    AskedTask(
                        models=tuple(_model(one, places, keys, known) for one in together),
                        questions=together[0].task.questions,
                        max_tokens=together[0].task.max_tokens,
                    )
                    for together in _alike(group)
                ),
                choose=_chooses(group[0]),
                batch_bytes=batch_bytes(shape, walk, budget) if shape else 0,
            )
            for group, walk in groups
        ),
        virtual=next((v for v in map(Virtual.of, models.values()) if v), None),
        output=Path(),
        memory_bytes=max(asking.memory_limit(size), 2 * peak),
        seconds=job_seconds(size, tokens=sum(one.task.most_tokens for one in asked)),
        use_gpu=True,
    )


def _readable(units: Sequence[Unit]) -> Iterator[Unit]:
    """Yield the first units, of which one result may have all answers."""
    size = 0
    for number, unit in enumerate(units):
        task = unit[0].task
        size += len(unit) * len(task.items) * (_PER_ANSWER + _PER_TOKEN * task.max_tokens)
        if number and (size > _MOST_BYTES or number == _MOST_UNITS):
            return
        yield unit


def _chooses(unit: Unit) -> bool:
    return unit[0].task.metric == "choice"


def _alike(group: Sequence[Unit]) -> list[list[AskedSubject]]:
    """Return a walk's models by what they are asked, so that equal questions are sent once."""
    found: dict[tuple[str, int], list[AskedSubject]] = {}
    for unit in group:
        task = unit[0].task
        found.setdefault((task.digest, task.max_tokens), []).extend(unit)
    return list(found.values())


def _model(
    one: AskedSubject,
    places: tuple[list[Any], list[Any]],
    keys: set[str],
    known: Mapping[str, Sequence[Json]],
) -> AskedModel:
    models, adapters = places
    subject = one.subject
    draft: dict[str, Any] = {}
    if one.draft in keys:
        draft = {"draft": one.draft}
    elif one.draft in known:
        draft = {"draft_texts": tuple(str(row["answer"]) for row in known[one.draft])}
    return AskedModel(
        name=one.name,
        key=one.key,
        model=models.index(subject.model.digest),
        adapters=tuple(adapters.index(a.snapshot.digest) for a in subject.adapters),
        weights=subject.factors,
        speakers=tuple(adapters.index(a.snapshot.digest) for a in subject.speakers),
        **draft,
    )
