"""What is called from a thread has its limit of time, too."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
from weightsmith.building.wiring import open_tools
from weightsmith.core import apart, time_limits
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.ports import Silent
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.metrics import score_answers
from weightsmith.models.peft_patterns import check_peft_patterns
from weightsmith.outside.process import run_command
from weightsmith.quantizers.gguf_rules import require_matches
from weightsmith.recipe.user_config import RunOptions

NEVER_ENDS = "(a+)+$"
LONG = "a" * 60 + "!"
T = TypeVar("T")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limits, "FOREIGN_SECONDS", 0.2)
    monkeypatch.setattr(apart, "_run", run_command)


def in_a_thread(call: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def question(expected: str) -> Item:
    return Item(messages=({"role": "user", "content": "?"},), expected=(expected,), line=7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "expected", "answers"),
    [
        ("regex", NEVER_ENDS, [LONG, "aa", "b"]),
        ("json-schema", json.dumps({"pattern": NEVER_ENDS}), [f'"{LONG}"', '"aa"', '"b"']),
    ],
)
def test_an_answer_on_which_a_metric_never_ends_is_one_wrong_question(metric, expected, answers):
    found = in_a_thread(lambda: score_answers(answers, [question(expected)] * 3, metric))

    assert [row["ok"] for row in found.per_item] == [False, True, False]
    assert "exceeded 0.5 s of CPU time" in found.per_item[0]["unjudged"]
    assert "unjudged" not in found.per_item[1]


@pytest.mark.slow
def test_an_adapters_pattern_without_an_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"target_modules": NEVER_ENDS}))

    in_a_thread(lambda: check_peft_patterns(tmp_path, ["aa"]))
    with pytest.raises(InputRefused, match=r"target_modules .* exceeded 0.2 s of CPU time"):
        in_a_thread(lambda: check_peft_patterns(tmp_path, ["aa", LONG]))


@pytest.mark.slow
def test_a_recipes_pattern_without_an_end_is_refused() -> None:
    in_a_thread(lambda: require_matches([NEVER_ENDS], ["aa"]))
    with pytest.raises(InputRefused, match=r"tensor_types: .* takes more than 0.2 s to match"):
        in_a_thread(lambda: require_matches([NEVER_ENDS], [LONG]))


def test_an_error_is_that_of_the_main_thread() -> None:
    endless = json.dumps({"$ref": "https://example.com/x.json"})

    def score() -> object:
        return score_answers(["{}"], [question(endless)], "json-schema")

    with pytest.raises(UsageError) as here:
        score()
    with pytest.raises(UsageError) as there:
        in_a_thread(score)
    assert (here.value.message, here.value.hint) == (there.value.message, there.value.hint)


def test_every_command_says_how_processes_are_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(apart, "_run", None)
    monkeypatch.setenv("WEIGHTSMITH_STORE", str(tmp_path))
    with open_tools(RunOptions(runner="local"), Silent()):
        assert apart._run is run_command


def test_nothing_is_started_on_the_main_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_run", lambda *_: sys.exit("started"))

    assert score_answers(["aa"], [question("a")], "regex").score == 1.0
