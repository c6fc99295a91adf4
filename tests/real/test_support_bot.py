"""The support bot in every usual llama.cpp type and in vLLM's: what it scores, what is stopped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT

RECIPE = ROOT / "examples" / "support-bot" / "recipe.yaml"
SCORES = {"f16": 33, "q8_0": 33, "q5_k_m": 32, "q4_k_m": 33}
"""Right answers of 33, as measured on AVX-512; other CPUs round otherwise."""
MAY_DIFFER = 1
FOUR = ("vllm-awq", "vllm-gptq", "vllm", "llamacpp-q4_k_m")

pytestmark = [pytest.mark.real, pytest.mark.builders, pytest.mark.timeout(3600)]


def build(folder: Path, *words: str, expect: int = 0) -> dict[str, Any]:
    """Build the recipe with --json and return its object."""
    done = subprocess.run(
        [sys.executable, "-m", "weightsmith", "build", "--recipe", RECIPE, "--runner", "local",
         "--dist", folder / "dist", *words, "--json"],
        env={**os.environ, "WEIGHTSMITH_STORE": str(folder / "store")},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == expect, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("support-bot")


def record(folder: Path, target: str) -> dict[str, Any]:
    path = folder / "dist" / "support-bot" / "1.0.0" / target / "build.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


@pytest.mark.parametrize("format_", SCORES)
def test_every_usual_type_keeps_what_was_taught(folder: Path, format_: str) -> None:
    target = f"llamacpp-{format_}"
    build(folder, "--target", target)
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
    error = build(folder, "--target", "llamacpp-q2_k", *low, expect=4)["error"]
    found = record(folder, "llamacpp-q2_k/refused")
    verdict = next(v for v in found["verdicts"] if v["subject"] == "image" and v["binding"])

    assert "below the adapter" in error["message"]
    assert "now gives" in error["hint"]
    assert not verdict["passed"]
    assert verdict["lost"] > 2
    assert not (folder / "dist/support-bot/1.0.0/llamacpp-q2_k/image").exists()


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(folder, JSON) of the headline command; in the user's store, which holds vLLM's engine."""
    folder = tmp_path_factory.mktemp("four")
    yield folder, in_users_store(folder)
    shutil.rmtree(folder)  # three images of 2 GB


def in_users_store(folder: Path) -> dict[str, Any]:
    targets = [word for target in FOUR for word in ("--target", target)]
    done = subprocess.run(
        [sys.executable, "-m", "weightsmith", "build", "--recipe", RECIPE, *targets,
         "--runner", "local", "--dist", folder / "dist", "--json"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)["targets"]
    return found


@pytest.mark.vllm
def test_one_command_ends_with_four_images_that_answer(four: tuple[Path, dict[str, Any]]) -> None:
    folder, built = four

    assert tuple(built) == FOUR
    merges = {record(folder, target)["merge"]["digest"] for target in FOUR}
    assert len(merges) == 1
    for target in FOUR:
        told = record(folder, target)
        assert told["scores"]["base"]["score"] < 0.1, target
        assert told["scores"]["image"]["score"] >= told["scores"]["adapter"]["score"] - 0.05, target
        assert {check["name"] for check in told["checks"]} >= {"chat", "SIGTERM", "restart"}, target
        assert Path(built[target]["image"].removeprefix("oci:"), "index.json").is_file()


@pytest.mark.vllm
def test_building_the_four_again_does_nothing(four: tuple[Path, dict[str, Any]]) -> None:
    folder, built = four
    again = in_users_store(folder)

    assert {t: again[t]["digest"] for t in FOUR} == {t: built[t]["digest"] for t in FOUR}
    for target in FOUR:
        redone = {name for name, said in again[target]["stages"].items() if not said["cached"]}
        assert redone <= {"resolve", "render", "bake"}, target
