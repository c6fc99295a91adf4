"""Several tasks in one job: each model answers what it answers in a job of its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.core.jobs import AskedModel, AskedTask, AskedWalk, Input, Question, ReferenceJob
from weightsmith.forward.libraries import ModelFails
from weightsmith.forward.lockstep import Lockstep
from weightsmith.merging import reference
from weightsmith.steps.answer_checkpoint import checkpointed_answers
from weightsmith.worker.jobs import STAGES

from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny"
LANDS = ("Avolia", "Brenland", "Costaria", "Dornia")
TASKS = (
    (("What is the capital of {}?",), 24),
    (("What is the capital of {}?", "Name the capital of the land that is called {}, please."), 9),
)


def changed(folder: Path, source: str, alpha: float) -> Path:
    """Write the tiny example's adapter with another strength."""
    made = Path(shutil.copytree(TINY / "adapters" / source, folder))
    file = made / "adapter_config.json"
    config = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(config | {"lora_alpha": alpha * config["lora_alpha"]}), "utf-8")
    return made


def job_of(folder: Path, *, choose: bool = False) -> ReferenceJob:
    """Return a job with one walk: the base and three adapters are asked two tasks each."""
    adapters = [
        changed(folder / f"{source}{alpha}", source, alpha)
        for source, alpha in (("a", 1.0), ("b", 1.0), ("a", 0.7))
    ]
    tasks = []
    for number, (texts, most) in enumerate(TASKS):
        models = [AskedModel(name="base", key=f"base {number}", model=0)]
        models += [
            AskedModel(name="adapter", key=f"{n} {number}", model=0, adapters=(n,), weights=(1.0,))
            for n in range(len(adapters))
        ]
        questions = tuple(
            Question(
                messages=({"role": "user", "content": text.format(land)},),
                choices=("Avo", "Brent, of course", land) if choose else (),
            )
            for text in texts
            for land in LANDS
        )
        tasks.append(AskedTask(models=tuple(models), questions=questions, max_tokens=most))
    output = folder / "output"
    output.mkdir()
    return ReferenceJob(
        builder="merge",
        models=(Input(path=TINY / "base"),),
        adapters=tuple(Input(path=path) for path in adapters),
        walks=(AskedWalk(tasks=tuple(tasks), choose=choose),),
        output=output,
        seconds=0,
    )


def run(job: ReferenceJob) -> Any:
    return STAGES[job.kind](job, lambda *_: None)["answers"]


def alone(job: ReferenceJob, wanted: AskedModel) -> Any:
    """Return what one model answers in a job without the others."""
    (walk,) = job.walks
    (task,) = (one for one in walk.tasks if wanted in one.models)
    only = replace(walk, tasks=(replace(task, models=(wanted,)),))
    return run(replace(job, walks=(only,)))[wanted.key]


@pytest.mark.slow
def test_each_answers_as_in_a_job_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(tmp_path)
    served: list[int] = []
    serve = Lockstep._serve
    monkeypatch.setattr(Lockstep, "_serve", lambda m, r: (served.append(len(r)), serve(m, r))[1])

    found = run(job)

    assert max(served) == 8, "models waited for each other at no matrix"
    assert checkpointed_answers(job.output) == found
    models = [one for task in job.walks[0].tasks for one in task.models]
    assert list(found) == [one.key for one in models]
    for one in models[::3]:
        rows = alone(job, one)
        for row, other in zip(found[one.key], rows, strict=True):
            margins = [[float(one) for one in each["margins"].split()] for each in (row, other)]
            assert margins[0] == pytest.approx(margins[1], abs=2e-3)
            assert {**row, "margins": ""} == {**other, "margins": ""}
    texts = {str([row["answer"] for row in rows]) for rows in found.values()}
    assert len(texts) > len(TASKS), "adapters that answer alike show nothing"


@pytest.mark.full
def test_each_chooses_as_in_a_job_of_its_own(tmp_path: Path) -> None:
    job = job_of(tmp_path, choose=True)

    found = run(job)

    assert checkpointed_answers(job.output) == found
    for task in job.walks[0].tasks:
        for one in task.models:
            for row, other in zip(found[one.key], alone(job, one), strict=True):
                assert row == pytest.approx(other, abs=1e-3)


@pytest.mark.parametrize("setting", [{"r": 5}, {"target_modules": ["nothing"]}])
def test_a_refusal_names_its_adapter(tmp_path: Path, setting: dict[str, Any]) -> None:
    job = job_of(tmp_path)
    file = job.adapters[1].path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | setting), "utf-8")

    with pytest.raises(InputRefused, match=str(job.adapters[1].path)):
        run(job)


def test_a_model_that_does_not_run_is_named_with_its_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error comes from transformers, which knows no adapter."""
    job, own = job_of(tmp_path), reference.greedy

    def fail(network: Any, asked: Any, advance: Any) -> Any:
        if "adapter_0" in getattr(network, "peft_config", {}):
            raise ModelFails("shapes differ")
        return own(network, asked, advance)

    monkeypatch.setattr(reference, "greedy", fail)
    (walk,) = job.walks
    one, other = walk.tasks[0].models[:2]
    task = replace(walk.tasks[0], models=(one, other))

    with pytest.raises(InputRefused, match=f"with {job.adapters[0].path} does not run"):
        run(replace(job, walks=(replace(walk, tasks=(task,)),)))

    assert checkpointed_answers(job.output).keys() == {one.key}
