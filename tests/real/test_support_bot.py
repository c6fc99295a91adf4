"""The support bot in llama.cpp's usual types and in vLLM's: what it scores, what is stopped."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.started import weightsmith
from tests.paths import ROOT

RECIPE = ROOT / "examples" / "support-bot" / "recipe.yaml"
SCORES = {"q8_0": 33, "q4_k_m": 33}
"""Right answers of 33, as measured on AVX-512; other CPUs round otherwise."""
MAY_DIFFER = 1
FOUR = ("vllm-awq", "vllm-gptq", "vllm", "llamacpp-q4_k_m")

pytestmark = [pytest.mark.real, pytest.mark.builders, pytest.mark.timeout(3600)]


def build(folder: Path, *words: str, store: Path | None = None, code: int = 0) -> dict[str, Any]:
    where = ("--recipe", RECIPE, "--runner", "local", "--dist", folder / "dist")
    return weightsmith("build", *where, *words, store=store, code=code)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("support-bot")


def record(folder: Path, target: str) -> dict[str, Any]:
    path = folder / "dist" / "support-bot" / "1.0.0" / target / "build.json"
    return json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize("format_", SCORES)
def test_the_usual_types_keep_what_was_taught(folder: Path, format_: str) -> None:
    target = f"llamacpp-{format_}"
    build(folder, "--target", target, store=folder / "store")
    found = record(folder, target)
    right = {who: round(s["score"] * s["n"]) for who, s in found["scores"].items()}

    assert (right["base"], right["adapter"]) == (0, 33)
    assert abs(right["merged"] - 33) <= MAY_DIFFER
    assert abs(right["image"] - SCORES[format_]) <= MAY_DIFFER
    assert {check["name"] for check in found["checks"]} >= {"health", "SIGTERM", "restart"}
    if right["image"] == 33:
        assert (found["verdict"], found["unproven"]) == ("passed", [])


def test_a_type_that_forgets_is_stopped(folder: Path) -> None:
    """Q2_K: the answers decide, since the gate on held-out text only measures here."""
    low = ("--set", "quantize.allow_low_bits=true", "--set", "quality.gate=measure")
    target = ("--target", "llamacpp-q2_k")
    error = build(folder, *target, *low, store=folder / "store", code=4)["error"]
    found = record(folder, "llamacpp-q2_k/refused")
    verdict = next(v for v in found["verdicts"] if v["subject"] == "image" and v["binding"])

    assert error["message"].startswith("lantern: the image scores")
    assert "now gives" in error["hint"]
    assert not verdict["passed"]
    assert verdict["lost"] > 2
    assert not (folder / "dist/support-bot/1.0.0/llamacpp-q2_k/image").exists()


@pytest.mark.vllm
def test_one_command_ends_with_four_images_that_answer(tmp_path: Path) -> None:
    """In the user's store, which holds vLLM's engine."""
    built = build(tmp_path, *(f"--target={one}" for one in FOUR))["targets"]

    assert tuple(built) == FOUR
    merges = {record(tmp_path, target)["merge"]["digest"] for target in FOUR}
    assert len(merges) == 1
    for target in FOUR:
        told = record(tmp_path, target)
        assert told["scores"]["base"]["score"] < 0.1, target
        assert told["scores"]["image"]["score"] >= told["scores"]["adapter"]["score"] - 0.05, target
        assert {check["name"] for check in told["checks"]} >= {"chat", "SIGTERM", "restart"}, target
        assert Path(built[target]["image"].removeprefix("oci:"), "index.json").is_file()
    shutil.rmtree(tmp_path)  # three images of 2 GB
