"""Many tasks of a recipe: how few walks ask them, and what these are planned to hold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path

import pytest
from weightsmith.core.values import AdapterSnapshot, Digest, FileEntry, Snapshot, Tree
from weightsmith.evaluating import task as tasks
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.task import Task
from weightsmith.evaluating.walks import (
    EvaluatedModel,
    Unit,
    asked_of,
    inputs,
    job_of,
    once,
    planned_bytes,
    walk_of,
    walks,
)
from weightsmith.forward.memory import VIEWS, joint_walk, walk_bytes
from weightsmith.models.shape import ModelShape

GIB = 1 << 30
TINY = ModelShape(
    architecture="LlamaForCausalLM", layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2,
    head_dim=16, v_head_dim=16, max_positions=512, vocab=512, sliding_window=0, layer_types=(),
    dtype="float32",
)  # fmt: skip
SHAPE = replace(
    TINY, layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128,
    v_head_dim=128, vocab=128256,
)  # fmt: skip


def tree(name: str, size: int = 0) -> Tree:
    digest = Digest.of(name.encode())
    file = FileEntry(path="adapter_model.safetensors", size=size, digest=digest)
    return Tree(root=Path("models") / name, files=(file,))


def task(*questions: str, metric: str = "contains", most: int = 32) -> Task:
    items = tuple(
        Item(messages=({"role": "user", "content": text},), expected=("x",), line=1, choices=("a",))
        for text in questions
    )
    return Task(items=items, metric=metric, max_tokens=most)


def unit(adapter: str, asked: Task, *, merged: bool = False, size: int = 0) -> Unit:
    source = Snapshot(source=adapter, pin=adapter, pinned=True, tree=tree(adapter, size))
    found = {
        "base": EvaluatedModel(model=tree("base")),
        "adapter": EvaluatedModel(
            model=tree("base"), adapters=(AdapterSnapshot(snapshot=source, version="1"),)
        ),
    }
    if merged:
        found["merged"] = EvaluatedModel(model=tree("merged"))
    return asked_of(found, asked)


def names(units: Sequence[Unit]) -> list[list[str]]:
    return [[one.name for one in each] for each in units]


def test_a_base_is_asked_the_same_questions_once() -> None:
    same, other = task("one", "two"), task("three")
    units = [unit("a", same), unit("b", same), unit("c", other), unit("a", same)]

    left = list(once(units))

    assert names(left) == [["base", "adapter"], ["adapter"], ["base", "adapter"]]
    assert names(list(once(units, [units[0][0].key]))) == [["adapter"]] * 2 + [["base", "adapter"]]
    assert list(once(units, [one.key for each in units for one in each])) == []


def test_questions_are_hashed_once_for_all_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The questions of a large task take a second, and every look into the store asks for them."""
    hashed, own = list[object](), tasks.key_of
    monkeypatch.setattr(tasks, "key_of", lambda value: hashed.append(value) or own(value))

    asked = unit("a", task("one"), merged=True)
    keys = [str(inputs(one.subject, one.task).key) for one in asked]

    assert keys == [one.key for one in asked]
    assert len(hashed) == 1


def test_small_tasks_share_a_walk_and_large_ones_do_not() -> None:
    small = list(once(unit(str(n), task("one")) for n in range(60)))
    large = list(once(unit(str(n), task(*["word " * 60] * 400)) for n in range(3)))

    assert len(walks(small, TINY, 8 * GIB)) == 1
    assert len(walks(large, SHAPE, 8 * GIB)) == 3
    assert len(walks(small, None, 8 * GIB)) == 60
    assert sum(map(len, walks(small, TINY, 0))) == 60

    # No more models than there may be.
    units = list(once(unit(str(n), task("one")) for n in range(150)))
    groups = walks(units, TINY, 8 * GIB)
    assert [unit for group in groups for unit in group] == units
    assert all(sum(walk_of(one).views for one in group) <= VIEWS for group in groups)


def test_choices_are_not_asked_in_the_walk_of_texts() -> None:
    kinds = ["contains", "choice", "contains", "choice"]
    units = [unit(str(n), task("one", metric=kind)) for n, kind in enumerate(kinds)]

    found = walks(units, TINY, 8 * GIB)

    assert [[one[0].task.metric for one in group] for group in found] == [
        ["contains"] * 2,
        ["choice"] * 2,
    ]


def test_the_plan_covers_whichever_tasks_are_missing() -> None:
    texts = [task("one"), task(*["two"] * 30), task(*["three " * 90] * 50), task("four", most=900)]
    units = [unit(str(n), one, size=(n + 1) << 24) for n, one in enumerate(texts)]
    for shape, budget in itertools.product((TINY, SHAPE), (0, GIB, 3 * GIB, 64 * GIB)):
        planned = planned_bytes(list(once(units)), shape, budget)
        for count in range(1, len(units) + 1):
            for some in itertools.combinations(units, count):
                held = [
                    walk_bytes(shape, reduce(joint_walk, map(walk_of, group)), budget)
                    for group in walks(list(once(some)), shape, budget)
                ]
                assert max(held) <= planned


def test_a_merged_model_follows_the_adapter_that_it_takes_drafts_from() -> None:
    asked = unit("a", task("one"), merged=True)
    base, adapter, merged = asked

    assert (base.draft, adapter.draft, merged.draft) == ("", "", adapter.key)
    assert walk_of(asked).views == 2
    assert walk_of((base, merged)).views == 2
    (told,) = job_of([asked], {}, 0).walks
    assert [one.draft for one in told.tasks[0].models] == ["", "", adapter.key]
    (told,) = job_of([(base, merged)], {adapter.key: [{"answer": "yes"}]}, 0).walks
    assert [one.draft_texts for one in told.tasks[0].models] == [(), ("yes",)]


def test_a_job_sends_equal_questions_once_and_leaves_out_what_nobody_could_read() -> None:
    same = task("one", "two")
    few = job_of(list(once(unit(str(n), same) for n in range(3))), {}, 0)
    many = list(once(unit(str(n), replace(same, items=same.items * 500)) for n in range(300)))

    assert sum(len(walk.tasks) for walk in few.walks) == 3, "of unknown dimensions"
    job = job_of(many, {}, 0)
    asked = [one for walk in job.walks for each in walk.tasks for one in each.models]
    assert 2 <= len(asked) < 200
    assert len(job.adapters) == len(asked) - 1
