"""Builds in memory with `bench`: who is refused, what is said elsewhere, and where it lands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from weightsmith.cli.commands import _facts
from weightsmith.core.devices import Devices
from weightsmith.core.errors import CheckFailed, InputRefused, UsageError
from weightsmith.evaluating.bench_files import read_results
from weightsmith.evaluating.pages import write_comparison

from tests.fakes.bench_results import aiperf, guidellm, write
from tests.fakes.fleet import GOOD, Q4, run, write_fleet
from tests.fakes.memory import STAGES, Memory
from tests.fakes.predicting import add_predicting

CPU = "Memory CPU 7"
LOAD = {"concurrency": 2, "prompt_tokens": 4, "output_tokens": 2}


@pytest.fixture
def bench(memory: Memory) -> Iterator[Any]:
    """A function that builds with these limits; each word of a server takes 4 ms."""

    def build(results: tuple[Path, ...] = (), **limits: Any) -> dict[str, Any]:
        memory.write_recipe(bench={**LOAD, **limits})
        memory.launcher.pace = 0.004
        read = tuple(read_results(path, "tiny") for path in results)
        memory.build(results=read)
        return dict(memory.record()["bench"])

    return build


def verdicts(found: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one["verdict"] for one in found["figures"] if one["verdict"]}


def test_without_it_nothing_changes(memory: Memory) -> None:
    """Omitted and null are the same, and a recipe with it makes the same image."""
    plain = memory.build()["llamacpp-q4_k_m"].published.digest
    without = memory.record()
    memory.write_recipe(bench=None)
    null = memory.build()["llamacpp-q4_k_m"].published.digest
    memory.write_recipe(bench={**LOAD, "min_tokens_per_s": 1})
    measured = memory.build()["llamacpp-q4_k_m"].published.digest
    record = memory.record()

    assert plain == null == measured
    assert tuple(without["stages"]) == STAGES
    assert "bench" not in without
    assert "bench" not in without["recipe"]
    assert record["bench"]["image"] == measured
    assert record["inputs"] == without["inputs"]


def test_a_throttled_server_fails_on_the_named_device(memory: Memory, bench: Any) -> None:
    with pytest.raises(CheckFailed, match="too slow on Memory CPU 7") as caught:
        bench(device="memory cpu 7", max_itl_p95_ms=1, max_ttft_p95_ms=60_000)
    refused = memory.results() / "refused"
    found = json.loads((refused / "build.json").read_text())
    junit = ET.parse(refused / "junit.xml")
    failed = [
        case.get("name") for case in junit.iter("testcase") if case.find("failure") is not None
    ]

    assert "at most 1" in caught.value.message
    assert "bench" in caught.value.hint
    assert verdicts(found["bench"]) == {"ttft_p95_ms": "met", "itl_p95_ms": "exceeded"}
    assert found["bench"]["rounds"] == 10  # it was measured again before it was believed
    assert found["verdict"] == "failed"
    assert failed == ["itl_p95_ms"]
    assert "exceeded" in (refused / "report.html").read_text()
    assert not (memory.results() / "build.json").exists()
    assert memory.left() == []


@pytest.mark.parametrize("device", ["Memory CPU 8", "NVIDIA H100", ""])
def test_elsewhere_it_is_reported_and_published(memory: Memory, bench: Any, device: str) -> None:
    found = bench(device=device, max_itl_p95_ms=1, min_tokens_per_s=1e6)
    record, page = memory.record(), (memory.results() / "report.html").read_text()
    junit = ET.parse(memory.results() / "junit.xml")
    skipped = [c.get("name") for c in junit.iter("testcase") if c.find("skipped") is not None]

    assert verdicts(found) == {"itl_p95_ms": "not shown here", "tokens_per_s": "not shown here"}
    assert (found["here"], found["machine"], found["rounds"]) == (False, CPU, 5)
    assert all(one["value"] > 0 for one in found["figures"])
    assert record["refused"] == ""
    assert "not shown here" in page
    assert f"Measured on {CPU}" in page
    assert {"itl_p95_ms", "tokens_per_s"} <= set(skipped)
    assert any(line[0] == "note" and "not shown here" in line[1] for line in memory.progress.lines)


def test_met_limits_pass(memory: Memory, bench: Any) -> None:
    found = bench(device=CPU, max_ttft_p95_ms=60_000, max_itl_p95_ms=60_000, goodput=1.0)

    assert set(verdicts(found).values()) == {"met"}
    assert found["here"]
    assert found["requests"] == 40
    assert memory.record()["stages"]["bench"]["cached"] is False


def test_it_is_printed_and_compared(memory: Memory, bench: Any) -> None:
    bench(device=CPU, max_ttft_p95_ms=60_000)
    facts: Any = _facts(memory.build()["llamacpp-q4_k_m"])
    pages = write_comparison(memory.results(), memory.results(), memory.folder / "compared")
    rows = pages.markdown.read_text("utf-8").splitlines()

    assert facts["bench"] == memory.record()["bench"]
    assert f"| speed measured on | {CPU} | {CPU} | the same |" in rows
    assert any(row.startswith("| first token, p95, ms |") for row in rows)


def test_it_is_measured_anew_in_each_build(memory: Memory, bench: Any) -> None:
    bench(device=CPU)
    bench(device=CPU)

    assert memory.journal.events.count("start") == 1  # no other stage starts the image again
    assert memory.jobs() == []


def test_the_plan_says_who_can_refuse(memory: Memory) -> None:
    memory.write_recipe(bench={**LOAD, "device": "H100", "min_tokens_per_s": 5})
    elsewhere = memory.planned("bench")["why"]
    memory.write_recipe(bench={**LOAD, "device": CPU, "min_tokens_per_s": 5})
    here = memory.planned("bench")["why"]
    memory.launcher.runs_on = None
    unknown = memory.planned("bench")["why"]
    memory.write_recipe(bench={**LOAD, "concurrency": 3})
    crowd = memory.planned("bench")["why"]

    assert elsewhere == (
        f"measured in each build; the limits are for H100, and this is {CPU}: nothing is refused"
    )
    assert here == "measured in each build"
    assert "an unknown device" in unknown
    assert crowd == "measured in each build; the server answers 2 at once, so the others wait"


def test_an_image_for_gpus_is_held_by_its_gpu(memory: Memory) -> None:
    memory.launcher.runs_on = Devices(cpu="Some CPU 9", cpus=8, gpus=("NVIDIA H100 80GB HBM3",))
    memory.use_vllm(
        serve={"max_model_len": 256, "max_num_seqs": 2, "gpu": "nvidia-h100-80gb"},
        bench={**LOAD, "device": "H100", "min_tokens_per_s": 5},
    )

    assert memory.planned("bench")["why"] == "measured in each build"


def test_an_image_that_cannot_be_started_is_not_measured(memory: Memory) -> None:
    memory.use_vllm(
        serve={"max_model_len": 256, "max_num_seqs": 2, "gpu": "nvidia-l4"},
        bench={**LOAD, "device": "L4", "min_tokens_per_s": 5},
    )
    memory.build()
    found = memory.record("vllm")["bench"]

    assert (found["figures"], found["skipped"]) == ([], "the image was not started")
    assert "bench: nothing was measured: the image was not started" in memory.progress.warnings
    assert "Not measured" in (memory.results("vllm") / "report.html").read_text()
    assert "Not measured" in (memory.results("vllm") / "report.md").read_text()


def test_requests_that_do_not_fit_are_refused_before_any_work(memory: Memory) -> None:
    memory.write_recipe(bench={"prompt_tokens": 500, "output_tokens": 64})
    with pytest.raises(UsageError, match="564 together, and a request of llamacpp-q4_k_m has") as e:
        memory.build()

    assert "serve.max_model_len" in e.value.hint
    assert memory.jobs() == []


def test_results_of_both_tools_are_bound_to_the_image(
    memory: Memory, bench: Any, tmp_path: Path
) -> None:
    files = (
        write(tmp_path / "benchmarks.json", guidellm()),
        write(tmp_path / "profile_export_aiperf.json", aiperf(ttft=900)),
    )
    found = bench(files, max_ttft_p95_ms=500, device="H100")
    image = memory.record()["image"]["digest"]
    page = (memory.results() / "report.html").read_text()

    assert found["image"] == image
    assert [one["tool"] for one in found["evidence"]] == ["guidellm", "aiperf"]
    assert [len(one["sha256"]) for one in found["evidence"]] == [64, 64]
    assert [verdicts(one) for one in found["evidence"]] == [
        {"ttft_p95_ms": "met"},
        {"ttft_p95_ms": "exceeded"},
    ]
    assert any("first token, p95 900 ms" in text for text in memory.progress.warnings)
    assert found["evidence"][0]["sha256"] in page

    memory.write_recipe(adapters=[{"source": "./a", "version": "v2", "weight": 0.5}], bench=None)
    with pytest.raises(InputRefused, match=f"was measured on the image {image}"):
        memory.build(results=[read_results(files[0], "tiny")])
    assert memory.left() == []


def test_a_results_file_is_about_the_image_that_its_name_says(
    memory: Memory, tmp_path: Path
) -> None:
    memory.build()
    digest = memory.record()["image"]["digest"]
    ours = write(tmp_path / f"run@{digest.replace(':', '-')}.json", guidellm())
    other = write(tmp_path / f"run@sha256-{'0' * 64}.json", guidellm())
    nobody = write(tmp_path / "benchmarks.json", guidellm())

    memory.build(results=[read_results(ours, "tiny")])
    assert memory.record()["bench"]["evidence"][0]["image"] == digest
    assert not any("nothing shows" in one for one in memory.progress.warnings)
    with pytest.raises(InputRefused, match=f"its name says sha256:{'0' * 64}"):
        memory.build(results=[read_results(other, "tiny")])
    memory.build(results=[read_results(nobody, "tiny")])
    assert "image" not in memory.record()["bench"]["evidence"][0]
    assert any(f"NAME@{digest.replace(':', '-')}" in one for one in memory.progress.warnings)
    assert "nothing shows that it is about this" in (memory.results() / "report.html").read_text()


def test_results_alone_measure_nothing(memory: Memory, tmp_path: Path) -> None:
    file = write(tmp_path / "benchmarks.json", guidellm())
    memory.build()
    memory.build(results=[read_results(file, "tiny")])
    found = memory.record()["bench"]

    assert "start" not in memory.journal.events
    assert found["figures"] == []
    assert [one["limit"] for one in found["evidence"][0]["figures"]] == [None] * 3


def test_a_server_that_dies_under_the_load_is_refused_anywhere(memory: Memory, bench: Any) -> None:
    memory.launcher.dies_at = "river"
    with pytest.raises(CheckFailed, match="stopped under a load of 2 requests at once") as caught:
        bench(device="H100", max_ttft_p95_ms=60_000)

    assert "out of memory" in caught.value.message
    assert (memory.results() / "refused" / "build.json").is_file()
    assert memory.left() == []


def test_in_a_fleet_only_the_cell_that_is_too_slow_ends(two: Memory) -> None:
    """Its limits are the cell's own, and its report says what was measured."""
    row = {"source": "./b", "evaluate": {"data": "b.jsonl"}}
    two.write_recipe(adapters=None, bench={**LOAD, "device": CPU, "max_itl_p95_ms": 60_000})
    passed, _ = run(two, write_fleet(two, adapters=["./a", row], targets=[Q4]))
    two.launcher.pace = 0.004
    two.write_recipe(adapters=None, bench={**LOAD, "device": CPU, "max_itl_p95_ms": 1})
    refused, _ = run(two, write_fleet(two, adapters=["./a"], targets=[Q4]))

    assert [cell.verdict for cell in passed.cells] == [GOOD, GOOD]
    assert [(cell.verdict, cell.exit_code) for cell in refused.cells] == [("refused", 4)]
    page = Path(refused.cells[0].report).read_text()
    assert "exceeded" in page


def test_drafts_are_compared_with_a_start_without_them(memory: Memory) -> None:
    memory.write_recipe(bench=LOAD, serve={"speculative": {"method": "ngram"}})
    memory.build()
    found = memory.record()["bench"]["drafts"]

    drafting, plain = memory.launcher.started[-2:]
    assert "LLAMA_ARG_SPEC_TYPE" not in drafting.env  # as its image says
    assert plain.env["LLAMA_ARG_SPEC_TYPE"] == "none"
    assert len(found["drafted"]) == len(found["undrafted"]) == 3
    assert found["interval"][0] <= found["times"] <= found["interval"][1]
    for page in ("report.html", "report.md"):
        assert found["reason"] in (memory.results() / page).read_text()
    assert "once more without drafts" in memory.planned("bench")["why"]


def test_vllm_is_started_without_drafts_by_an_argument(memory: Memory) -> None:
    memory.use_vllm()
    add_predicting(memory.home / "base", "numbered")
    speculative = {"method": "mtp", "tokens": 1}
    memory.write_recipe(bench=LOAD, serve={"speculative": speculative}, targets=["vllm"])
    memory.build()

    assert memory.launcher.started[-1].arguments == ("--speculative-config", "None")
    assert memory.launcher.started[-2].arguments == ()


def test_nothing_is_compared_without_drafts(memory: Memory, bench: Any) -> None:
    assert "drafts" not in bench(device=CPU)
