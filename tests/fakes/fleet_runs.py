"""Fleets of a user's folder in memory: a file, and a run of it on a test's engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from weightsmith.fleets.ordering import foreseen, ordered, run_fleet
from weightsmith.fleets.rows import FleetRows

from tests.fakes.fleet import MemoryFleet, by_tools
from tests.fakes.memory import Memory

Q4, Q5 = "llamacpp-q4_k_m", "llamacpp-q5_k_m"
GOOD = "not proven"
"""The verdict of all that goes well: eight questions prove little."""


def write_fleet(memory: Memory, **changes: Any) -> Path:
    """Write fleet.yaml: both adapters, each with its own questions, for two targets."""
    fleet = {
        "recipe": "recipe.yaml",
        "adapters": ["./a", {"source": "./b", "evaluate": {"data": "b.jsonl"}}],
        "targets": [Q4, Q5],
        **changes,
    }
    path = memory.home / "fleet.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in fleet.items() if value}))
    return path


def run(
    memory: Memory, path: Path, engine: MemoryFleet | None = None, **choices: Any
) -> tuple[FleetRows, MemoryFleet]:
    """Run a fleet with the tools of a test; its journal then tells of this run alone."""
    memory.journal.events.clear()
    memory.runner.jobs.clear()
    engine = engine or MemoryFleet(by_tools(memory.tools))
    outputs, tools = choices.pop("outputs", {}), choices.pop("tools", memory.tools)
    fleet = ordered(path, **choices)
    graph = foreseen(fleet, memory.dist, tools)
    rows = run_fleet(
        fleet, graph, engine, tools,
        dist=memory.dist, outputs=outputs, options={}, cpus=0, changed=lambda _: None,
    )  # fmt: skip
    return rows, engine


def facts(rows: FleetRows) -> list[tuple[str, str, str]]:
    return [(row.adapter, row.target, row.verdict) for row in rows.cells]
