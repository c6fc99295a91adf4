"""build.json of builds in memory, against the published JSON Schema with a validator of its own."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from weightsmith.core.errors import CheckFailed
from weightsmith.evaluating.build_record import read_build
from weightsmith.evaluating.card import card_of_build

from tests.fakes.jobs import WRONG
from tests.fakes.memory import Memory
from tests.fakes.records import as_of_old
from tests.paths import ROOT

SCHEMA = ROOT / "docs" / "reference" / "build.schema.json"
TARGETS = ("llamacpp-q4_k_m", "vllm", "llamacpp-lora")


@cache
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(SCHEMA.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def check(document: Any) -> None:
    validator().validate(document)


def records(memory: Memory) -> dict[Path, Any]:
    found = sorted(memory.dist.rglob("build.json"))
    return {path.parent: json.loads(path.read_text("utf-8")) for path in found}


def spoil(memory: Memory) -> None:
    memory.bench.quality["layer_error"] = 0.9


def test_answers_that_were_carried_over_are_marked_and_judged_as_others(memory: Memory) -> None:
    """In the record, the report's pages and the card; no figure of the verdict changes."""
    memory.bench.carried = 5
    memory.build()
    folder, found = memory.results(), memory.record()
    check(found)
    said = "3 asked, 5 carried over from base + adapter by margin"
    assert (found["scores"]["merged"]["carried"], found["scores"]["merged"]["bound"]) == (5, 0.22)
    assert all("carried" not in found["scores"][who] for who in ("base", "adapter", "image"))
    for page in ("report.md", "report.html"):
        assert f"Merged: {said} (each token likelier" in (folder / page).read_text("utf-8")
    card = card_of_build(read_build(folder))
    assert any(said in check for check in card.checks)

    memory.bench.carried = 0
    memory.build()
    assert memory.record()["scores"] == found["scores"]  # the store keeps the mark
    memory.build("evaluate.max_tokens=8")
    asked = memory.record()
    assert "carried" not in asked["scores"]["merged"]
    for key in ("verdict", "unproven", "verdicts", "sameness", "items"):
        assert asked[key] == found[key]


def invalidate(memory: Memory) -> None:
    memory.bench.valid |= {"passed": False, "findings": [WRONG]}


@pytest.mark.parametrize("refused", [None, spoil, invalidate])
def test_what_a_build_records_is_what_the_schema_says(
    memory: Memory, refused: Callable[[Memory], None] | None
) -> None:
    if refused is None:
        memory.build(targets=list(TARGETS))
    else:
        refused(memory)
        with pytest.raises(CheckFailed):
            memory.build(targets=list(TARGETS))

    found = records(memory)
    assert found
    for folder, document in found.items():
        check(document)
        assert read_build(folder).to_json() == document


def test_a_record_without_a_key_or_with_another_type_is_not_what_the_schema_says(
    memory: Memory,
) -> None:
    memory.build(targets=list(TARGETS[:1]))
    (document,) = records(memory).values()

    for change in ({"stages": []}, {"base": {}}, {"created": 1}):
        with pytest.raises(jsonschema.ValidationError):
            check({**document, **change})
    del document["scores"]["image"]["n"]
    with pytest.raises(jsonschema.ValidationError):
        check(document)


@pytest.mark.parametrize("when", ["never", "now", "when it was merged"])
def test_a_record_says_whether_jobs_had_the_network(memory: Memory, when: str) -> None:
    """Also for what an earlier build made with it, and the store has kept."""
    stages = memory.bench.stages
    told = {"network_in_jobs": True} if when == "when it was merged" else {}

    def merge(job: Any, report: Any) -> Any:
        return {**stages["merge"](job, report), **told}

    memory.runner.stages = {**stages, "merge": merge}
    memory.runner.networked = when == "now"
    memory.build()

    assert memory.record()["network_in_jobs"] is (when != "never")


@pytest.mark.slow
@pytest.mark.parametrize("forms", ["outputs=[image]", "outputs=[image, volume]"])
def test_a_build_that_changes_nothing_leaves_record_and_report(memory: Memory, forms: str) -> None:
    memory.build(forms, push=True)
    memory.build(forms, push=True)  # of which all is cached, unlike the first
    folder = memory.results()
    as_of_old(folder / "build.json")
    files = [folder / name for name in ("build.json", "report.html", "report.md", "junit.xml")]
    before = {path: (path.read_bytes(), path.stat().st_ino) for path in files}

    memory.build(forms, push=True)
    assert {path: (path.read_bytes(), path.stat().st_ino) for path in files} == before

    memory.build(forms, 'card.license="mit"')
    assert memory.record()["recipe"]["card"] == {"license": "mit"}
    assert memory.record()["created"] >= json.loads(before[files[0]][0])["created"]


def test_a_report_is_written_again_although_the_clock_was_put_back(memory: Memory) -> None:
    memory.build()
    pages = [memory.results() / name for name in ("report.html", "report.md", "junit.xml")]
    for page in pages:
        page.write_text("of before")
        os.utime(page, (time.time() + 3600,) * 2)

    memory.build('card.license="mit"')
    assert all(page.read_text() != "of before" for page in pages)


@pytest.mark.slow
def test_a_report_that_is_gone_or_lacks_a_target_is_written_again(memory: Memory) -> None:
    for _ in range(2):
        memory.build()
    page = memory.results() / "report.html"
    page.unlink()
    memory.build()
    assert "llamacpp-q5_k_m" not in page.read_text()

    memory.build(targets=["llamacpp-q5_k_m"])
    memory.build()
    assert "llamacpp-q5_k_m" in page.read_text()
