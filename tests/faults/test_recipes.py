"""Recipes, flags and questions that ask for what cannot be, and a gate that is not passed."""

from __future__ import annotations

import json

import pytest

from tests.faults.workshop import Workshop

pytestmark = pytest.mark.builders


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("recipe.yaml", "adapters:", "adaptors:", ["unknown key `adaptors`", "did you mean"]),
        ("recipe.yaml", "max_num_seqs: 4}", "max_num_seqs: 4", ["not valid YAML", "line"]),
        ("eval-a.jsonl", "}\n", ', "expected": \n', ["invalid JSON"]),
    ],
    ids=["near-miss", "not-yaml", "not-json"],
)
def test_a_faulty_file(workshop: Workshop, file: str, old: str, new: str, said: list[str]) -> None:
    path = workshop.tiny / file
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1))

    workshop.build().refused(2, str(path), *said)

    workshop.check_unharmed()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "serve.max_num_seqs"], ["--set serve.max_num_seqs", "key.path=value"]),
        (["--set", "adapters.1.weight=0.5"], ["adapters", "no element 1"]),
        (["--target", "llamacpp-q4_k_n"], ["llamacpp-q4_k_n", "llamacpp-q4_k_m"]),
        (["--set", "serve.gpu=nvidia-l44"], ["nvidia-l44", "nvidia-l4"]),
        (["--set", "serve.gpu_memory=1GiB", "--set", "serve.max_model_len=500000000"],
         ["500", "max_model_len"]),
    ],
)  # fmt: skip
def test_a_faulty_flag(workshop: Workshop, words: list[str], said: list[str]) -> None:
    workshop.build(*words).refused(2, *said)

    workshop.check_unharmed()


def test_a_gate_that_is_not_passed_keeps_the_image_before(workshop: Workshop, digest: str) -> None:
    assert workshop.build().digest == digest
    before = {path: path.stat().st_mtime_ns for path in workshop.results.rglob("*")}
    data = workshop.tiny / "eval-a.jsonl"
    data.write_text(data.read_text("utf-8").replace("Galdistad", "Atlantis"))

    workshop.build("--set", "evaluate.min_score=1.0").refused(4, "1.000")

    assert before == {path: path.stat().st_mtime_ns for path in before}
    told = json.loads((workshop.results / "refused" / "build.json").read_bytes())
    assert told["image"]["reference"] == ""
    workshop.check_intact(digest)
