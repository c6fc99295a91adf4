"""The stage keeps what passed, and a wrong merge ends the build before anything is made of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from weightsmith.api.commands.merge import validate_folders
from weightsmith.api.commands.requests import ValidateCommand
from weightsmith.building.build import build
from weightsmith.building.request import BuildRequest
from weightsmith.building.targets import chosen_targets
from weightsmith.core.errors import CheckFailed, UsageError
from weightsmith.core.jobs import MergeJob
from weightsmith.core.merge_options import Merge
from weightsmith.core.values import Checkpoint, Snapshot, Sources, Tree
from weightsmith.recipe.file import read_recipe
from weightsmith.stages.validate import validate
from weightsmith.steps.destinations import InStore
from weightsmith.steps.outputs import ImageOutputs
from weightsmith.steps.tools import Tools
from weightsmith.worker.jobs import STAGES

from tests.fakes.memory import memory_tools
from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny"
SMALL = {"severity": "warning", "check": "outputs", "message": "small"}
GOOD = {"passed": True, "findings": [SMALL], "seconds": 1.0}
TIES = Merge(method="ties", density=0.5)
BAD = {
    "severity": "error", "check": "elements", "message": "x.weight: wrong", "tensor": "x.weight",
    "layer": None,
}  # fmt: skip
WRONG = {**GOOD, "passed": False, "findings": [BAD]}


def sources(tools: Tools) -> tuple[Sources, Checkpoint]:
    tree = Tree(root=TINY / "base", files=())
    snapshot = Snapshot(tree=tree, source="x", pin="x", pinned=True)
    return Sources(base=snapshot), Checkpoint(tree=tree)


def test_what_passed_is_kept(tmp_path: Path) -> None:
    tools = memory_tools(tmp_path, {"validate": lambda job, report: GOOD})
    inputs, checkpoint = sources(tools)

    first = validate(checkpoint, inputs, Merge(), (), InStore(tools.store), tools)
    again = validate(checkpoint, inputs, Merge(), (), InStore(tools.store), tools)

    assert not first.cached
    assert again.cached
    assert len(tools.runner.jobs) == 1
    assert ("warn", "small") in tools.progress.lines


ASKED: dict[str, Any] = {
    "base": str(TINY / "base"), "adapters": (str(TINY / "adapters" / "a"),),
    "merged": TINY / "base",
}  # fmt: skip


def test_what_failed_is_not_kept_and_its_findings_are_told(tmp_path: Path) -> None:
    tools = memory_tools(tmp_path, {"validate": lambda job, report: WRONG})
    inputs, checkpoint = sources(tools)
    asked = ValidateCommand(**ASKED, weights=(0.5,), options=TIES)

    for _ in range(2):
        with pytest.raises(CheckFailed, match="wrong") as caught:
            validate(checkpoint, inputs, Merge(), (), InStore(tools.store), tools)
    assert caught.value.exit_code == 4
    assert len(tools.runner.jobs) == 2
    tools.runner.jobs.clear()
    with pytest.raises(CheckFailed) as caught:
        validate_folders(asked, tools)
    assert caught.value.details["findings"] == [BAD]
    assert tools.runner.jobs[0].weights == (0.5,)
    assert tools.runner.jobs[0].scope == "rest"


def test_probes_are_read_before_anything_runs(tmp_path: Path) -> None:
    tools = memory_tools(tmp_path, {})
    (tmp_path / "probes.jsonl").write_text('{"prompt": "Hi"}\n{"text": "no"}\n')
    asked = ValidateCommand(**ASKED, probes=tmp_path / "probes.jsonl")

    with pytest.raises(UsageError, match=r"probes\.jsonl:2"):
        validate_folders(asked, tools)


def wrong_merge(change: Callable[[int], int]) -> Any:
    """Merge, and change the bits of one of four million elements."""

    def run(job: MergeJob, report: Any) -> Any:
        result = STAGES["merge"](replace(job, headers_only=False), report)
        path = job.output / "model.safetensors"
        tensors = load_file(path)
        bits = tensors["model.layers.2.mlp.up_proj.weight"].view(torch.int16)
        bits[7, 9] = change(int(bits[7, 9]))
        save_file(tensors, path, {"format": "pt"})
        files = [f for f in result["files"] if f["path"] != path.name]
        return {**result, "largest": {}, "files": files}

    return run


def request_for(folder: Path) -> BuildRequest:
    shutil.copytree(TINY, folder / "tiny", ignore=shutil.ignore_patterns("*.py"))
    file = read_recipe(folder / "tiny" / "recipe.yaml")
    return BuildRequest(
        file=file,
        targets=chosen_targets(file, ()),
        outputs=ImageOutputs(load=False, layout=None, push=False, force=False),
        dist=folder / "dist",
        engine_answers=False,
    )


@pytest.mark.slow
@pytest.mark.grid(4)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "says"),
    [(lambda bits: bits ^ -0x8000, "sign is flipped"), (lambda _: 0x7FC0, "is nan, not")],
    ids=["sign", "nan"],
)
def test_a_wrong_merge_ends_the_build(
    tmp_path: Path, change: Callable[[int], int], says: str
) -> None:
    request = request_for(tmp_path)
    tools = memory_tools(tmp_path, {**STAGES, "merge": wrong_merge(change)})

    with pytest.raises(CheckFailed, match=says) as caught:
        list(build(request, tools))

    (kept,) = (tmp_path / "dist").rglob("refused/build.json")
    record = json.loads(kept.read_text())["validation"]
    assert [job.kind for job in tools.runner.jobs] == ["merge", "proof"]
    assert "report: " in caught.value.hint
    assert (kept.parent / "report.html").is_file()
    assert record["elements"]["wrong"] == 1
    assert record["findings"][0]["tensor"] == "model.layers.2.mlp.up_proj.weight"
    assert record["findings"][0]["layer"] == 2
