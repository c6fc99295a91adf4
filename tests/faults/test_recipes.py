"""Recipes and flags that ask for what cannot be: refused before any work, with the way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults.workshop import Workshop

pytestmark = pytest.mark.builders


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("max_model_len: 512", "max_modl_len: 512", ["serve.max_modl_len", "`max_model_len`"]),
        ("adapters:", "adaptors:", ["unknown key `adaptors`", "did you mean `adapters`"]),
        ("version: 1.0.0", "version: 1.0.0\nversion: 2", ["duplicate key 'version'", "line 4"]),
        ("method: sequential", "method: telepathy", ["merge.method", "sequential"]),
        ("max_num_seqs: 4}", "max_num_seqs: 4", ["not valid YAML", "line"]),
        ("metric: contains", "metric: vibes", ["evaluate.metric", "contains"]),
    ],
    ids=["near-miss", "near-miss-top", "duplicate", "value", "not-yaml", "metric"],
)
def test_a_faulty_recipe(workshop: Workshop, old: str, new: str, said: list[str]) -> None:
    path = workshop.tiny / "recipe.yaml"
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1))

    workshop.build().refused(2, str(path), *said)

    workshop.check_unharmed()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("serve.max_num_seqs", ["--set serve.max_num_seqs", "key.path=value"]),
        ("serve.max_num_sqs=2", ["serve.max_num_sqs", "`max_num_seqs`"]),
        ("serve.max_num_seqs=0", ["serve.max_num_seqs", "at least 1"]),
        ("name.first=x", ["name", "not a mapping"]),
        ("adapters.1.weight=0.5", ["adapters", "no element 1"]),
        ("serve=[", ["serve"]),
        ("name=../../escape", ["name"]),
        ("version=a/b", ["version"]),
    ],
)
def test_a_faulty_setting(workshop: Workshop, setting: str, said: list[str]) -> None:
    workshop.build("--set", setting).refused(2, *said)

    workshop.check_unharmed()


def test_no_recipe_at_all(workshop: Workshop) -> None:
    workshop.run("build", "--recipe", "nowhere.yaml").refused(2, "nowhere.yaml", "--recipe")

    workshop.check_unharmed()


def test_an_unknown_target(workshop: Workshop) -> None:
    workshop.build("--target", "llamacpp-q4_k_n").refused(2, "llamacpp-q4_k_n", "llamacpp-q4_k_m")

    workshop.check_unharmed()


def test_an_unknown_gpu(workshop: Workshop) -> None:
    workshop.build("--set", "serve.gpu=nvidia-l44").refused(2, "nvidia-l44", "nvidia-l4")

    workshop.check_unharmed()


def test_a_context_that_cannot_fit(workshop: Workshop) -> None:
    outcome = workshop.build(
        *("--set", "serve.gpu_memory=1GiB"), *("--set", "serve.max_model_len=500000000")
    )

    outcome.refused(2, "500", "max_model_len")
    workshop.check_unharmed()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "What?", "expected": "x"', "invalid JSON"),
        ('{"prompt": "What?"}', "no expected"),
        ('["prompt"]', "not a JSON object"),
        ('{"prompt": 5, "expected": "x"}', "prompt is not"),
        ('{"messages": [{"role": "oracle", "content": "x"}], "expected": "x"}', "unknown role"),
    ],
    ids=["cut", "no-answer", "list", "number", "role"],
)
def test_malformed_questions(workshop: Workshop, line: str, said: str) -> None:
    data = workshop.tiny / "eval-a.jsonl"
    data.write_text(f"{data.read_text('utf-8')}\n{line}\n")

    workshop.build().refused(2, f"{data}:5", said)

    workshop.check_unharmed()


def test_no_questions_where_the_recipe_says(workshop: Workshop) -> None:
    (workshop.tiny / "eval-a.jsonl").unlink()

    workshop.build().refused(2, "eval-a.jsonl", "JSON Lines")

    workshop.check_unharmed()


def test_a_gate_that_is_not_passed_publishes_nothing(workshop: Workshop, digest: str) -> None:
    data = workshop.tiny / "eval-a.jsonl"
    rows = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    data.write_text("".join(json.dumps({**row, "expected": "Atlantis"}) + "\n" for row in rows))

    outcome = workshop.build("--set", "evaluate.min_score=0.5")

    outcome.refused(4, "0.000", "0.500", rows[0]["prompt"], "report.html")
    assert not (workshop.results / "image").exists()
    assert not list(workshop.results.glob(".*"))
    assert not (workshop.results / "build.json").exists()
    assert told(workshop.results / "refused")["reference"] == ""
    workshop.check_intact(digest)
    assert told(workshop.results)["digest"] == digest


def told(folder: Path) -> dict[str, str]:
    """What a record says of its image."""
    return dict(json.loads((folder / "build.json").read_bytes())["image"])


def test_a_gate_that_is_not_passed_keeps_the_image_before(workshop: Workshop, digest: str) -> None:
    assert workshop.build().digest == digest
    before = {path: path.stat().st_mtime_ns for path in workshop.results.rglob("*")}
    data = workshop.tiny / "eval-a.jsonl"
    data.write_text(data.read_text("utf-8").replace("Galdistad", "Atlantis"))

    workshop.build("--set", "evaluate.min_score=1.0").refused(4, "1.000")

    after = {path: path.stat().st_mtime_ns for path in before}
    assert before == after
    assert told(workshop.results / "refused")["reference"] == ""
    workshop.check_intact(digest)
