"""The fleet's page and table: what they show of a fleet that runs, has stopped, or has ended."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from weightsmith.fleets.page import FILE, PAGE, Page, left_seconds, summary, table
from weightsmith.fleets.rows import ENDED, NOT_MADE, RUNNING, CellRow, FleetRows, SharedRow

REFRESH = '<meta http-equiv="refresh" content="5">'
DONE = CellRow(adapter="a", target="vllm", verdict="passed", state=ENDED)
OPEN = CellRow(adapter="b", target="vllm", state=RUNNING)
SHARED = SharedRow(task="base <b>", kind="base", cells=2, state=RUNNING)


def page(folder: Path, *cells: CellRow, stopped: bool = False) -> str:
    rows = FleetRows(cells=cells, shared=(SHARED,))
    Page(dist=folder, title="Fleet <i>").write(rows, stopped=stopped)
    assert len(json.loads((folder / FILE).read_text())["cells"]) == len(cells)
    return (folder / PAGE).read_text()


def test_it_is_read_again_while_the_fleet_runs(tmp_path: Path) -> None:
    running, ended = page(tmp_path, DONE, OPEN), page(tmp_path, DONE)

    for text in (running, ended):
        assert "<title>Fleet &lt;i&gt;</title>" in text
        assert "&lt;title&gt;" not in text
    assert REFRESH in running.partition("<style>")[0]
    assert REFRESH not in ended
    assert "Running" in running


def test_it_does_not_claim_to_run_after_an_interrupt(tmp_path: Path) -> None:
    text = page(tmp_path, DONE, OPEN, stopped=True)

    assert REFRESH not in text
    assert "<strong>Stopped</strong>" in text
    assert ">runs<" not in text


def test_it_says_whether_the_image_answered_or_its_weights(tmp_path: Path) -> None:
    weights = CellRow(
        adapter="c", target="vllm-awq", verdict="not proven", state=ENDED,
        score=0.75, answered="dequantized",
    )  # fmt: skip
    image = replace(weights, adapter="d", score=0.5, answered="image")

    text = page(tmp_path, weights, image, DONE)
    assert '<td class="number">0.750</td><td>dequantized weights</td>' in text
    assert '<td class="number">0.500</td><td>image</td>' in text
    assert '<td class="number"></td><td></td>' in text  # without questions
    said = table(FleetRows(cells=(weights, image, DONE), shared=())).splitlines()
    assert [line.split()[3:6] for line in said[1:3]] == [
        ["proven", "0.750", "dequantized"], ["proven", "0.500", "image"]
    ]  # fmt: skip


def test_errors_are_text(tmp_path: Path) -> None:
    error = "<script>alert(1)</script>\n  c  vllm  passed"
    bad = CellRow(adapter="b", target="vllm", verdict=NOT_MADE, error=error, state=ENDED)

    assert "<script>alert" not in page(tmp_path, bad)
    assert len(table(FleetRows(cells=(bad,), shared=())).splitlines()) == 2


def test_the_first_of_many_at_once_does_not_speak_for_all() -> None:
    """Sixteen run together for a minute each: six minutes for a hundred, and not a hundred."""
    built, waits = replace(DONE, tries=1), replace(OPEN, state="waiting")
    rows = FleetRows(cells=(built, *[OPEN] * 15, *[waits] * 84), shared=(), seconds=60.0)

    assert left_seconds(rows) == pytest.approx(60 / 8.5 * 91.5)
    assert left_seconds(FleetRows(cells=(OPEN, waits), shared=(), seconds=60.0)) is None


def test_a_long_time_left_is_said_in_hours() -> None:
    built, waits = replace(DONE, tries=1), replace(OPEN, state="waiting")
    rows = FleetRows(cells=(built, *[waits] * 72), shared=(), seconds=300.5)

    assert summary(rows).endswith(", about 6:00:36 left")
