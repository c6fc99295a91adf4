"""Answers of a merged model that are not asked, since no margin of the adapter's can vanish."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from weightsmith.core.jobs import (
    AskedModel,
    AskedTask,
    ProofJob,
    Question,
    ReferenceJob,
    SeenPicture,
)
from weightsmith.worker import carrying, jobs

from tests.unit.validating.conftest import make_adapter, make_model, merged
from tests.unit.worker.test_proof import proof_of, run

CHATS = tuple(({"role": "user", "content": f"What is {n} times {n}?"},) for n in range(36))
PROBES, SAMPLE = 8, 4
ADAPTER = AskedModel(name="adapter", key="adapter", model=0, adapters=(0,), weights=(1.0,))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, an adapter, and what was merged: of few weights, and sure of its tokens."""
    root = tmp_path_factory.mktemp("models")
    base = make_model(root / "base", tie_word_embeddings=True)
    lora = make_adapter(root / "lora", base, target_modules=["q_proj", "down_proj"])
    return base, lora, merged(root / "out", base, lora)


@pytest.fixture
def job(folders: tuple[Path, Path, Path], tmp_path: Path) -> ProofJob:
    return make_job(folders, tmp_path)


@pytest.fixture(scope="module")
def expected(folders: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The answers of models that are asked everything."""
    return run(make_job(folders, tmp_path_factory.mktemp("asked")).reference)["answers"]


def make_job(folders: tuple[Path, Path, Path], tmp_path: Path) -> ProofJob:
    task = AskedTask(
        models=(ADAPTER, AskedModel(name="merged", key="merged", model=1, draft="adapter")),
        questions=tuple(Question(messages=chat) for chat in CHATS),
        max_tokens=3,
    )
    return proof_of(*folders, tmp_path, task)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many questions the merged model is asked, walk by walk."""
    counts, answered = list[int](), jobs.answered

    def counting(job: ReferenceJob, *rest: Any) -> Any:
        tasks = [task for walk in job.walks for task in walk.tasks]
        counts.extend(len(t.questions) for t in tasks for one in t.models if one.name == "merged")
        return answered(job, *rest)

    monkeypatch.setattr(jobs, "answered", counting)
    return counts


def validated(monkeypatch: pytest.MonkeyPatch, **found: Any) -> None:
    real = jobs._validate
    monkeypatch.setattr(jobs, "_validate", lambda *given: {**real(*given), **found})


def texts(rows: Any) -> list[Any]:
    """Return all of some answers but their margins, and marks."""
    return [{k: v for k, v in row.items() if k not in ("margins", "carried")} for row in rows]


def least(row: Any) -> float:
    return min(map(float, row["margins"].split()))


@pytest.mark.grid(2)
@pytest.mark.slow
@pytest.mark.parametrize("guess", [0.0, 0.05])
def test_what_is_carried_over_is_what_asking_gives(
    job: ProofJob, expected: Any, asked: list[int], monkeypatch: pytest.MonkeyPatch, guess: float
) -> None:
    """Rows below the bound are asked: at once if that was guessed, else in another walk."""
    alone = run(job.validation)
    monkeypatch.setattr(carrying, "_NEAR", guess)
    asked.clear()

    found = run(job)

    rows, validation = found["answers"]["merged"], found["validation"]
    carried = [row for row in rows if "carried" in row]
    bound = round(4 * validation["max_abs_logit_diff"], 4)
    assert texts(rows) == texts(expected["merged"])
    assert found["answers"]["adapter"] == expected["adapter"]
    assert {key: validation[key] for key in alone if key not in ("seconds", "peak_rss_bytes")} == {
        key: alone[key] for key in alone if key not in ("seconds", "peak_rss_bytes")
    }
    assert sum(asked) == len(CHATS) - len(carried)
    assert {row["carried"] for row in carried} == {bound}
    assert min(map(least, carried)) > bound
    near = sum(least(row) <= bound for row in expected["adapter"])
    if guess:
        assert len(asked) == 1
        assert len(carried) >= 4
    else:
        assert asked[0] == PROBES + SAMPLE
        assert 0 < asked[1] <= near
        assert len(asked) == 2


@pytest.mark.grid(2)
@pytest.mark.slow
@pytest.mark.parametrize("largest", [1e-5, None])
def test_all_are_asked_where_an_answer_breaks_the_bound_or_none_is_known(
    job: ProofJob,
    expected: Any,
    asked: list[int],
    monkeypatch: pytest.MonkeyPatch,
    largest: float | None,
) -> None:
    """The merged model moves margins by 0.007 nats; a bound of 0.00004 is wrong."""
    monkeypatch.setattr(carrying, "_NEAR", 0.0)
    validated(monkeypatch, max_abs_logit_diff=largest)

    found = run(job)

    rows = found["answers"]["merged"]
    assert not any("carried" in row for row in rows)
    assert asked == [PROBES + SAMPLE, len(CHATS) - PROBES - SAMPLE]
    assert texts(rows) == texts(expected["merged"])
    assert found["seconds"] > 0


@pytest.mark.slow
def test_a_merge_that_failed_is_asked_nothing_more(
    job: ProofJob, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carrying, "_NEAR", 0.0)
    validated(monkeypatch, passed=False)

    found = run(job)

    assert list(found["answers"]) == ["adapter"]
    assert asked == [PROBES + SAMPLE]


def answer(margins: str, *tokens: int) -> Any:
    return {"margins": margins}, ((), tokens)


@pytest.mark.parametrize(
    ("margins", "tokens", "kept"),
    [
        ("1.1 0.95", (1, 2), True),
        ("1.3 1", (1, 2), False),
        ("1 nan", (1, 2), False),
        ("1 0.1 9", (1, 3, 4), False),  # another token where base and adapter were sure
    ],
)
def test_an_answer_keeps_to_the_bound(margins: str, tokens: tuple[int, ...], kept: bool) -> None:
    assert carrying._keeps(answer("1 1 1", 1, 2, 5), answer(margins, *tokens), 0.2) is kept


def test_another_token_is_within_the_bound_at_a_near_tie() -> None:
    assert carrying._keeps(answer("1 0.1 1", 1, 2, 5), answer("1 0.05 9", 1, 3, 4), 0.2)


def test_only_what_validation_compares_is_carried_over(job: ProofJob) -> None:
    """Not other merges than sums, an adapter at another weight, or questions with pictures."""
    (walk,) = job.reference.walks
    (task,) = walk.tasks
    seen = SeenPicture(file="a.png", name="a.png", width=1, height=1)
    pictured = replace(task.questions[0], pictures=(seen,))

    def of(changed: AskedTask) -> ProofJob:
        walks = (replace(walk, tasks=(changed,)),)
        return replace(job, reference=replace(job.reference, walks=walks))

    assert len(carrying.pairs_of(job)) == 1
    assert not carrying.pairs_of(replace(job, validation=replace(job.validation, scope="rest")))
    others: list[Callable[[AskedModel], AskedModel]] = [
        lambda one: replace(one, weights=(0.5,)),
        lambda one: replace(one, adapters=(), weights=()),
        lambda one: replace(one, model=1),
        lambda one: replace(one, key="another job's"),
    ]
    for change in others:
        models = (change(task.models[0]), task.models[1])
        assert not carrying.pairs_of(of(replace(task, models=models)))
    assert not carrying.pairs_of(of(replace(task, questions=(pictured, *task.questions))))
