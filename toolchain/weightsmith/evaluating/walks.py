"""Models that answer tasks in transformers: which, in which walks over their weights, at what cost.

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

from weightsmith.core.errors import InputRefused
from weightsmith.core.jobs import (
    AskedModel,
    AskedTask,
    AskedWalk,
    Input,
    Pooled,
    ReferenceJob,
    Virtual,
)
from weightsmith.core.resources import builder_pins
from weightsmith.core.time_limits import job_seconds
from weightsmith.core.values import (
    AdapterSnapshot,
    Checkpoint,
    Digest,
    JsonValue,
    Sources,
    StageInputs,
    Tree,
    VirtualWeights,
)
from weightsmith.evaluating.results import RecipeTask
from weightsmith.evaluating.task import Task
from weightsmith.forward.memory import (
    BATCH_TOKENS,
    VIEWS,
    LayerTime,
    WalkSize,
    all_at_once,
    batch_bytes,
    joint_walk,
    shape_token_bytes,
    walk_bytes,
)
from weightsmith.models.facts import read_facts
from weightsmith.models.shape import ModelShape
from weightsmith.models.task import Kind, ModelTask, read_task
from weightsmith.models.templates import TEMPLATE_FILES, TOKENIZER_FILES

BUILDER = "merge"
RECIPE_NUMBER = 6
LETTERS = 3
"""Of a token, about."""
_VOICE = frozenset((*TOKENIZER_FILES, *TEMPLATE_FILES))
"""Files that decide how a question becomes tokens."""
_TEMPLATE_TOKENS = 32
_MOST_BYTES = 128 << 20
"""Of the answers of one job: a part of what is read of its result."""
_PER_TOKEN, _PER_ANSWER = 24, 200
_PER_VECTOR = 6 * 1024
"""Of a thousand numbers."""
_TOKENIZER = 6
"""Bytes in memory for one of a tokenizer's files."""
_MOST_UNITS = 256
"""Of one job: a container gets each adapter's folder by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedModel:
    """A model to query: a checkpoint with unmerged adapters, each with its weight."""

    model: Tree
    adapters: tuple[AdapterSnapshot, ...] = ()
    weights: tuple[float, ...] | None = None
    """Weights that replace the adapters' own."""
    speakers: tuple[AdapterSnapshot, ...] = ()
    """Adapters whose tokenizer and chat template word the questions; none: its own."""
    computed: VirtualWeights | None = None
    """What computes the model's weights, if its files have none."""

    @property
    def factors(self) -> tuple[float, ...]:
        """One weight per adapter."""
        return self.weights or tuple(adapter.weight for adapter in self.adapters)


_KINDS: Mapping[Pooled, Kind] = {
    "vectors": "embed",
    "label": "classify",
    "label-set": "classify",
    "relevance": "rerank",
    "word-labels": "token-classify",
}
"""What is asked -> the kind of model that says it."""
_ASKED = {
    "embed": "embedding",
    "classify": "label",
    "rerank": "rerank",
    "token-classify": "label, with words",
}
"""Kind of model -> the metric that is for it."""
_BY_FILES = (
    "of a generating class, an embedding model or a reranker (such as Qwen3-Reranker) is one by"
    " sentence-transformers' files alone: take a revision of the model that has modules.json"
)


def model_task(sources: Sources) -> ModelTask:
    """Return what base and adapters are together, by the first adapter that changes it."""
    base = sources.base.tree.texts
    alone = read_task(base)
    tasks = (read_task(base, one.snapshot.tree.texts) for one in sources.adapters)
    return next((one for one in tasks if one != alone), alone)


def worded(task: Task, sources: Sources) -> Task:
    """Return a task with what is put before queries and documents, by itself or by the model."""
    if task.pooled != "vectors":
        return task
    query, document = task.prompts(model_task(sources))
    return replace(task, query_prompt=query, document_prompt=document)


def check_fits(task: Task, sources: Sources, data: str) -> None:
    """Raise InputRefused if a task's metric is not for this model, or a label is none of its own.

    `data` is the file of its questions.
    """
    model, wanted = model_task(sources), _KINDS.get(task.pooled, "generate")
    if model.kind != wanted and (task.pooled or model.kind in _ASKED):
        what = f"a model that {model.does}" if model.does else "a model that generates text"
        fits = _ASKED.get(model.kind, "of answers in words")
        hint = f"use a metric for it ({fits}), or leave the suite out"
        if model.kind == "generate" and wanted in {"rerank", "embed"}:
            hint += f"; {_BY_FILES}"
        raise InputRefused(f"{data}: metric {task.metric} is not for {what}", hint=hint)
    if task.metric != "label":
        return
    if task.pooled == "label" and model.gives_sets:
        raise InputRefused(
            f"{data}: the model gives a text any number of labels (`problem_type` in config.json),"
            " and each line expects one",
            hint='list all that are true of a text: {"text": "…", "labels": ["…", "…"]}',
        )
    if task.pooled == "label-set" and not model.gives_sets:
        raise InputRefused(
            f"{data}: lines have `labels`, and the model gives each text one label",
            hint='use "expected", or if the model was trained for sets of labels, write'
            ' "problem_type": "multi_label_classification" into the config.json of its base',
        )
    for item in task.items:
        for label in item.expected:
            if label not in model.labels:
                more = f" and {len(model.labels) - 8} more" if model.labels[8:] else ""
                raise InputRefused(
                    f"{data}:{item.line}: the model has no label {label!r}",
                    hint=f"its labels are {', '.join(model.labels[:8])}{more}",
                )


def has_head(base: Tree, pooled: Pooled) -> bool:
    """Return whether a base can say by itself what is asked; any model can give vectors."""
    return pooled in {"", "vectors"} or read_task(base.texts).kind == _KINDS[pooled]


def subjects(
    sources: Sources, adapter: int | None, pooled: Pooled = ""
) -> Mapping[str, EvaluatedModel]:
    """Return the models that answer a task before merging: `base`, and `adapter` if there is one.

    A base without the head that the answers come from is left out.

    `adapter` is the number of the adapter that the task belongs to, used at full weight; None means
    all adapters together. All are asked alike: a tokenizer or chat template that an adapter brings
    words the base's questions too.
    """
    base = sources.base.tree
    if not sources.adapters:
        return {"base": EvaluatedModel(model=base)}
    used = sources.adapters if adapter is None else (sources.adapters[adapter],)
    speakers = used if any(_voice(one.snapshot.tree) - _voice(base) for one in used) else ()
    tuned = EvaluatedModel(model=base, adapters=used, weights=None if adapter is None else (1.0,))
    if not has_head(base, pooled):
        return {"adapter": tuned}
    return {"base": EvaluatedModel(model=base, speakers=speakers), "adapter": tuned}


def with_merged(
    task: RecipeTask, sources: Sources, checkpoint: Checkpoint
) -> Mapping[str, EvaluatedModel]:
    """Return the same for a task of a recipe, and `merged`, if anything was merged."""
    found = dict(subjects(sources, task.adapter, task.task.pooled))
    if checkpoint.digest != sources.base.digest:
        found["merged"] = EvaluatedModel(model=checkpoint.tree, computed=checkpoint.computed)
    return found


def _voice(tree: Tree) -> frozenset[tuple[str, Digest]]:
    return frozenset((file.path, file.digest) for file in tree.files if file.path in _VOICE)


def inputs(subject: EvaluatedModel, task: Task) -> StageInputs:
    """Return everything that the reference answers depend on."""
    voices: list[JsonValue] = [sorted(_voice(a.snapshot.tree)) for a in subject.speakers]
    return StageInputs(
        stage="reference",
        recipe_number=RECIPE_NUMBER,
        inputs={
            "base": subject.model.digest,
            "adapters": [a.snapshot.digest for a in subject.adapters],
            "weights": subject.factors,
            "questions": task.digest,
            "max_tokens": task.max_tokens,
            "builder": builder_pins(BUILDER),
            **({"speakers": voices} if voices else {}),
            **({"kept": "probabilities"} if task.metric == "label" else {}),
        },
    )


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
    if task.metric == "choice" or task.pooled:
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


def task_walk(task: Task, *, views: int = 1, adapter_bytes: int = 0) -> WalkSize:
    """Return what runs side by side when so many models are asked a task."""
    if task.pooled:  # which keeps no state: a batch after another
        lengths = task.lengths
        letters = min(sum(lengths), max(BATCH_TOKENS * LETTERS, *lengths))
        return WalkSize(
            views=views, rows=1, tokens=letters // LETTERS + 1, adapter_bytes=adapter_bytes
        )
    rows, seen = len(task.items), sum(one.tokens for one in task.pictures)
    letters = task.most_tokens - seen
    if task.metric == "choice":  # one by one: the longest question with its longest choice
        rows, letters = (
            1,
            max(
                (
                    sum(len(str(m["content"])) for m in item.messages)
                    + max(map(len, item.choices), default=0)
                    for item in task.items
                ),
                default=0,
            ),
        )
    tokens = letters // LETTERS + seen + rows * (_TEMPLATE_TOKENS + task.max_tokens)
    return WalkSize(views=views, rows=rows, tokens=tokens, adapter_bytes=adapter_bytes)


def walk_of(unit: Unit) -> WalkSize:
    """Return what runs side by side: models whose drafts are answers of others follow these."""
    keys = {one.key for one in unit}
    later = sum(one.draft in keys for one in unit)
    adapters = {a.snapshot.digest: a.snapshot.tree for one in unit for a in one.subject.adapters}
    spoken = sum(
        file.size
        for tree in adapters.values()
        for file in tree.files
        if file.path in TOKENIZER_FILES
    )
    return task_walk(
        unit[0].task,
        views=max(later, len(unit) - later),
        # Factors in float32, and the tokenizers that they bring.
        adapter_bytes=2 * sum(tree.weight_bytes for tree in adapters.values())
        + _TOKENIZER * spoken,
    )


def walks(units: Iterable[Unit], shape: ModelShape | None, budget: int) -> list[list[Unit]]:
    """Return units in walks, each of as many as need no further batches for being together.

    Each by itself if the model's dimensions are not known.
    """
    found: list[list[Unit]] = []
    together = WalkSize(views=0, rows=0, tokens=0)
    for unit in sorted(units, key=_kind):
        alone = walk_of(unit)
        both = joint_walk(together, alone)
        alike = bool(found) and _kind(found[-1][0]) == _kind(unit)
        if alike and shape and all_at_once(shape, both, budget):
            found[-1].append(unit)
            together = both
        else:
            found.append([unit])
            together = alone
    return found


def _chooses(unit: Unit) -> bool:
    return unit[0].task.metric == "choice"


def _kind(unit: Unit) -> tuple[bool, bool]:
    """Return what units in one walk have in common."""
    return bool(unit[0].task.pooled), _chooses(unit)


def memory_limit(size: int) -> int:
    """Return the memory in bytes that a job may use for models of `size` bytes together.

    A model that cannot be walked is loaded whole, in float32.
    """
    return (3 << 30) + 5 * size


def planned_bytes(units: Sequence[Unit], shape: ModelShape, budget: int) -> int:
    """Return the most memory in bytes of a job that asks these units, or only some of them."""
    each = [walk_of(unit) for unit in units]
    largest = max(walk_bytes(shape, one, budget) for one in each)
    whole = reduce(joint_walk, each)
    together = walk_bytes(shape, replace(whole, views=min(whole.views, VIEWS)), budget)
    # Only what fits into half of the budget is put together.
    return max(largest, min(together, budget // 2) if budget else together)


def batch_memory(model: Path, walk: WalkSize, budget: int) -> int:
    """Return a job's memory for batches in bytes; 0 if the model's dimensions are not known."""
    shape = shape_of(model)
    return batch_bytes(shape, walk, budget) if shape else 0


def shape_of(model: Path) -> ModelShape | None:
    """Return a model's dimensions; None if they are not known."""
    try:
        return read_facts(model).shape
    except InputRefused:
        return None


def steps_of(task: Task) -> int:
    """Return how many tokens a model answers a task with, at most."""
    if task.pooled:
        return 1
    return len(task.items) * max(1, task.max_tokens)


def answer_seconds(
    layer_time: LayerTime, shape: ModelShape, walk: WalkSize, task: Task, budget: int
) -> float:
    """Return the seconds of models that answer side by side, token by token.

    A batch that does not fit into memory with the others reads the weights again.
    """
    rows, new = len(task.items), max(1, task.max_tokens)
    one = shape_token_bytes(shape)
    room = max(1, batch_bytes(shape, walk, budget))
    batches = max(1, -(-walk.views * walk.tokens * one // room))
    asked, steps = walk.views * walk.tokens / batches, walk.views * rows / batches
    return batches * (layer_time.passed(asked, steps) + new * layer_time.passed(steps, steps))


def job_of(
    units: Sequence[Unit], known: Mapping[str, Sequence[Mapping[str, JsonValue]]], budget: int
) -> ReferenceJob:
    """Return the job that asks these units; whoever runs it sets its output.

    `known` has answers by key, for drafts. The last units are left out if there are too many
    answers or adapters for one job: another one asks them.
    """
    units = list(_readable(units))
    asked = [one for unit in units for one in unit]
    models = {
        one.subject.model.digest: Checkpoint(tree=one.subject.model, computed=one.subject.computed)
        for one in asked
    }
    used = [a for one in asked for a in (*one.subject.adapters, *one.subject.speakers)]
    adapters = {a.snapshot.digest: a.snapshot.tree for a in used}
    places = list(models), list(adapters)
    keys = {one.key for one in asked}
    size = sum(model.tree.size for model in models.values())
    shape = shape_of(asked[0].subject.model.root)
    told, peak = [], 0
    for group in walks(units, shape, budget):
        walk = reduce(joint_walk, map(walk_of, group))
        peak = max(peak, walk_bytes(shape, walk, budget) if shape else 0)
        # Equal questions are sent once.
        alike: dict[tuple[str, int], list[AskedSubject]] = {}
        for unit in group:
            alike.setdefault((unit[0].task.digest, unit[0].task.max_tokens), []).extend(unit)
        tasks = (
            AskedTask(
                models=tuple(_model(one, places, keys, known) for one in together),
                questions=together[0].task.questions,
                max_tokens=together[0].task.max_tokens,
                pooled=together[0].task.pooled,
                prompts=together[0].task.prompts(),
            )
            for together in alike.values()
        )
        told.append(
            AskedWalk(
                tasks=tuple(tasks),
                choose=_chooses(group[0]),
                batch_bytes=batch_bytes(shape, walk, budget) if shape else 0,
            )
        )
    return ReferenceJob(
        builder=BUILDER,
        models=tuple(map(Input.checkpoint, models.values())),
        adapters=tuple(map(Input.tree, adapters.values())),
        walks=tuple(told),
        virtual=next((v for v in map(Virtual.of, models.values()) if v), None),
        output=Path(),
        memory_bytes=max(memory_limit(size), 2 * peak),
        seconds=job_seconds(size, tokens=sum(one.task.most_tokens for one in asked)),
        use_gpu=True,
    )


def _readable(units: Sequence[Unit]) -> Iterator[Unit]:
    """Yield the first units, of which one result may have all answers."""
    size = 0
    for number, unit in enumerate(units):
        task = unit[0].task
        each = _PER_VECTOR if task.pooled == "vectors" else _PER_TOKEN * task.max_tokens
        size += len(unit) * len(task.texts) * (_PER_ANSWER + each)
        if number and (size > _MOST_BYTES or number == _MOST_UNITS):
            return
        yield unit


def _model(
    one: AskedSubject,
    places: tuple[list[Digest], list[Digest]],
    keys: set[str],
    known: Mapping[str, Sequence[Mapping[str, JsonValue]]],
) -> AskedModel:
    models, adapters = places
    subject = one.subject
    drafts = () if one.draft in keys else known.get(one.draft, ())
    return AskedModel(
        name=one.name,
        key=one.key,
        model=models.index(subject.model.digest),
        adapters=tuple(adapters.index(a.snapshot.digest) for a in subject.adapters),
        weights=subject.factors,
        speakers=tuple(adapters.index(a.snapshot.digest) for a in subject.speakers),
        draft=one.draft if one.draft in keys else "",
        draft_texts=tuple(str(row["answer"]) for row in drafts),
    )
