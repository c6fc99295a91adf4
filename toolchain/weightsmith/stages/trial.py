"""Image -> answers: the built image is started as its users will start it, checked and asked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weightsmith.errors import CheckFailed
from weightsmith.evaluating.client import wait_until_healthy
from weightsmith.evaluating.session import ServerSession
from weightsmith.evaluating.smoke import Promise, Smoke, check_life, check_serving
from weightsmith.evaluating.task import Answers, Task, ask_server
from weightsmith.ports import Endpoint, StartSpec
from weightsmith.serving.plan import ServingConfig
from weightsmith.tools import Tools
from weightsmith.values import Artifact, Digest, Json, StageInputs

RECIPE_NUMBER = 2
_ANSWERS = "answers.json"
_START_SECONDS = 600.0
_SLOWEST_DISK = 50_000_000
"""Bytes a second that weights are read with at the worst."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A task, and who of those that the image serves is to answer it."""

    task: Task
    ends: int
    """How many answers of the reference ended by themselves."""
    model: str = ""
    """The name that requests ask for; "" for the image's own."""
    fields: Mapping[str, Json] = field(default_factory=dict)
    """Further fields of each request, where a name does not choose the adapter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What is started and what it is asked."""

    artifact: Artifact
    config: ServingConfig
    base: Digest
    """Digest of the image below the weights."""
    asked: tuple[Asked, ...]
    memory_bytes: int
    port_variable: str = ""
    host_variable: str = ""
    threads_variable: str = ""
    neutral: frozenset[str] = frozenset()
    """Engine settings that change no answer, such as the number of slots."""

    def inputs(self, asked: Asked) -> StageInputs:
        """All that a task's answers depend on: not the names, labels and limits of the image."""
        plan, task = self.config.plan, asked.task
        chosen = {"of": [asked.model, dict(asked.fields)]} if asked.model or asked.fields else {}
        settings = {k: v for k, v in plan.settings.items() if k not in self.neutral}
        longest = max((sum(len(m["content"]) for m in i.messages) for i in task.items), default=0)
        return StageInputs(
            stage="trial",
            recipe_number=RECIPE_NUMBER,
            inputs={
                "artifact": self.artifact.digest,
                "base": self.base,
                "settings": settings,
                # A context that holds every question changes nothing by being longer; a token
                # is at least one character, and a chat template adds a few.
                "context": min(plan.max_model_len, longest + task.max_tokens + 256),
                "questions": task.digest,
                "max_tokens": task.max_tokens,
                **chosen,
            },
        )

    @property
    def promise(self) -> Promise:
        """What the checks hold the server to."""
        return Promise(
            served_name=self.config.served_name,
            health_path=self.config.health_path,
            max_model_len=self.config.plan.max_model_len,
            max_num_seqs=self.config.plan.max_num_seqs,
            start_seconds=max(_START_SECONDS, self.artifact.tree.size / _SLOWEST_DISK),
        )


def known_answers(trial: Trial, asked: Asked, tools: Tools) -> Answers | None:
    """Return the answers if an image of the same weights and engine was asked before."""
    entry = tools.store.find(trial.inputs(asked).key)
    return tuple(json.loads(entry.tree.path(_ANSWERS).read_text("utf-8"))) if entry else None


def smoke_inputs(image: Digest) -> StageInputs:
    """Return what a successful start depends on: the image and nothing else."""
    return StageInputs(stage="smoke", recipe_number=RECIPE_NUMBER, inputs={"image": image})


def checks_of(image: Digest, tools: Tools) -> Sequence[Mapping[str, Json]]:
    """Return what the checks of an image saw when it passed them; () where it was not started."""
    entry = tools.store.find(smoke_inputs(image).key)
    return tuple(entry.meta.get("checks", ())) if entry else ()


def is_proven(image: Digest, trial: Trial, tools: Tools) -> bool:
    """Say whether this very image was started before and its questions are answered."""
    started = tools.store.find(smoke_inputs(image).key) is not None
    return started and all(known_answers(trial, one, tools) is not None for one in trial.asked)


def ask(reference: str, image: Digest, trial: Trial, tools: Tools) -> tuple[Answers, ...]:
    """Start the image, check it, ask every unanswered question; return each task's answers.

    Raises CheckFailed, with the server's last lines, for an image that does not start, does not
    answer, or does not keep what its plan promises.
    """
    spec = StartSpec(
        port=trial.config.port,
        env=_threads(trial),
        port_variable=trial.port_variable,
        host_variable=trial.host_variable,
        memory_bytes=trial.memory_bytes,
        shm_bytes=trial.config.plan.shm_bytes,
        use_gpu=trial.config.plan.device != "cpu",
    )
    smoke, promise = Smoke(), trial.promise
    with tools.launcher.serve(reference, spec) as endpoint, ServerSession(endpoint) as session:
        smoke.check("health", session, lambda: _healthy(endpoint, promise))
        check_serving(smoke, session, promise)
        answers = tuple(
            known_answers(trial, one, tools) or _ask_task(session, trial, one, tools)
            for one in trial.asked
        )
        check_life(smoke, endpoint, promise)
    stage = smoke_inputs(image)
    tools.store.produce(
        stage.key,
        {"stage": "smoke", "inputs": stage.inputs},
        lambda _: {"checks": smoke.checks},
    )
    return answers


def _healthy(endpoint: Endpoint, promise: Promise) -> str:
    waited = wait_until_healthy(endpoint, promise.health_path, promise.start_seconds)
    apart = ", ".join(endpoint.confinement)
    return f"ready after {waited:.1f} s" + (f"; {apart}" if apart else "")


def _threads(trial: Trial) -> Mapping[str, str]:
    """Leave one CPU to us: threads that wait for each other stand still when one is displaced."""
    if not trial.threads_variable:
        return {}
    return {trial.threads_variable: str(max(1, len(os.sched_getaffinity(0)) - 1))}


def _ask_task(session: ServerSession, trial: Trial, asked: Asked, tools: Tools) -> Answers:
    """Ask every question of a task, and remember the answers by what they depend on."""
    answers = ask_server(
        session.adding(asked.fields),
        asked.model or trial.config.served_name,
        asked.task,
        tools.progress,
    )
    _check_ends(answers, asked.ends, session)
    stage = trial.inputs(asked)

    def make(folder: Path) -> Mapping[str, Json]:
        (folder / _ANSWERS).write_text(json.dumps(answers, ensure_ascii=False), "utf-8")
        return {"n": len(answers)}

    tools.store.produce(stage.key, {"stage": "trial", "inputs": stage.inputs}, make)
    return answers


def _check_ends(answers: Answers, expected: int, session: ServerSession) -> None:
    """Raise CheckFailed where answers no longer end by themselves, as when the end token is lost.

    Half as many as the reference's is the limit: other weights may answer at more length.
    """
    ends = sum(answer.get("finish_reason") == "stop" for answer in answers)
    if 2 * ends < expected:
        raise CheckFailed(
            f"only {ends} of {len(answers)} answers end by themselves, of the reference's"
            f" {expected}{session.log()}",
            hint="the end token may be lost: compare eos_token_id in generation_config.json and"
            " the chat template with the adapter's",
        )
