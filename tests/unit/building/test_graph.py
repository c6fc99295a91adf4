"""The graph of a build: what tells a step apart, what runs beside what, and where its name is."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import weightsmith
from weightsmith import stages
from weightsmith.building.graph import peak_memory, shares
from weightsmith.building.pipeline import BuildSteps, steps_of
from weightsmith.building.prefetch import Shares
from weightsmith.building.request import BuildRequest
from weightsmith.building.targets import chosen_targets
from weightsmith.recipe.file import RecipeFile, check_recipe
from weightsmith.steps.outputs import ImageOutputs
from weightsmith.steps.step import (
    CACHED,
    WEIGHTS,
    Foreseen,
    Foresight,
    State,
    Step,
)
from weightsmith.steps.tools import JobMemory

PACKAGE = Path(weightsmith.__file__).parent
GB = 1 << 30


def steps(tmp_path: Path, *targets: str, **recipe: Any) -> BuildSteps:
    """Return the steps of a recipe whose folders nobody looks into."""
    given = {"name": "x", "base": {"source": "./base"}, "adapters": [{"source": "./a"}], **recipe}
    file = RecipeFile(recipe=check_recipe(given, "here"), folder=tmp_path)
    request = BuildRequest(
        file=file,
        targets=chosen_targets(file, targets),
        outputs=ImageOutputs(),
        dist=tmp_path,
        engine_answers=False,
    )
    return steps_of(request)


def derivations(found: BuildSteps, shared_as: str) -> list[str]:
    return [step.derivation for step in found if step.shared_as == shared_as]


def test_every_step_comes_after_those_that_it_needs(tmp_path: Path) -> None:
    for name in ("llamacpp-q4_k_m", "vllm", "llamacpp-lora", "vllm-lora"):
        seen: set[Any] = set()
        for step in steps(tmp_path, name, outputs={"kinds": ["image", "volume"]}):
            assert seen.issuperset(step.needs), step.name
            seen.add(step)


@pytest.mark.parametrize(
    ("target", "change", "same"),
    [
        # Engines that load one format share its weights; this one has another layout.
        ("sglang-awq", {}, {"merge"}),
        ("vllm-awq", {"adapters": [{"source": "./b"}]}, set()),
        ("vllm-awq", {"merge": {"method": "ties", "density": 0.5}}, set()),
        # The proof is of the merge, and not of the weights.
        ("vllm-awq", {"validate": {"enabled": False}}, {"weights"}),
        ("vllm-awq", {"quantize": {"keep": ["lm_head"]}}, {"merge"}),
        ("vllm-awq", {"quality": {"tokens": 4096}}, {"merge"}),
        # Names and places tell no step apart.
        ("vllm-awq", {"version": "9", "serve": {"gpu": "nvidia-l4"}}, {"merge", "weights"}),
    ],
)
def test_what_a_change_makes_another_step(
    tmp_path: Path, target: str, change: Any, same: set[str]
) -> None:
    one, other = steps(tmp_path, "vllm-awq"), steps(tmp_path, target, **change)
    if target == "sglang-awq":
        gemm = steps(tmp_path, "vllm-awq-gemm")
        assert derivations(gemm, "weights") == derivations(other, "weights")

    for kind in ("merge", "weights"):
        assert derivations(one, kind)
        assert (derivations(one, kind) == derivations(other, kind)) == (kind in same), kind


def test_unmerged_adapters_are_shared_by_nothing_but_their_base(tmp_path: Path) -> None:
    found = steps(tmp_path, "vllm-lora")

    assert [step.name for step in found if step.shared_as] == []


class Bench:
    """Tools of a machine on which builders are ready or not."""

    def __init__(self, *, two: bool = True, ready: bool = True, limit: int = 0, budget: int = 0):
        self.memory = JobMemory(limit=limit, budget=budget)
        self.two_at_once = lambda: two
        self.runner = self
        self.ready = lambda _builder: ready


def foreseen(found: BuildSteps, bench: Any, state: State = CACHED, **memory: int) -> Foresight:
    """Foresee so much memory, in GB, of steps by their names."""
    seen = Foresight(bench)
    for step in found:
        size = memory.get(step.name, 0) * GB
        row = step.row(state, memory=size)
        seen._foreseen[step] = Foreseen(value=None, rows=(row,) if size else ())
    return seen


NEEDS = {"validate": 2, "reference": 3, "quantize": 4, "quality": 1}
"""Both sides together: the larger of the first two, a quarter for what answers leave, and four."""


@pytest.mark.parametrize(
    ("bench", "wanted"),
    [
        (Bench(), Shares(now=0, ahead=0)),
        (Bench(two=False), None),
        (Bench(ready=False), None),
        (Bench(limit=20 * GB, budget=7 * GB), None),
        # Each side gets its share of the memory.
        (Bench(limit=29 * GB, budget=8 * GB), Shares(now=13 * GB, ahead=16 * GB)),
    ],
)
def test_weights_are_made_ahead_where_there_is_room(
    tmp_path: Path, bench: Any, wanted: Shares | None
) -> None:
    found = steps(tmp_path, "llamacpp-q4_k_m")

    assert shares(found, foreseen(found, bench, **NEEDS)) == wanted


def test_nothing_is_made_ahead_of_nothing(tmp_path: Path) -> None:
    found = steps(tmp_path, "llamacpp-q4_k_m")

    assert shares(found, foreseen(found, Bench(), quantize=4)) is None
    whole = steps(tmp_path, "vllm")
    assert shares(whole, foreseen(whole, Bench(), **NEEDS)) is None


@pytest.mark.parametrize(("two", "peak"), [(True, 7 * GB + (256 << 20)), (False, 4 * GB)])
def test_a_peak_is_of_all_that_runs_at_once(tmp_path: Path, two: bool, peak: int) -> None:
    found = steps(tmp_path, "llamacpp-q4_k_m")
    todo = State(cached=False, why="never built here")

    assert peak_memory(found, foreseen(found, Bench(two=two), todo, **NEEDS)) == peak


def _steps(kind: type[Any]) -> Iterator[type[Any]]:
    for one in kind.__subclasses__():
        yield one
        yield from _steps(one)


OTHER_MEANINGS = {
    ("building/explain.py", "merge"): "a builder",
    ("fleets/cells.py", "evaluate"): "a section of the recipe",
    ("fleets/file.py", "validate"): "a section of the recipe",
    ("fleets/graph.py", "evaluate"): "a section of the recipe",
    ("fleets/node.py", "evaluate"): "a section of the recipe",
    ("fleets/payloads.py", "evaluate"): "a section of the recipe",
    ("fleets/payloads.py", "validate"): "a section of the recipe",
    ("fleets/cells.py", "quantize"): "a section of the recipe",
    ("fleets/payloads.py", "quantize"): "a section of the recipe",
    ("fleets/node.py", "dequantized"): "who answered",
    ("fleets/page.py", "dequantized"): "who answered",
    ("fleets/payloads.py", "draft"): "a source",
    ("steps/drafting.py", "draft"): "a folder",
    ("steps/replays.py", "dequantized"): "who answered",
    ("stages/bake.py", "quality"): "a label",
    ("stages/render.py", "labels"): "a classifier's",
}


def test_no_reader_of_the_graph_knows_a_stage_by_name() -> None:
    for module in pkgutil.iter_modules(stages.__path__):
        importlib.import_module(f"weightsmith.stages.{module.name}")
    own: dict[str, set[str]] = {}
    for one in _steps(Step):
        if one.__module__.startswith("weightsmith.stages."):
            own.setdefault(one.name, {"steps/step.py"} if one.name == WEIGHTS else set()).add(
                one.__module__.removeprefix("weightsmith.").replace(".", "/") + ".py"
            )
    found = {
        (path.relative_to(PACKAGE).as_posix(), node.value)
        for room in ("building", "fleets", "steps", "stages")
        for path in sorted((PACKAGE / room).glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and node.value in own
    }

    assert len(own) > 15
    elsewhere = {(path, name) for path, name in found if path not in own[name]}
    assert {
        (path, name)
        for path, name in elsewhere - set(OTHER_MEANINGS)
        if not path.startswith("stages/") or name not in ("merge", "evaluate")
    } == set()  # in stages, these are a builder and a section of the recipe
