"""Thin images start with vLLM's own Python and our compiled kernels, and as whole containers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from weightsmith.building.wiring import cache_folder, make_store
from weightsmith.outside.toolset import toolset_folder
from weightsmith.steps.bases import base_inputs

from tests import vllm_parts
from tests.fakes.command_line import told as weightsmith
from tests.fakes.memory import Memory
from tests.fakes.thin import (
    THIN,
    Container,
    as_tensors,
    files,
    model_of,
    round_really,
    use_bfloat16,
)
from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny"
pytestmark = [pytest.mark.builders, pytest.mark.vllm, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("target", ["vllm", "vllm-fp8", "vllm-nvfp4a16"])
def test_vllms_python_merges_what_was_tested(memory: Memory, tmp_path: Path, target: str) -> None:
    """It has numpy, and lacks ml_dtypes and threadpoolctl."""
    use_bfloat16(memory)
    round_really(memory)
    memory.use_vllm(target, serve={"gpu": "nvidia-h100", "max_model_len": 512})
    memory.build(THIN)
    fat, thin = files(memory, target), files(memory, f"{target}-thin")
    container = Container.of(thin, tmp_path / "root")
    library = toolset_folder(cache_folder(), "kernels") / "libkernels.so"
    (container.root / "opt/weightsmith/kernels").mkdir(exist_ok=True)
    (container.root / "opt/weightsmith/kernels/libkernels.so").write_bytes(library.read_bytes())
    engine = make_store().find(base_inputs(vllm_parts.ENGINE).key)
    assert engine is not None
    root = engine.tree.root
    container.python = (
        *(f"{root}/lib64/ld-linux-x86-64.so.2", "--library-path"),
        *(f"{root}/usr/lib/x86_64-linux-gnu", f"{root}/usr/bin/python3", "-B", "-s", "-P"),
    )
    loaded = (
        "import atexit; from weightsmith.core.kernels import library\n"
        "atexit.register(lambda: print(library.found()._name))"
    )

    done = container.start(PYTHONHOME=f"{root}/usr", words=(), before=loaded)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(container.root / "opt/weightsmith/kernels/libkernels.so")
    assert as_tensors(container.model()) == as_tensors(model_of(fat))


@pytest.mark.real
def test_a_thin_image_answers_as_the_image_that_was_tested(tmp_path: Path) -> None:
    """Both are started in the same sandbox; the thin one merges in memory, its root read-only."""
    dist = tmp_path / "dist"
    words = ("--recipe", TINY / "recipe.yaml", "--target", "vllm", "--runner", "local")
    built = weightsmith("build", *words, "--dist", dist, "--set", THIN)["targets"]["vllm"]
    told = json.loads((dist / "tiny-capitals/1.0.0/vllm/build.json").read_text())
    image = built["forms"]["thin"]["reference"]
    asked = ("--data", TINY / "eval-a.jsonl", "--metric", "contains", "--max-tokens", 32)
    answers = weightsmith("evaluate", "--image", image, *asked)["per_item"]

    tested = {row["prompt"]: row["image"] for row in told["items"]}
    assert {row["prompt"]: row["answer"] for row in answers} == tested
