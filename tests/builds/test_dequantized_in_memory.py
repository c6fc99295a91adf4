"""An image that cannot be started here: its weights answer the questions in transformers.

As one for a GPU, or for a CPU with AMX where there is none.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from weightsmith.core import platforms
from weightsmith.core.errors import CheckFailed, EnvironmentFailure
from weightsmith.core.jobs import DequantizedJob
from weightsmith.fleets.ordering import foreseen, ordered
from weightsmith.serving.devices import AMX_FLAGS
from weightsmith.steps.tools import JobMemory

from tests.fakes.fleet import run, write_fleet
from tests.fakes.memory import QUESTIONS, Memory, questions

TARGET, GGUF, ON_AMX = "vllm-fp8", "llamacpp-q4_k_m", "vllm-w8a8"
HERE = "this machine has none"
UNKNOWN = "the container engine does not say that its machine has one"
NOT_ASKED = "the image was not asked, since it is for a GPU and none is here"


@pytest.fixture
def on_gpu(memory: Memory) -> Memory:
    """The same build for a GPU, which is not here."""
    serve_on(memory, TARGET, "nvidia-h100-80gb")
    return memory


@pytest.fixture
def on_amx(memory: Memory) -> Memory:
    """The same build for a CPU with AMX."""
    serve_on(memory, ON_AMX, "cpu-amx")
    return memory


def serve_on(memory: Memory, target: str, gpu: str) -> None:
    memory.use_vllm(target, serve={"max_model_len": 256, "max_num_seqs": 2, "gpu": gpu})


def scores(memory: Memory, target: str) -> dict[str, float]:
    return {who: one["score"] for who, one in memory.record(target)["scores"].items()}


def test_the_record_says_that_the_weights_answered_and_not_the_image(on_gpu: Memory) -> None:
    on_gpu.build()

    record = on_gpu.record(TARGET)
    assert scores(on_gpu, TARGET) == {"base": 0, "adapter": 1, "merged": 1, "dequantized": 1}
    said = f"{NOT_ASKED}; its dequantized weights were, in transformers"
    assert record["unproven"][0] == said
    (verdict,) = (one for one in record["verdicts"] if one["subject"] == "dequantized")
    assert (verdict["against"], verdict["binding"], verdict["passed"]) == ("adapter", True, True)
    report = (on_gpu.results(TARGET) / "report.md").read_text()
    assert f"| dequantized weights, in transformers | {QUESTIONS} of {QUESTIONS} |" in report
    (run,) = (line for line in report.splitlines() if "docker run" in line)
    assert run.split()[-3:-1] == ["--gpus", "all"]
    (job,) = (one for one in on_gpu.runner.jobs if isinstance(one, DequantizedJob))
    (task,) = job.tasks
    prompts = [each.messages[-1]["content"] for each in task.questions]
    assert list(task.drafts) == [on_gpu.minds.facts[prompt][1] for prompt in prompts]

    on_gpu.build()
    assert on_gpu.jobs() == []


@pytest.mark.slow
def test_a_fleet_shows_the_score_of_the_weights_that_answered(
    on_gpu: Memory, at_once: None
) -> None:
    rows, _ = run(on_gpu, write_fleet(on_gpu, adapters=["./a"], targets=[TARGET]))

    (cell,) = rows.cells
    assert (cell.verdict, cell.score, cell.answered, cell.drop) == (
        "not proven", 1.0, "dequantized", 0.0,
    )  # fmt: skip
    assert cell.interval
    assert "<td>dequantized weights</td>" in (on_gpu.dist / "fleet.html").read_text()


def test_weights_that_forgot_are_not_published(on_gpu: Memory) -> None:
    on_gpu.minds.forgot["dequantized"] = {prompt for prompt, _ in questions("a")[:3]}

    with pytest.raises(CheckFailed, match="the dequantized model in transformers scores"):
        on_gpu.build()
    assert on_gpu.seen() == ["1", "refused"]  # the engine, and the report


def test_weights_that_cannot_be_read_are_not_asked_and_stop_nothing(on_gpu: Memory) -> None:
    on_gpu.bench.quality.clear()
    on_gpu.bench.quality["skipped"] = "no such architecture"
    on_gpu.build()

    said = "the dequantized weights were not asked: no such architecture"
    assert said in on_gpu.progress.warnings
    assert "dequantized" not in on_gpu.record(TARGET)["scores"]
    assert on_gpu.record(TARGET)["unproven"][0] == NOT_ASKED

    on_gpu.build()
    assert on_gpu.jobs() == []


@pytest.mark.parametrize("sees", [True, False])
def test_the_report_says_that_no_picture_was_tried(on_gpu: Memory, sees: bool) -> None:
    """What keeps the merged weights is not asked again."""
    config = on_gpu.home / "base" / "config.json"
    tower = {"vision_config": {"hidden_size": 8, "num_hidden_layers": 1}} if sees else {}
    config.write_text(json.dumps({**json.loads(config.read_text()), **tower}))

    assert planned(on_gpu, target="vllm") == {}
    on_gpu.build(targets=["vllm"])

    assert "dequantized" not in on_gpu.jobs()
    assert on_gpu.record("vllm")["unproven"][0] == NOT_ASKED
    assert on_gpu.record("vllm")["image"].get("takes_pictures", False) == sees
    banner, rest, _ = (on_gpu.results("vllm") / "report.html").read_text().partition("</div>")
    assert rest
    said = "no picture was tried, because the image was not started"
    assert (said in banner.lower()) == sees
    assert any("no picture was tried" in text for text in on_gpu.progress.warnings) == sees


def planned(memory: Memory, *settings: str, target: str = TARGET, **more: Any) -> dict[str, Any]:
    return memory.planned("dequantized", *settings, targets=[target], **more)


def test_the_plan_has_the_stage_with_its_memory_and_time(on_gpu: Memory) -> None:
    before = planned(on_gpu, measure=True)

    assert (before["target"], before["cached"]) == (TARGET, False)
    assert before["why"] == "its image is for a GPU and none is here; its weights do not exist yet"
    assert before["peak_memory_bytes"] > 700 << 20
    base = sum(file.stat().st_size for file in (on_gpu.home / "base").glob("*.safetensors"))
    assert 0 < before["read_bytes"] < base  # of the packed weights alone
    assert before["seconds"] > 0

    on_gpu.build()
    after = planned(on_gpu, measure=True)
    assert (after["cached"], after["why"], after["seconds"]) == (True, "", None)

    on_gpu.engine.gpu = True
    assert planned(on_gpu) == {}
    on_gpu.engine.gpu = False
    on_gpu.write_recipe(targets=[TARGET], evaluate=None)
    assert planned(on_gpu) == {}


def test_a_build_without_the_memory_for_it_ends_before_any_work(on_gpu: Memory) -> None:
    settings = ("quality.gate=false", "validate.enabled=false")
    needed = planned(on_gpu, *settings)["peak_memory_bytes"]
    on_gpu.room = JobMemory(budget=needed // 2, limit=needed - (64 << 20))

    with pytest.raises(EnvironmentFailure, match=f"dequantized {TARGET} needs") as caught:
        on_gpu.build(*settings)
    assert "set evaluate.limit" in caught.value.hint
    assert on_gpu.jobs() == []


def test_scales_of_a_cache_do_not_ask_the_same_weights_again(on_gpu: Memory) -> None:
    on_gpu.build()
    wanted = "serve.kv_cache_dtype=fp8"
    assert planned(on_gpu, wanted)["cached"]

    on_gpu.build(wanted)
    assert "dequantized" not in on_gpu.jobs()


def test_a_file_is_asked_only_where_no_platform_is_this_machine_s(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platforms.platform, "machine", lambda: "x86_64")
    both, other = (
        f"image.platforms=[{each}]" for each in ("linux/amd64, linux/arm64", "linux/arm64")
    )
    assert planned(memory, both, target=GGUF) == {}
    assert planned(memory, other, target=GGUF)["why"] == (
        "its image, for linux/arm64, cannot be started here; its weights do not exist yet"
    )

    memory.build(both, targets=[GGUF])
    assert "dequantized" not in memory.jobs()
    memory.build(other, targets=[GGUF])
    assert memory.jobs() == ["dequantized"]
    assert planned(memory, other, target=GGUF)["cached"]


def test_on_a_cpu_with_amx_it_is_started_and_asked(on_amx: Memory) -> None:
    on_amx.launcher.flags = AMX_FLAGS | {"avx512f"}
    assert planned(on_amx, target=ON_AMX) == {}

    (built,) = on_amx.build().values()

    assert built.started == on_amx.record(ON_AMX)["image"]["started"] == "linux/amd64"
    assert [one.use_gpu for one in on_amx.launcher.started] == [False]
    assert on_amx.record(ON_AMX)["plan"]["device"] == "cpu-amx"
    assert scores(on_amx, ON_AMX) == {"base": 0, "adapter": 1, "merged": 1, "image": 1}
    report = (on_amx.results(ON_AMX) / "report.md").read_text()
    assert f"| image | {QUESTIONS} of {QUESTIONS} |" in report
    assert "| dequantized weights" not in report
    assert "Checks passed by the started image: health" in report
    assert "Memory on cpu-amx" in report
    (run,) = (line for line in report.splitlines() if "docker run" in line)
    assert "--gpus" not in run


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (frozenset(), HERE),
        (AMX_FLAGS - {"amx_bf16"}, HERE),
        (frozenset({"avx512f"}), HERE),
        (None, UNKNOWN),
    ],
)
def test_elsewhere_its_weights_are_and_the_report_says_why(
    on_amx: Memory, flags: frozenset[str] | None, why: str
) -> None:
    on_amx.launcher.flags = flags
    if flags is not None:
        assert planned(on_amx, target=ON_AMX)["why"].startswith(
            f"its image is for a CPU with AMX and {why}"
        )
    on_amx.build()

    assert "start" not in on_amx.journal.events
    assert scores(on_amx, ON_AMX) == {"base": 0, "adapter": 1, "merged": 1, "dequantized": 1}
    record = on_amx.record(ON_AMX)
    assert record["image"]["started"] == ""
    first = record["unproven"][0]
    assert first.startswith("the image was not asked, since it is for a CPU with AMX and")
    assert why in first
    assert first.endswith("; its dequantized weights were, in transformers")
    assert first[1:] in (on_amx.results(ON_AMX) / "report.md").read_text()
    assert any("for a CPU with AMX" in text and why in text for text in on_amx.progress.warnings)


def test_an_image_for_any_cpu_is_started_without_amx(on_amx: Memory) -> None:
    on_amx.build("serve.gpu=cpu")
    assert scores(on_amx, ON_AMX)["image"] == 1
    assert not any("was not asked" in text for text in on_amx.record(ON_AMX)["unproven"])


@pytest.mark.parametrize(("gpu", "gpus"), [("cpu", 0), ("cpu-amx", 0), ("nvidia-l4", 1)])
def test_a_fleet_s_task_needs_no_gpu_for_it(on_amx: Memory, gpu: str, gpus: int) -> None:
    serve_on(on_amx, ON_AMX, gpu)
    path = write_fleet(on_amx, adapters=["./a"], targets=[ON_AMX])

    (cell,) = foreseen(ordered(path), on_amx.dist, on_amx.tools).cells

    assert cell.needs.gpus == gpus
