"""What a node and a fleet take from each other: names inside their folders, and the right types."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest
from weightsmith.core.ports import Ended
from weightsmith.fleets import node_program as node
from weightsmith.fleets.requests import BASE, CellSummary, TaskReply, TaskRequest
from weightsmith.fleets.rows import CellRow, of_reply
from weightsmith.fleets.running import _read

OUTSIDE = ["/etc/passwd", "../up", "a/../../up", "a//b", "", ".", "a/.", "a\0b"]
REQUEST: dict[str, Any] = {
    "id": "1", "kind": BASE, "version": "1", "adapter": "a",
    "recipe": {}, "lock": {}, "targets": [], "stages": ["resolve"],
}  # fmt: skip
REPLY: dict[str, Any] = {"id": "1", "node": "far", "seconds": 1.0, "cpu_seconds": 1.0}


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_outside_the_folder_are_refused(name: str) -> None:
    key = "sha256:" + "0" * 64
    for wrong in ({"files": {name: ""}}, {"payloads": {name: key}}):
        with pytest.raises(ValueError, match="not the name of a file"):
            TaskRequest.from_json({**REQUEST, **wrong})
    with pytest.raises(ValueError, match="not the name of a file"):
        TaskReply.from_json({**REPLY, "files": {name: ""}})


@pytest.mark.parametrize(
    "wrong",
    [{"payloads": {"a": "sha256:0"}}, {"stages": []}, {"files": {"a": 1}}, {"targets": None}],
    ids=str,
)
def test_what_is_no_request_is_refused(
    wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = json.dumps({**REQUEST, **wrong}).encode() + b"\n"
    monkeypatch.setattr(node, "leave_quietly", lambda: None)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))

    assert node.main() == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "no request of a fleet" in said.err


@pytest.mark.parametrize(
    "row",
    [{"verdict": "great"}, {"score": "1"}, {"interval": [1, "2"]}, {"size": 1.5}, {"report": 3}, 1],
    ids=str,
)
def test_a_reply_that_no_table_could_show_is_a_failure_of_its_node(row: Any) -> None:
    reply = _read(Ended(id="1", node="far", text=json.dumps({**REPLY, "row": row})))

    found = of_reply(CellRow(adapter="a", target="t"), reply)
    assert (found.verdict, found.exit_code) == ("not made", 5)
    assert "cannot be read" in (found.error or "")


def test_a_row_comes_back_as_it_went() -> None:
    built = CellSummary(verdict="not proven", score=0.5, interval=(0.25, 0.75), digest="sha256:1")
    reply = TaskReply(id="1", node="far", seconds=1.0, cpu_seconds=1.0, row=built)

    assert _read(Ended(id="1", node="far", text=json.dumps(reply.to_json()))) == reply
