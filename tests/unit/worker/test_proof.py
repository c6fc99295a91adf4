"""The proof job: a reference job and a validation in one process, as each by itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from weightsmith.core.jobs import (
    AskedModel,
    AskedTask,
    AskedWalk,
    Input,
    ProofJob,
    Question,
    ReferenceJob,
    ValidateJob,
)
from weightsmith.forward.lockstep import Lockstep
from weightsmith.validating.probes import drafts
from weightsmith.worker.jobs import STAGES

from tests.unit.validating.conftest import edit_tensors, make_adapter, make_model, merged

CHATS = tuple(({"role": "user", "content": text},) for text in ("Which port?", "Who are you?"))
MEASURED = ("seconds", "peak_rss_bytes")


def task(chats: Sequence[Any]) -> AskedTask:
    return AskedTask(
        models=(
            AskedModel(name="adapter", key="adapter", model=0, adapters=(0,), weights=(1.0,)),
            AskedModel(name="merged", key="merged", model=1, draft="adapter"),
        ),
        questions=tuple(Question(messages=chat) for chat in chats),
        max_tokens=20,
    )


@pytest.fixture
def job(tmp_path: Path) -> ProofJob:
    base = make_model(tmp_path / "base")
    lora = make_adapter(tmp_path / "lora", base, target_modules=["q_proj", "down_proj"])
    out = merged(tmp_path / "out", base, lora)
    models, adapter = (Input(path=base), Input(path=out)), Input(path=lora)
    envelope: dict[str, Any] = {"builder": "merge", "output": tmp_path, "seconds": 0}
    return ProofJob(
        **envelope,
        reference=ReferenceJob(
            **envelope,
            models=models,
            adapters=(adapter,),
            walks=(AskedWalk(tasks=(task(CHATS),), choose=False),),
        ),
        validation=ValidateJob(
            **envelope,
            base=models[0],
            merged=models[1],
            adapters=(adapter,),
            weights=(1.0,),
            chats=CHATS,
            scope="all",
            mixture=None,
        ),
    )


def run(job: Any) -> Any:
    return STAGES[job.kind](job, lambda *_: None)


def told(found: Any) -> Any:
    return {name: value for name, value in found.items() if name not in MEASURED}


@pytest.mark.slow
def test_both_find_what_each_finds_by_itself(
    job: ProofJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    products: list[int] = []
    multiply = Lockstep.multiply
    monkeypatch.setattr(Lockstep, "multiply", lambda *a: (products.append(1), multiply(*a))[1])
    alone = run(job.reference)["answers"], run(job.validation)
    apart = len(products)

    found = run(job)

    assert alone[1]["passed"]
    assert [row["answer"] for row in found["answers"]["merged"]] == [
        row["answer"] for row in alone[0]["merged"]
    ]
    assert found["answers"] == alone[0]
    assert told(found["validation"]) == told(alone[1])
    assert len(products) - apart < 0.7 * apart  # drafts are read, not generated


@pytest.mark.slow
def test_a_wrong_merge_is_found_though_its_answers_are_drafts(job: ProofJob) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(job.validation.merged.path, lambda tensors: tensors[name].neg_())

    found = run(job)

    assert not found["validation"]["passed"]
    assert any(name in str(one) for one in found["validation"]["findings"])


def cut(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name][:, :-1].contiguous()


def without_tokenizer(merged: Path) -> None:
    for path in merged.glob("tokenizer*"):
        path.unlink()


def with_half_a_tokenizer(merged: Path) -> None:
    text = (merged / "tokenizer.json").read_text()
    (merged / "tokenizer.json").write_text(text[: len(text) // 2])


def with_other_heads(merged: Path) -> None:
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps(config | {"num_attention_heads": 3}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "check"),
    [
        (lambda merged: edit_tensors(merged, cut), "files"),
        (without_tokenizer, "tokenizer"),
        (with_half_a_tokenizer, "tokenizer"),
        (with_other_heads, "files"),
    ],
    ids=["shape", "no tokenizer", "half a tokenizer", "heads"],
)
def test_a_merge_that_cannot_answer_fails_its_validation(
    job: ProofJob, damage: Callable[[Path], None], check: str
) -> None:
    damage(job.validation.merged.path)

    found = run(job)

    assert found["answers"] == {}
    assert not found["validation"]["passed"]
    assert check in {one["check"] for one in found["validation"]["findings"]}


def test_a_model_that_gives_no_answers_is_validated_all_the_same(job: ProofJob) -> None:
    nothing = AskedWalk(tasks=(task([({"role": "user", "content": ""},) * 2]),), choose=False)
    (job.reference.models[0].path / "chat_template.jinja").write_text("")

    found = run(replace(job, reference=replace(job.reference, walks=(nothing,))))

    assert found["answers"] == {}
    assert found["validation"]["findings"]


def test_a_draft_belongs_to_the_question_whose_end_the_probe_is() -> None:
    known = (((1, 2, 3), (7, 8)), ((5, 3), (9,)))

    assert drafts([[2, 3], [5, 3], [4]], known) == {0: (7, 8), 1: (9,)}
