"""Every step of a build, foreseen and run: what was foreseen is held against what came out."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from weightsmith.building import build as building
from weightsmith.building import explain, pipeline
from weightsmith.building.explain import BuildPlan, plan_of
from weightsmith.building.graph import BuildRun
from weightsmith.fleets import node
from weightsmith.steps.step import ForeseenWeights

from tests.fakes import fleet
from tests.fakes.memory import Memory

CASES: dict[str, tuple[list[str], list[str]]] = {
    "GGUF": (["llamacpp-q4_k_m"], []),
    "as merged": (["vllm"], []),
    "two of one pass": (["llamacpp-q4_k_m", "llamacpp-q8_0"], []),
    "unmerged": (["vllm-lora"], []),
    "unmerged, as GGUF": (["llamacpp-lora"], []),
    "unmerged, on a quantized base": (["llamacpp-q4_k_m-lora"], []),
    "two unmerged, of one pass": (["llamacpp-q4_k_m-lora", "llamacpp-q8_0-lora"], []),
    "with scales of its cache": (["vllm"], ["serve.kv_cache_dtype=fp8"]),
    "other forms": (["llamacpp-q8_0"], ["outputs.kinds=[volume, modelpack]"]),
}
KEYED = {"merge", "unmerged-base"}
"""Steps whose files are foreseen as they will be; others may lie beside each other later."""


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[BuildRun]:
    """The runs of a test's builds."""
    kept: list[BuildRun] = []

    class Kept(BuildRun):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            kept.append(self)

    monkeypatch.setattr(building, "BuildRun", Kept)
    return kept


def build(memory: Memory, targets: list[str], settings: list[str]) -> BuildPlan:
    """Plan, then build; return the plan."""
    plan = plan_of(memory.request(*settings, targets=targets), memory.tools)
    memory.build(*settings, targets=targets)
    return plan


@pytest.mark.parametrize("name", CASES)
def test_what_was_foreseen_comes_out(memory: Memory, runs: list[BuildRun], name: str) -> None:
    targets, settings = CASES[name]
    plans = [build(memory, targets, settings) for _ in range(2)]

    for plan, run in zip(plans, runs, strict=True):
        assert plan.seen
        done = list(run.have._outcomes.items())
        assert [(s.name, s.target) for s, _ in done] == [(s.name, s.target) for s in plan.steps]
        for step, (_, outcome) in zip(plan.steps, done, strict=True):
            rows, foreseen = plan.seen.rows(step), plan.seen[step]
            if outcome.stage and not step.publishes and len(rows) == 1 and len(targets) == 1:
                assert rows[0].cached == outcome.cached, step.name
            if isinstance(foreseen, ForeseenWeights) and foreseen.tree and step.name in KEYED:
                assert foreseen.tree.digest == outcome.value.digest, step.name
        made = {step: outcome.value for step, (_, outcome) in zip(plan.steps, done, strict=True)}
        for one in plan.steps.targets:
            assert set(plan.seen[one.image]) == {each.image.platform for each in made[one.image]}
            there = plan.seen[one.weights].tree
            if there and there.digest == made[one.served].digest:  # so the plan is the server's
                assert plan.seen[one.config].to_json() == made[one.config].plan.to_json()


STAGE = """
from dataclasses import dataclass

from weightsmith.steps.destinations import InStore
from weightsmith.steps.stage_result import Timer
from weightsmith.steps.step import Foreseen, Step, TargetStep
from weightsmith.core.values import StageInputs


@dataclass(frozen=True, eq=False, kw_only=True)
class CountStep(TargetStep):
    name = "count-files"
    weights: Step

    def foresee(self, seen):
        weights = seen[self.weights]
        if weights.tree is None:
            return Foreseen(value=None)
        state = seen.state(self, self._inputs(weights.tree.digest))
        return Foreseen(value=None, rows=(self.row(state, memory=1 << 20),))

    def run(self, have, tools):
        timer, tree = Timer(self.name, "the weights", tools), have[self.weights].tree
        found = InStore(tools.store).document(
            lambda: self._inputs(tree.digest), "count.json", lambda _: len(tree.files)
        )
        return timer.done(found.value, cached=found.cached)

    def inputs(self, have, _tools):
        return self._inputs(have[self.weights].digest)

    def _inputs(self, digest):
        return StageInputs(stage=self.name, recipe_number=1, inputs={"weights": digest})
"""
ORDER = (
    "    steps: list[AnyStep] = "
    "[*made, quality, served, config, image, started, answered, labelled]\n"
)
LINE = "    steps.append(__import__('counting').CountStep(of=of, weights=served))\n"


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more stage in every build: one file, and one line of the pipeline."""
    path = tmp_path / "counting.py"
    path.write_text(STAGE)
    spec = importlib.util.spec_from_file_location("counting", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "counting", module)
    spec.loader.exec_module(module)
    text = Path(str(pipeline.__file__)).read_text("utf-8")
    assert text.count(ORDER) == 1
    changed = ModuleType("weightsmith.building.pipeline")
    monkeypatch.setitem(sys.modules, "weightsmith.building.pipeline", changed)
    code = compile(ast.parse(text.replace(ORDER, ORDER + LINE)), "pipeline.py", "exec")
    exec(code, changed.__dict__)
    for user in (building, explain, node):
        monkeypatch.setattr(user, "steps_of", changed.steps_of)


@pytest.mark.usefixtures("counting")
def test_a_stage_is_added_in_one_file_and_one_line(memory: Memory) -> None:
    memory.build()
    record = memory.record()
    request = memory.request()
    plan = plan_of(request, memory.tools)

    assert ("stage", "count-files", "the weights") in memory.progress.lines
    assert list(record["stages"])[-2:] == ["count-files", "publish"]
    assert record["inputs"]["count-files"] == {"weights": record["artifact"]["digest"]}
    (row,) = [row for row in plan.rows if row.stage == "count-files"]
    assert (row.cached, row.target, row.peak_memory_bytes) == (True, "llamacpp-q4_k_m", 1 << 20)
    assert "count-files" in (memory.results() / "report.html").read_text()

    memory.store.entries.clear()
    (row,) = [row for row in plan_of(request, memory.tools).rows if row.stage == "publish"]
    assert not row.cached


@pytest.mark.usefixtures("counting")
def test_a_fleet_knows_an_added_stage(two: Memory) -> None:
    result, _ = fleet.run(two, fleet.write_fleet(two))

    assert result.stages["count-files"] == {"run": 4, "cached": 0}
    (page,) = two.folder.rglob("fleet.html")
    assert "count-files" in page.read_text("utf-8")
