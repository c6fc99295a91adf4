"""An image for a CPU with AMX is started where there is one; elsewhere its weights answer."""

from __future__ import annotations

import pytest
import yaml
from weightsmith.building.explain import forecast
from weightsmith.fleets.ordering import foreseen, ordered
from weightsmith.serving.devices import AMX_FLAGS

from tests.fakes.baking import push_base
from tests.fakes.fleet_runs import write_fleet
from tests.fakes.memory import QUESTIONS, Memory

TARGET = "vllm-w8a8"
HERE = "this machine has none"
UNKNOWN = "the container engine does not say that its machine has one"


@pytest.fixture
def on_amx(memory: Memory) -> Memory:
    """A build for such a CPU."""
    base, labels = f"{memory.registry.host}/engines/vllm:1", {"dev.weightsmith.engine": "vllm"}
    push_base(memory.client, base, labels, {"usr/bin/vllm": b"#!/usr/bin/python3"}, "linux/amd64")
    memory.write_recipe(
        targets=[TARGET],
        image={"repository": memory.repository, "base": base},
        serve={"max_model_len": 256, "max_num_seqs": 2, "gpu": "cpu-amx"},
    )
    return memory


def scores(memory: Memory) -> dict[str, float]:
    return {who: one["score"] for who, one in memory.record(TARGET)["scores"].items()}


def planned(memory: Memory) -> list[str]:
    """Return why the plan has the dequantized weights answer; [] if the image will."""
    request = memory.request()
    found = forecast(request.file, request.targets, memory.dist, memory.tools)
    return [row["why"] for row in found["stages"] if row["stage"] == "dequantized"]


def test_on_a_cpu_with_amx_it_is_started_and_asked(on_amx: Memory) -> None:
    on_amx.launcher.flags = AMX_FLAGS | {"avx512f"}
    assert planned(on_amx) == []

    (built,) = on_amx.build().values()

    assert built.started == on_amx.record(TARGET)["image"]["started"] == "linux/amd64"
    assert on_amx.launcher.with_gpu == [False]
    assert on_amx.record(TARGET)["plan"]["device"] == "cpu-amx"
    assert scores(on_amx) == {"base": 0, "adapter": 1, "merged": 1, "image": 1}
    report = (on_amx.results(TARGET) / "report.md").read_text()
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
    on_amx.build()

    assert "start" not in on_amx.journal.events
    assert scores(on_amx) == {"base": 0, "adapter": 1, "merged": 1, "dequantized": 1}
    record = on_amx.record(TARGET)
    assert record["image"]["started"] == ""
    first = record["unproven"][0]
    assert first.startswith("the image was not asked, since it is for a CPU with AMX and")
    assert why in first
    assert first.endswith("; its dequantized weights were, in transformers")
    assert first[1:] in (on_amx.results(TARGET) / "report.md").read_text()
    assert any("for a CPU with AMX" in text and why in text for text in on_amx.progress.warnings)


def test_the_plan_says_so_before(on_amx: Memory) -> None:
    (why,) = planned(on_amx)
    assert why.startswith("its image is for a CPU with AMX and this machine has none")


def test_an_image_for_any_cpu_is_started_without_amx(on_amx: Memory) -> None:
    on_amx.build("serve.gpu=cpu")
    assert scores(on_amx)["image"] == 1
    assert not any("was not asked" in text for text in on_amx.record(TARGET)["unproven"])


@pytest.mark.parametrize(("gpu", "gpus"), [("cpu", 0), ("cpu-amx", 0), ("nvidia-l4", 1)])
def test_a_fleet_s_task_needs_no_gpu_for_it(on_amx: Memory, gpu: str, gpus: int) -> None:
    recipe = yaml.safe_load((on_amx.home / "recipe.yaml").read_text())
    on_amx.write_recipe(**{**recipe, "serve": {**recipe["serve"], "gpu": gpu}})
    path = write_fleet(on_amx, adapters=["./a"], targets=[TARGET])

    (cell,) = foreseen(ordered(path), on_amx.dist, on_amx.tools).cells

    assert cell.needs.gpus == gpus
