"""The proof job: a reference job and a validation in one process, as each by itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
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
DOWN = "model.layers.1.mlp.down_proj.weight"


def task(chats: Sequence[Any]) -> AskedTask:
    return AskedTask(
        models=(
            AskedModel(name="adapter", key="adapter", model=0, adapters=(0,), weights=(1.0,)),
            AskedModel(name="merged", key="merged", model=1, draft="adapter"),
        ),
        questions=tuple(Question(messages=chat) for chat in chats),
        max_tokens=20,
    )


def proof_of(base: Path, lora: Path, out: Path, folder: Path, asked: AskedTask) -> ProofJob:
    """Return the job that proves a merge in `out`; its questions are those that are asked."""
    models, adapter = (Input(path=base), Input(path=out)), Input(path=lora)
    envelope: dict[str, Any] = {"builder": "merge", "output": folder, "seconds": 0}
    walk = AskedWalk(tasks=(asked,), choose=False)
    return ProofJob(
        **envelope,
        reference=ReferenceJob(**envelope, models=models, adapters=(adapter,), walks=(walk,)),
        validation=ValidateJob(
            **envelope,
            base=models[0],
            merged=models[1],
            adapters=(adapter,),
            weights=(1.0,),
            chats=tuple(question.messages for question in asked.questions),
            scope="all",
            mixture=None,
        ),
    )


@pytest.fixture
def job(tmp_path: Path) -> ProofJob:
    base = make_model(tmp_path / "base")
    lora = make_adapter(tmp_path / "lora", base, target_modules=["q_proj", "down_proj"])
    return proof_of(base, lora, merged(tmp_path / "out", base, lora), tmp_path, task(CHATS))


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
    answers, validation = run(job.reference)["answers"], run(job.validation)
    apart = len(products)

    found = run(job)

    assert validation["passed"]
    assert found["answers"] == answers
    assert told(found["validation"]) == told(validation)
    assert len(products) - apart < 0.7 * apart  # drafts are read, not generated


@pytest.mark.slow
def test_a_wrong_merge_is_found_though_its_answers_are_drafts(job: ProofJob) -> None:
    edit_tensors(job.validation.merged.path, lambda tensors: tensors[DOWN].neg_())

    found = run(job)

    assert not found["validation"]["passed"]
    assert any(DOWN in str(one) for one in found["validation"]["findings"])


@pytest.mark.grid(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("damaged", "check"),
    [
        ("shape", "files"),
        ("no tokenizer", "tokenizer"),
        ("half a tokenizer", "tokenizer"),
        ("heads", "files"),
    ],
)
def test_a_merge_that_cannot_answer_fails_its_validation(
    job: ProofJob, damaged: str, check: str
) -> None:
    merged = job.validation.merged.path
    config, tokenizer = merged / "config.json", merged / "tokenizer.json"
    if damaged == "shape":
        edit_tensors(merged, lambda tensors: tensors.update({DOWN: tensors[DOWN][:, 1:].clone()}))
    elif damaged == "no tokenizer":
        for path in merged.glob("tokenizer*"):
            path.unlink()
    elif damaged == "half a tokenizer":
        tokenizer.write_text(tokenizer.read_text()[: len(tokenizer.read_text()) // 2])
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 3}))

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
