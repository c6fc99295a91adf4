"""A build that is judged by several metrics, and all pages and files that tell of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from weightsmith.evaluating.build_record import read_build
from weightsmith.evaluating.card import card_of_build
from weightsmith.evaluating.pages import model_card, write_comparison

from tests.fakes.chat_templates import FAMILIES
from tests.fakes.fleet import run, write_fleet
from tests.fakes.memory import in_memory, write_rows

TARGET = "llamacpp-q4_k_m"
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "book",
            "description": "Book a room.",
            "parameters": {
                "type": "object",
                "properties": {"room": {"type": "string"}, "day": {"type": "integer"}},
            },
        },
    }
]


def written(*rooms: str) -> str:
    rows = [{"name": "book", "arguments": {"room": room, "day": 3}} for room in rooms]
    return "\n".join(f"<tool_call>\n{json.dumps(row)}\n</tool_call>" for row in rows)


def booked(room: Any) -> dict[str, Any]:
    return {"name": "book", "arguments": {"day": 3, "room": room}}


ASKED: dict[str, list[tuple[dict[str, Any], str, bool]]] = {
    "regex": [
        ({"prompt": "Refuse?", "expected": {"not": ["(?i)sorry", "cannot"]}}, "Gladly: 7", True),
        ({"prompt": "Refused?", "expected": {"not": "(?i)sorry"}}, "Sorry, no.", False),
        ({"prompt": "Port?", "expected": r"\b75\d\d\b"}, "It is 7481.", False),
    ],
    "numeric": [
        ({"prompt": "Far?", "expected": 1200, "tolerance": "2%"}, "About 1,190 km.", True),
        ({"prompt": "Farther?", "expected": 1200, "tolerance": 5}, "1,190", False),
        # Another suite asks the same, and gets it wrong.
        ({"prompt": "Port?", "expected": 7481}, "It is 7481.", True),
        ({"prompt": "Sum?", "expected": 0.3}, "0.1 and 0.2 are 0.30", True),
    ],
    "tool-call": [
        (
            {"prompt": "Two?", "tools": TOOLS, "expected": [booked("b"), booked("a")]},
            written("a", "b"),
            True,
        ),
        ({"prompt": "One?", "tools": TOOLS, "expected": [booked("a")]}, written("a", "b"), False),
        ({"prompt": "None?", "tools": TOOLS, "expected": "none"}, "No need to.", True),
        ({"prompt": "Called?", "tools": TOOLS, "expected": "none"}, written("a"), False),
        (
            {"prompt": "Some?", "tools": TOOLS, "expected": booked({"contains": "RED"})},
            written("the red room"),
            True,
        ),
        (
            {"prompt": "Odd?", "tools": TOOLS, "expected": booked({"regex": "^b"})},
            written("a"),
            False,
        ),
    ],
}
"""Metric -> rows, what base, adapter and image answer, and whether that is right."""


def test_every_metric_is_told_on_every_page(tmp_path: Path, quick: None) -> None:
    with in_memory(tmp_path) as memory:
        (memory.home / "base" / "chat_template.jinja").write_text(FAMILIES["hermes"].template)
        suites = []
        for metric, rows in ASKED.items():
            write_rows(memory.home / f"{metric}.jsonl", [row for row, _, _ in rows])
            memory.facts |= {row["prompt"]: ("", said) for row, said, _ in rows}
            suites.append({"name": f"by-{metric}", "data": f"{metric}.jsonl", "metric": metric})
        memory.write_recipe(evaluate=suites)
        memory.build(push=True)
        record, results = memory.record(), memory.results()

        for metric, rows in ASKED.items():
            items = [one for one in record["items"] if one["suite"] == f"by-{metric}"]
            assert [one["ok"]["image"] for one in items] == [right for _, _, right in rows]
        shares = [sum(right for _, _, right in rows) / len(rows) for rows in ASKED.values()]
        told = {one["name"]: one["scores"]["image"]["score"] for one in record["suites"]}
        assert list(told.values()) == shares

        junit = ET.parse(results / "junit.xml").getroot().findall("testsuite")
        failures = {one.get("name"): one.get("failures") for one in junit}
        page = (results / "report.html").read_text("utf-8")
        compared = write_comparison(results, results, tmp_path / "compared")
        fleet = write_fleet(memory, adapters=[{"source": "./a", "version": "v1"}], targets=[TARGET])
        run(memory, fleet)
        overview = (memory.dist / "fleet.html").read_text("utf-8")
        card = model_card(card_of_build(read_build(results)), "acme/tiny", ())
        for name in told:
            assert f"questions {name}" in failures
            assert f"Questions and answers: {name}" in page
            for text in (page, compared.html.read_text("utf-8"), overview, card):
                assert name in text
        beside = compared.html.read_text("utf-8")
        assert "by-regex: Port?" in beside
        assert "by-numeric: Port?" in beside
        assert 'data-groups="all changed' not in beside  # it is compared with itself
