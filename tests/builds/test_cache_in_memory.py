"""A build in memory, again: what is done once more after a change, and what is sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from weightsmith.building.record import BuiltTarget
from weightsmith.core.errors import CheckFailed

from tests.fakes.memory import QUESTIONS, Memory
from tests.fakes.tiny import write_adapter

TARGET = "llamacpp-q4_k_m"
LATE = ("bake", "evaluate", "publish")


@dataclass(frozen=True)
class Change:
    """A change of the recipe, and what a second build does because of it."""

    setting: str
    jobs: tuple[str, ...] = ()
    stages: tuple[str, ...] = ("publish",)
    """Those that are not cached."""
    questions: int = 0
    """How many the image is asked."""
    make: Callable[[Memory], object] = lambda memory: None


MERGED = (
    "merge", "validate", "reference adapter", "reference merged", "quantize", "quality",
)  # fmt: skip
AGAIN = ("merge", "validate", "reference", "quantize", "quality", *LATE)
CHANGES = (
    Change("serve.max_model_len=400", stages=("render", *LATE)),
    Change("serve.max_model_len=128", stages=("render", *LATE), questions=QUESTIONS),
    Change("serve.max_num_seqs=4", stages=("render", *LATE)),
    Change(  # requests of the replay set have the name
        "serve.served_model_name=other", stages=("render", *LATE), questions=QUESTIONS
    ),
    Change("evaluate.max_drop=0.5", stages=("publish",)),
    Change("evaluate.metric=exact"),
    Change(
        "evaluate.max_tokens=32",
        ("reference base", "reference adapter", "reference merged"),
        ("reference", "evaluate", "publish"),  # the replay set has longer answers
        QUESTIONS,
    ),
    Change("image.labels={team: a}", stages=("evaluate", "publish")),
    Change("adapters.0.version=v2", stages=("evaluate", "publish")),
    Change("validate.probes=a.jsonl", stages=()),
    Change("validate.probes=p.jsonl", ("validate",), ("validate",), make=lambda m: probes(m)),
    Change("quality.tokens=128", ("quality",), ("quality",)),
    Change("quality.limits={q4_k_m: {kl_mean: 0.2}}", stages=()),
    Change("quantize.imatrix='off'", MERGED[4:], ("quantize", "quality", *LATE), QUESTIONS),
    Change("quantize.imatrix=walk", MERGED[4:], ("quantize", "quality", *LATE), QUESTIONS),
    Change("merge.method=linear", ("merge",), ("merge", "evaluate", "publish")),
    Change("adapters.0.weight=0.5", MERGED, AGAIN, QUESTIONS),
    Change("version=1.0.0", MERGED, AGAIN, QUESTIONS, lambda m: new_adapter(m)),
)


def probes(memory: Memory) -> None:
    (memory.home / "p.jsonl").write_text('{"prompt": "Hi"}\n')


def new_adapter(memory: Memory) -> None:
    """Train it again."""
    (memory.home / "a").rename(memory.home / "old")
    write_adapter(memory.home / "a", seed=7)


def redone(built: BuiltTarget) -> tuple[str, ...]:
    return tuple(name for name, facts in built.stages.items() if not facts.cached)


@pytest.mark.parametrize("push", [False, True])
def test_a_second_build_does_nothing(warm: Memory, push: bool) -> None:
    first = warm.build(push=push)[TARGET]
    again = warm.build(push=push)[TARGET]

    assert redone(again) == ()
    assert again.published.digest == first.published.digest
    assert (first.published.uploaded_bytes > 100_000) == push
    assert again.published.uploaded_bytes == 0
    assert warm.journal.of("job", "load", "start", "tag", "untag") == []


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.setting)
def test_a_change_does_again_what_depends_on_it(warm: Memory, change: Change) -> None:
    warm.build()
    change.make(warm)

    again = warm.build(change.setting)[TARGET]

    assert tuple(warm.jobs()) == change.jobs
    assert redone(again) == change.stages
    assert len([q for _, q in warm.launcher.asked if q != "Hello"]) == change.questions
    assert ("start" in warm.journal.events) == ("evaluate" in change.stages)
    assert warm.left() == []


def test_a_plan_names_what_changed(warm: Memory) -> None:
    warm.build()
    same, other = warm.forecast()["stages"], warm.forecast("merge.dtype=float16")["stages"]
    rows = {row["stage"]: row for row in other}

    assert all(row["cached"] for row in same if row["stage"] != "publish")
    assert rows["merge"]["why"].startswith("changed: dtype; every target is made from base")
    assert rows["quantize"]["why"] == "merge comes first"
    assert rows["merge"]["read_bytes"] > 0 == rows["merge"]["write_bytes"]


def test_a_changed_context_sends_no_weights(warm: Memory) -> None:
    warm.build(push=True)

    again = warm.build("serve.max_model_len=128", push=True, force=True)[TARGET]

    assert 0 < again.published.uploaded_bytes < 50_000


def test_what_one_target_made_another_takes(warm: Memory) -> None:
    """Also what calibration measured, for another type of the same family."""
    built = warm.build(targets=["llamacpp-iq4_xs"])["llamacpp-iq4_xs"]

    assert warm.jobs() == ["quantize", "quality"]
    assert "statistics" in warm.runner.jobs[0].inputs
    assert redone(built) == ("quantize", "quality", "render", *LATE)


def test_a_walk_serves_all_types_and_nothing_else_is_measured(memory: Memory) -> None:
    """It is part of the first pass; its file is what a later one is given, which needs no text."""
    memory.build("quantize.imatrix=walk", targets=[TARGET, "llamacpp-iq4_xs"])
    (pass_,) = (job for job in memory.runner.jobs if job.kind == "quantize")

    assert pass_.virtual is not None
    assert pass_.texts
    assert (pass_.statistics, pass_.options["imatrix"]) == (None, "walk")
    assert {pass_.format, *(one.format for one in pass_.siblings)} == {"q4_k_m", "iq4_xs"}

    memory.build("quantize.imatrix=walk", targets=["llamacpp-iq4_nl"])
    assert memory.jobs() == ["quantize", "quality"]
    assert memory.runner.jobs[0].texts == ()
    assert memory.runner.jobs[0].statistics is not None


def test_a_damaged_result_is_made_again(warm: Memory, digest: str) -> None:
    """A store's file that lost its end is not taken for a result."""
    for key, entry in list(warm.store.entries.items()):
        if entry.tree.has("tiny.gguf"):
            copy = warm.folder / "copy"
            copy.mkdir()
            (copy / "tiny.gguf").write_bytes(b"")
            tree = replace(entry.tree, root=copy)
            warm.store.entries[key] = replace(entry, tree=tree)

    assert warm.build()[TARGET].published.digest == digest
    assert warm.jobs() == ["quantize"]


def test_a_refusal_is_given_again_without_asking(warm: Memory) -> None:
    """What was asked is kept with the answers, also where they were not good enough."""
    warm.store.forget("trial", "smoke")
    warm.minds.forgot["image"] = set(warm.facts)
    for _ in range(2):
        with pytest.raises(CheckFailed, match=r"image .*\b0"):
            warm.build()

    assert warm.launcher.asked == []
    assert warm.engine.names == {}
