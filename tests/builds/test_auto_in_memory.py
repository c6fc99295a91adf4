"""Builds in memory of the target `auto`: which candidate is chosen, and why others are left."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from weightsmith.api.commands.plan import table
from weightsmith.building import choosing
from weightsmith.building.choosing import _unread
from weightsmith.building.record import BuiltTarget
from weightsmith.building.targets import all_targets
from weightsmith.cli.commands import _facts, _lines
from weightsmith.core.devices import Devices
from weightsmith.core.errors import CheckFailed, EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.jobs import QuantizeJob
from weightsmith.core.values import Json
from weightsmith.evaluating.build_record import CandidateRecord
from weightsmith.models.facts import ModelFacts

from tests.fakes.configs import config
from tests.fakes.fleet import run, write_fleet
from tests.fakes.jobs import LOSSY, NOTHING
from tests.fakes.memory import Memory, in_memory, write_rows

MANY = 60
"""Enough questions to test every candidate."""
SMALLEST, MIX = "llamacpp-mix, bits 4.3", "llamacpp-mix"


def question(number: int) -> tuple[str, str]:
    return f"What does a say to {number}?", f"a says {number * number}."


@pytest.fixture
def memory(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    # In this model the smallest mix is as large as IQ4_XS, and the next 1.3 % larger than IQ4_NL.
    every = {name: one for name, one in all_targets().items() if name != "llamacpp-iq4_xs"}
    monkeypatch.setattr(choosing, "all_targets", lambda: every)
    monkeypatch.setattr(choosing, "_ALIKE", 1.012)
    with in_memory(tmp_path) as made:
        ask(made, MANY)
        yield made


def ask(memory: Memory, count: int, **recipe: Any) -> None:
    rows = [{"prompt": q, "expected": a} for q, a in map(question, range(count))]
    write_rows(memory.home / "a.jsonl", rows)
    memory.minds.facts = memory.facts = {q: ("a", a) for q, a in map(question, range(count))}
    suite = {"data": "a.jsonl", "max_drop": 0.2}
    usual = {"targets": ["auto"], "auto": {"engine": "llamacpp"}, "evaluate": suite}
    memory.write_recipe(**{**usual, **recipe})


def tried(memory: Memory) -> str:
    """The candidate that is built now."""
    notes = [text for text in memory.progress.said if text.startswith("auto: trying ")]
    return notes[-1].removeprefix("auto: trying ").rpartition(", ")[0]


def harm(memory: Memory, lost: Mapping[str, int]) -> None:
    """Let images of these targets answer so many questions wrongly."""
    knows = memory.launcher.answer

    def answer(text: str, adapter: str) -> str:
        forgot = {question(number)[0] for number in range(lost.get(tried(memory), 0))}
        return NOTHING if text in forgot else knows(text, adapter)

    memory.launcher.answer = answer


def left(found: Json) -> list[tuple[str, str]]:
    """Names and stages of the candidates that were tried."""
    rows = found["candidates"] if isinstance(found, Mapping) else found.to_json()["candidates"]
    return [(CandidateRecord.from_json(row).name, row["stage"]) for row in rows if row["seconds"]]


def chosen(memory: Memory, *settings: str, **wanted: Any) -> BuiltTarget:
    return memory.build(*settings, **wanted)["auto"]


def test_the_smallest_that_is_proven_is_chosen_and_is_the_image_of_its_target(
    memory: Memory,
) -> None:
    built = chosen(memory)
    record = memory.record(MIX)

    assert (built.target.name, built.verdict) == (MIX, "passed")
    assert memory.jobs().count("quantize") == 1
    (row,) = (one for one in record["auto"]["candidates"] if not one["left"])
    assert (row["target"], row["options"]) == (record["target"], {"bits": 4.3})
    assert record["recipe"]["quantize"] == {"bits": 4.3}
    assert row["price"] > 0 < row["size"]
    assert row["sequence"][0]["asked"] == MANY
    assert 0 < row["sequence"][0]["proven_at"] < MANY
    assert record["recipe"]["targets"] == [MIX]
    facts: Any = _facts(built)
    assert (facts["target"], facts["auto"]) == (MIX, record["auto"])
    assert any(f"{SMALLEST}: chosen" in line for line in _lines(built))
    memory.build("quantize.bits=4.3", targets=[MIX])
    assert memory.jobs() == []
    assert memory.launcher.asked == []
    assert memory.record(MIX)["image"]["digest"] == built.published.digest


def test_what_loses_too_much_is_left_as_soon_as_that_is_clear(memory: Memory) -> None:
    harm(memory, {SMALLEST: 200})

    built = chosen(memory)

    assert left(built.auto) == [(SMALLEST, "evaluate"), (IQ4, "")]
    assert built.auto
    first, second = built.auto.candidates[:2]
    assert "cannot prove any more that the drop is below 0.2" in first.left
    assert 0 < first.sequence[0].asked < 60
    assert first.sequence[0].lost > first.sequence[0].asked / 2
    assert not first.sequence[0].proven_at
    assert second.sequence[0].asked == MANY
    # Merge, answers and importance are made once.
    jobs = memory.jobs()
    assert [jobs.count(one) for one in ("merge", "reference adapter", "quantize")] == [1, 1, 2]
    page = (memory.results(built.target.name) / "report.html").read_text("utf-8")
    assert "What was tried" in page
    assert "cannot prove any more" in page
    assert "not published" not in " ".join(memory.record(built.target.name)["warnings"])
    refused = json.loads((memory.results(MIX) / "refused" / "build.json").read_text())
    assert refused["recipe"]["quantize"] == {"bits": 4.3}


def test_the_gate_on_text_leaves_a_candidate_before_any_question(memory: Memory) -> None:
    usual = memory.runner.stages["quality"]
    lossy = lambda job, report: (  # noqa: E731
        LOSSY if tried(memory) == SMALLEST else usual(job, report)
    )
    memory.runner.stages = {**memory.runner.stages, "quality": lossy}

    built = chosen(memory)

    assert left(built.auto) == [(SMALLEST, "quality"), (IQ4, "")]
    assert built.auto
    assert built.auto.candidates[0].sequence == ()
    assert memory.journal.of("start") == ["start"]


def test_none_is_proven(memory: Memory) -> None:
    rows = memory.forecast()["auto"]["candidates"]
    harm(memory, {CandidateRecord.from_json(row).name: MANY for row in rows})

    with pytest.raises(
        CheckFailed, match=r"\d+ candidates were tried, and none is proven"
    ) as caught:
        chosen(memory, "auto.at_most=300KB")

    assert caught.value.hint.startswith("raise auto.at_most, train the adapter further")
    assert "\nreport: " in caught.value.hint
    rows = caught.value.details["auto"]["candidates"]
    stages = [row["stage"] for row in rows if row["seconds"]]
    assert set(stages) == {"evaluate"}
    assert 3 <= len(stages) <= caught.value.details["auto"]["tests"]
    assert all(row["left"] for row in rows)


def test_too_few_questions_are_refused_before_any_work(memory: Memory) -> None:
    ask(memory, 12)

    for what in (memory.build, memory.forecast):
        with pytest.raises(InputRefused, match="nothing can be proven: 12 questions") as caught:
            what()
        assert caught.value.details["questions_needed"] == 14
        assert "ask 14 questions or more, or set max_drop to 0.221" in caught.value.hint
    assert memory.journal.events == []


def test_few_questions_test_few_candidates_of_all_sizes(memory: Memory) -> None:
    ask(memory, 16)
    names = [f"llamacpp-mix, bits {bits}" for bits in (5.0, 5.4, 6.0)]
    harm(memory, dict.fromkeys((*names, "llamacpp-q5_k_m", "llamacpp-q5_k_s"), MANY))

    with pytest.raises(CheckFailed, match="1 candidates were tried") as caught:
        chosen(memory)

    assert caught.value.details["auto"]["tests"] == 1
    assert "the questions can test 1 candidates: ask more" in caught.value.hint
    rows = caught.value.details["auto"]["candidates"]
    assert (
        "so sizes are spread"
        in next(row for row in rows if row["options"] == {"bits": 4.3})["left"]
    )


def test_an_interrupted_choice_goes_on(memory: Memory) -> None:
    harm(memory, {SMALLEST: 200})
    reached = memory.launcher.answer

    def interrupt(text: str, adapter: str) -> str:
        if tried(memory) != SMALLEST:
            raise KeyboardInterrupt
        return reached(text, adapter)

    usual = memory.runner.stages["quality"]

    def stop(job: Any, report: Any) -> Mapping[str, Json]:
        if tried(memory) != SMALLEST:
            raise KeyboardInterrupt
        return usual(job, report)

    memory.runner.stages = {**memory.runner.stages, "quality": stop}
    with pytest.raises(KeyboardInterrupt):
        chosen(memory)
    assert memory.seen() == ["refused"]
    memory.runner.stages = {**memory.runner.stages, "quality": usual}

    built = chosen(memory)

    assert left(built.auto)[0] == (SMALLEST, "evaluate")
    assert built.auto
    assert built.auto.candidates[0].sequence[0].asked < 60
    assert memory.jobs() == ["quality", "export-engine"] or memory.jobs() == ["quality"]
    assert memory.journal.of("start") == ["start"]  # the first one is not asked again


def test_a_second_build_does_nothing_and_writes_nothing(memory: Memory) -> None:
    harm(memory, {SMALLEST: 200})
    chosen(memory)
    built = chosen(memory)  # its record says that all was cached
    before = (memory.results(built.target.name) / "build.json").read_bytes()

    again = chosen(memory)

    assert memory.jobs() == []
    assert memory.journal.of("start") == []
    assert again.published.digest == built.published.digest
    assert (memory.results(built.target.name) / "build.json").read_bytes() == before


def test_weights_that_are_larger_than_the_next_ones_wait_for_their_turn(memory: Memory) -> None:
    usual = memory.runner.stages["quantize"]

    def heavy(job: QuantizeJob, report: Any) -> Mapping[str, Json]:
        memory.bench.padding = 260_000 if job.options.get("bits") == 4.3 else 0
        return usual(job, report)

    memory.runner.stages = {**memory.runner.stages, "quantize": heavy}

    built = chosen(memory)

    assert left(built.auto) == [(IQ4, "")]
    assert memory.journal.of("start") == ["start"]


def test_what_a_budget_leaves_out(memory: Memory) -> None:
    plan = memory.forecast("auto.at_most=250KB")
    rows = plan["auto"]["candidates"]
    assert {row["left"] for row in rows if row["price"] > 250_000} >= {"larger than auto.at_most"}
    assert all(row["price"] <= 250_000 for row in rows if not row["left"])

    for what in (memory.build, memory.forecast):
        with pytest.raises(InputRefused, match=r"auto\.at_most: the smallest candidate") as caught:
            what("auto.at_most=1KB")
        assert "set auto.at_most to 1MB or more" in caught.value.hint


def test_weights_over_the_budget_are_left(memory: Memory) -> None:
    memory.bench.padding = 300_000
    with pytest.raises(CheckFailed, match=r"auto\.at_most is") as caught:
        chosen(memory, "auto.at_most=250KB")
    assert re.fullmatch(r"set auto\.at_most to 1MB\nreport: .*", caught.value.hint)


def test_a_candidate_that_was_asked_nothing_is_no_test(memory: Memory) -> None:
    """Sixteen questions test one candidate: not the one that is over the budget."""
    usual, made = memory.runner.stages["quantize"], list[str]()

    def heavy(job: QuantizeJob, report: Any) -> Mapping[str, Json]:
        made.append(tried(memory))
        memory.bench.padding = 300_000 if len(made) == 1 else 0
        return usual(job, report)

    ask(memory, 16)
    memory.runner.stages = {**memory.runner.stages, "quantize": heavy}

    built = chosen(memory, "auto.at_most=300KB")

    assert left(built.auto) == [(made[0], "evaluate"), (made[1], "")]
    assert built.auto
    assert built.auto.tests == 1


def test_a_plan_has_the_candidates_in_their_order(memory: Memory) -> None:
    plan = memory.forecast()
    rows = plan["auto"]["candidates"]
    tries = [row["price"] for row in rows if not row["left"]]

    assert tries == sorted(tries)
    lefts = {row["target"]: row["left"] for row in rows}
    assert "the model has none: all would be q8_0" in lefts["llamacpp-mxfp4_moe"]
    assert rows[0]["target"] == MIX == next(iter(plan["serving"]))
    assert {tuple(row["options"].items()) for row in rows} > {(), (("bits", 4.3),)}
    shown = table(plan)
    assert "auto: the first of these that is proven" in shown
    assert f"  {SMALLEST}, 21" in shown
    chosen(memory)
    again = memory.forecast()["auto"]["candidates"]  # whatever sizes files really have
    assert [(row["target"], row["left"]) for row in again] == [
        (row["target"], row["left"]) for row in rows
    ]


@pytest.mark.parametrize(
    ("settings", "error", "why"),
    [
        (("quantize.bits=5",), UsageError, "quantize.bits fixes what"),
        (("quantize.size=1GB",), UsageError, "quantize.size fixes what"),
        (("quantize.tensor_types={a: q8_0}",), UsageError, "quantize.tensor_types fixes what"),
        (("quantize.mix=recipe.yaml",), UsageError, "quantize.mix fixes what"),
        (("quantize.fit=gpu", "serve.gpu_memory=4GiB"), UsageError, "quantize.fit fixes what"),
        (("auto.prefer=taste",), UsageError, r"auto\.prefer"),
        (("auto.at_most=little",), UsageError, r"auto\.at_most"),
        (("auto.at_most=0B",), UsageError, r"auto\.at_most: no weights have 0B"),
        (("auto.engine=nothing",), UsageError, "unknown engine 'nothing'"),
        (("auto=null",), UsageError, "needs `auto` in the recipe"),
        (("auto={}",), UsageError, "engine"),
        (("evaluate=null",), InputRefused, "the recipe has no `evaluate`"),
        (("evaluate.max_drop=0",), InputRefused, "no number of questions proves"),
    ],
)
def test_bad_input_is_refused_before_any_job(
    memory: Memory, settings: tuple[str, ...], error: type[Exception], why: str
) -> None:
    for ask_for in (memory.build, memory.forecast):
        with pytest.raises(error, match=why):
            ask_for(*settings)
    assert memory.jobs() == []


def test_other_targets_are_built_first(memory: Memory, tmp_path: Path) -> None:
    built = memory.build(targets=["auto", "llamacpp-q8_0"], layout=tmp_path / "image")

    assert list(built) == ["llamacpp-q8_0", "auto"]
    assert [path.name for path in sorted((tmp_path / "image").iterdir())] == [
        MIX, "llamacpp-q8_0",
    ]  # fmt: skip


def test_several_engines_share_one_order(memory: Memory) -> None:
    suite = {"data": "a.jsonl", "max_drop": 0.2}
    memory.use_vllm("auto", auto={"engine": ["vllm", "llamacpp"]}, evaluate=suite)
    names = [row["target"] for row in memory.forecast()["auto"]["candidates"]]

    assert {name.partition("-")[0] for name in names} == {"vllm", "llamacpp"}


def test_the_best_of_several_engines_is_chosen(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp's small ones and AWQ lose too much, llama.cpp's Q4_1 does not; then AWQ wins.

    Answers and validation are made once for both engines, and each image is started by its own. The
    merge is written for AWQ, which llama.cpp does not need.
    """
    ask(memory, MANY, auto={"engine": ["llamacpp", "vllm"], "at_most": "260KB"})
    monkeypatch.setattr(choosing, "_ALIKE", 1.005)  # AWQ is 0.8 % larger than the mix
    small, larger = [SMALLEST, IQ4, Q4S], "llamacpp-q4_1"
    harm(memory, dict.fromkeys([*small, "vllm-awq"], 200))

    built = chosen(memory)

    lost = [(name, "evaluate") for name in [*small, "vllm-awq"]]
    assert left(built.auto) == [*lost, (larger, "")]
    jobs = memory.jobs()
    kinds = ("merge", "reference adapter", "validate")
    assert [jobs.count(one) for one in kinds] == [2, 1, 1]
    record = memory.record(larger)
    assert record["auto"]["engines"] == ["llamacpp", "vllm"]
    reasons = {row["target"]: row["left"] for row in record["auto"]["candidates"]}
    assert "no kernel for it on a CPU" in reasons["vllm-nvfp4"]

    memory.launcher.answer = memory._answer
    harm(memory, dict.fromkeys(small, 200))
    again = memory.build("serve.max_model_len=256")["auto"]

    assert left(again.auto) == [*lost[:-1], ("vllm-awq", "")]
    assert again.target.engine.name == "vllm"


def test_awq_is_tried_before_a_mix_of_about_its_size(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At equal size it loses less. Here, the sizes differ by 8 %."""
    monkeypatch.setattr(choosing, "_ALIKE", 1.1)
    suite = {"data": "a.jsonl", "max_drop": 0.2}
    memory.use_vllm("auto", auto={"engine": "vllm"}, evaluate=suite)
    found = memory.forecast()["auto"]["candidates"]
    rows = {(row["target"], row["options"].get("bits")): row["left"] for row in found}

    assert rows["vllm-awq", None] == ""
    assert rows["vllm-mix", 5.0] == "about as large as vllm-awq, which is tried"


def test_engines_of_one_size_differ_in_speed(memory: Memory) -> None:
    """Of sizes within 4 %, one is tried of each engine: the faster is known when both ran."""
    auto = {"engine": ["llamacpp", "vllm"], "prefer": "speed", "at_most": "240KB"}
    ask(memory, MANY, auto=auto)
    memory.bandwidth = 8e6
    paces = {SMALLEST: 20, MIX46: 32, "vllm-awq": 33, Q4S: 30}

    def work(tokens: int) -> None:
        memory.ticks += tokens / paces[tried(memory)] - 1

    memory.launcher.worked = work

    built = chosen(memory)

    assert left(built.auto) == [("vllm-awq", "")]
    assert speeds_of(memory.record("vllm-awq")["auto"]) == paces


def test_a_suite_that_its_base_passes_too_is_refused_before_any_candidate(memory: Memory) -> None:
    memory.minds.facts = {q: ("", a) for q, a in map(question, range(MANY))}

    with pytest.raises(CheckFailed, match="the base alone"):
        chosen(memory)

    assert "export-engine" not in memory.jobs()


def test_all_suites_must_be_proven(memory: Memory) -> None:
    suites = [
        {"name": "task", "data": "a.jsonl", "max_drop": 0.1},
        {"name": "floor", "data": "a.jsonl", "min_score": 0.9},
    ]
    ask(memory, MANY, evaluate=suites)

    built = chosen(memory)

    assert built.auto
    (row,) = (one for one in built.auto.candidates if not one.left)
    assert [one.suite for one in row.sequence] == ["task", "floor"]
    assert all(one.proven_at for one in row.sequence)


def test_a_fleet_names_its_targets(memory: Memory) -> None:
    path = write_fleet(memory, targets=["auto"])

    with pytest.raises(UsageError, match="the target auto is chosen by a build of its own"):
        run(memory, path)


IQ4, MIX46, Q4S = "llamacpp-iq4_nl", "llamacpp-mix, bits 4.6", "llamacpp-q4_k_s"


def prefer_speed(memory: Memory, **speeds: float) -> None:
    """Let these write so many tokens per second, in the order of what the memory allows.

    That is 36.9 of the smallest (8 MB/s by 221 KB, of which 4 KB are an embedding), then 34.6, 34.4
    and 31.5.
    """
    ask(memory, MANY, auto={"engine": "llamacpp", "prefer": "speed"})
    memory.bandwidth = 8e6
    names = {"first": SMALLEST, "second": MIX46, "third": Q4S, "fourth": "llamacpp-q4_k_m"}
    paces = {names[which]: speed for which, speed in speeds.items()}

    def work(tokens: int) -> None:
        memory.ticks += (tokens + 7) / paces[tried(memory)] - 1  # the clock itself counts one

    memory.launcher.worked = work


def speeds_of(found: Json) -> dict[str, float]:
    """Tokens per second of the candidates that were measured."""
    rows = map(CandidateRecord.from_json, found["candidates"])
    return {row.name: row.speed for row in rows if row.speed}


def test_the_fastest_that_is_proven_is_chosen_by_what_was_measured(memory: Memory) -> None:
    """What the memory allows only orders them: the first is slower than it, and so waits."""
    prefer_speed(memory, first=20, second=30, third=33)

    built = chosen(memory)

    record = memory.record(Q4S)
    assert built.target.name == Q4S
    assert speeds_of(record["auto"]) == {Q4S: 33.0, MIX46: 30.0, SMALLEST: 20.0}
    assert memory.journal.of("start") == ["start"] * 3
    assert left(built.auto) == [(Q4S, "")]  # no other was asked
    assert (record["auto"]["prefer"], record["auto"]["bandwidth"]) == ("speed", 8e6)
    rows = {row["target"]: row for row in record["auto"]["candidates"] if row["options"] == {}}
    assert rows[Q4S]["foreseen_speed"] == 34.4
    assert rows["llamacpp-q8_0"]["left"] == "not tried: a faster one is proven"
    for page in ("report.md", "report.html"):
        text = (memory.results(Q4S) / page).read_text("utf-8")
        assert "The fastest image that is proven was chosen" in text
        for said in ("33 tokens/s", "20 tokens/s", "at most 18.7 tokens/s", "read at 0.008 GB/s"):
            assert said in text
    assert f"  {Q4S}, 33 tokens/s: chosen" in _lines(built)


def test_a_fast_one_that_loses_too_much_gives_way_to_the_next_fastest(memory: Memory) -> None:
    prefer_speed(memory, first=20, second=30, third=33, fourth=28)
    harm(memory, {Q4S: MANY})

    built = chosen(memory)

    assert left(built.auto) == [(Q4S, "evaluate"), (MIX46, "")]
    assert built.auto
    assert [one.speed for one in built.auto.candidates[:2]] == [33.0, 30.0]

    # Nothing is measured again, although the memory seems to be a little faster.
    again = chosen(memory)
    assert (memory.jobs(), memory.journal.of("start")) == ([], [])
    assert again.published.digest == built.published.digest
    assert again.auto
    assert speeds_of(again.auto.to_json()) == speeds_of(built.auto.to_json())
    page = memory.results(built.target.name) / "build.json"
    before = page.read_bytes()
    memory.bandwidth = 8.01e6
    chosen(memory)
    assert page.read_bytes() == before


def test_an_embedding_that_is_the_output_layer_is_read_for_each_token() -> None:
    """As that of a Gemma is, whose config.json does not say so."""
    assert _unread(ModelFacts.of(config("Gemma3ForCausalLM", 2, 64, 4, 1))) == 0
    assert _unread(ModelFacts.of(config("LlamaForCausalLM", 2, 64, 4, 1))) == 64 * 128_256


def test_speed_in_a_plan(memory: Memory) -> None:
    prefer_speed(memory)
    plan = memory.forecast()
    tries = [row["foreseen_speed"] for row in plan["auto"]["candidates"] if not row["left"]]
    assert tries == sorted(tries, reverse=True)
    assert f"  {SMALLEST}, 215.8 KiB, at most 36.9 tokens/s\n" in table(plan)


def test_a_server_that_does_not_count_has_no_speed(memory: Memory) -> None:
    prefer_speed(memory, first=20, second=30, third=33)
    memory.launcher.counts = False
    with pytest.raises(CheckFailed, match=r"none is proven.*its speed cannot be measured"):
        chosen(memory, "auto.at_most=240KB")


def test_speed_is_not_measured_for_gpus(memory: Memory) -> None:
    suite = {"data": "a.jsonl", "max_drop": 0.2}
    memory.engine.answering = False
    memory.launcher.runs_on = Devices(cpu="Memory CPU 7", cpus=2, gpus=("NVIDIA L4",))
    auto = {"engine": "vllm", "prefer": "speed"}
    memory.use_vllm("auto", auto=auto, evaluate=suite, serve={"gpu": "nvidia-l4"})
    with pytest.raises(EnvironmentFailure, match="its speed is measured on CPUs") as caught:
        memory.forecast()
    assert "auto.prefer: size" in caught.value.hint


def judge(memory: Memory, printed: str) -> Mapping[str, Any]:
    """A suite of the questions, judged by a program that prints this of `rows`."""
    program = memory.home / "judge.py"
    program.write_text(
        "import json, sys\n"
        "rows = [json.loads(line) for line in sys.stdin]\n"
        "ok = [any(one in row['answer'] for one in row['expected']) for row in rows]\n"
        f"print(json.dumps({printed}))\n"
    )
    command = [sys.executable, str(program)]
    return {"data": "a.jsonl", "max_drop": 0.2, "metric": "command", "command": command}


def test_a_program_may_judge_the_candidates(memory: Memory) -> None:
    ask(memory, MANY, evaluate=judge(memory, "{'ok': ok}"))
    harm(memory, {SMALLEST: 20})

    built = chosen(memory)

    assert built.auto
    lost, kept = (one for one in built.auto.candidates if one.sequence)
    assert (lost.name, kept.left) == (SMALLEST, "")
    # It judges all answers at once, so every question is asked.
    assert (lost.sequence[0].asked, lost.sequence[0].lost) == (MANY, 20)
    assert (kept.sequence[0].asked, kept.sequence[0].lost) == (MANY, 0)
    assert 0 < kept.sequence[0].proven_at < MANY


def test_a_program_that_judges_all_answers_together_is_refused_before_any_candidate(
    memory: Memory,
) -> None:
    ask(memory, MANY, evaluate=judge(memory, "{'score': sum(ok) / len(ok), 'n': len(ok)}"))

    with pytest.raises(CheckFailed, match="there is no result per question"):
        chosen(memory)

    assert "export-engine" not in memory.jobs()
