"""Image -> answers: the built image is started as its users will start it, and asked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from toolchain.evaluating.client import ask_all, chat, check_served_name, wait_until_healthy
from toolchain.evaluating.items import Item
from toolchain.ports import Endpoint, StartSpec, Tools
from toolchain.values import Artifact, Digest, Json, ServingConfig, StageInputs

RECIPE_NUMBER = 1
_ANSWERS = "answers.json"
_START_SECONDS = 600.0
_SLOWEST_DISK = 50_000_000
"""Bytes a second that weights are read with at the worst."""
_GREETING = Item(messages=({"role": "user", "content": "Hello"},), expected=("",), line=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What is started and what it is asked."""

    artifact: Artifact
    config: ServingConfig
    base: Digest
    """Digest of the image below the weights."""
    items: tuple[Item, ...]
    max_tokens: int
    memory_bytes: int
    questions: Digest
    port_variable: str = ""
    host_variable: str = ""
    threads_variable: str = ""
    neutral: frozenset[str] = frozenset()
    """Engine settings that change no answer, such as the number of slots."""

    @property
    def inputs(self) -> StageInputs:
        """All that the answers depend on: not the names, labels and limits of the image."""
        plan = self.config.plan
        settings = {k: v for k, v in dict(plan["settings"]).items() if k not in self.neutral}
        longest = max((sum(len(m["content"]) for m in i.messages) for i in self.items), default=0)
        return StageInputs(
            stage="trial",
            recipe_number=RECIPE_NUMBER,
            inputs={
                "artifact": self.artifact.digest,
                "base": self.base,
                "settings": settings,
                # A context that holds every question changes nothing by being longer; a token
                # is at least one character, and a chat template adds a few.
                "context": min(int(plan["max_model_len"]), longest + self.max_tokens + 256),
                "questions": self.questions,
                "max_tokens": self.max_tokens,
            },
        )


def known_answers(trial: Trial, tools: Tools) -> tuple[str, ...] | None:
    """Return the answers if an image of the same weights and engine was asked before."""
    entry = tools.store.find(trial.inputs.key)
    return tuple(json.loads(entry.tree.path(_ANSWERS).read_text("utf-8"))) if entry else None


def smoke_inputs(image: Digest) -> StageInputs:
    """Return what a successful start depends on: the image and nothing else."""
    return StageInputs(stage="smoke", recipe_number=RECIPE_NUMBER, inputs={"image": image})


def is_proven(image: Digest, trial: Trial, tools: Tools) -> bool:
    """Say whether this very image was started before and its questions are answered."""
    started = tools.store.find(smoke_inputs(image).key) is not None
    return started and (not trial.items or known_answers(trial, tools) is not None)


def ask(reference: str, image: Digest, trial: Trial, tools: Tools) -> tuple[str, ...]:
    """Start the image, wait for its health, ask one greeting and every unanswered question.

    Raises CheckFailed, with the server's last lines, for an image that does not start or answer.
    """
    spec = StartSpec(
        port=trial.config.port,
        env=_threads(trial),
        port_variable=trial.port_variable,
        host_variable=trial.host_variable,
        memory_bytes=trial.memory_bytes,
        use_gpu=trial.config.plan["device"] != "cpu",
    )
    with tools.launcher.serve(reference, spec) as endpoint:
        limit = max(_START_SECONDS, trial.artifact.tree.size / _SLOWEST_DISK)
        wait_until_healthy(endpoint, trial.config.health_path, limit, poll=0.05)
        check_served_name(endpoint, trial.config.served_name)
        chat(endpoint, trial.config.served_name, _GREETING, 4)
        answers = known_answers(trial, tools)
        if answers is None and trial.items:
            answers = _ask_all(endpoint, trial, tools)
    stage = smoke_inputs(image)
    tools.store.produce(stage.key, {"stage": "smoke", "inputs": stage.inputs}, lambda _: {})
    return answers or ()


def _threads(trial: Trial) -> Mapping[str, str]:
    """Leave one CPU to us: threads that wait for each other stand still when one is displaced."""
    if not trial.threads_variable:
        return {}
    return {trial.threads_variable: str(max(1, len(os.sched_getaffinity(0)) - 1))}


def _ask_all(endpoint: Endpoint, trial: Trial, tools: Tools) -> tuple[str, ...]:
    """Ask every question, and remember the answers by what they depend on."""
    name = trial.config.served_name
    answers = ask_all(endpoint, name, trial.items, trial.max_tokens, tools.progress)
    stage = trial.inputs

    def make(folder: Path) -> Mapping[str, Json]:
        (folder / _ANSWERS).write_text(json.dumps(answers, ensure_ascii=False), "utf-8")
        return {"n": len(answers)}

    tools.store.produce(stage.key, {"stage": "trial", "inputs": stage.inputs}, make)
    return answers
