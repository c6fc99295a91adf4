import json
import re
import sys
from types import SimpleNamespace

import pytest
from weightsmith.core.errors import CheckFailed, EnvironmentFailure
from weightsmith.evaluating import task as task_module
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.task import Task, score_task
from weightsmith.outside.process import run_command

ITEMS = tuple(
    Item(messages=({"role": "user", "content": text},), expected=("x",), line=n)
    for n, text in enumerate(("red", "blue"), start=1)
)
ANSWERS = ({"answer": "red!"}, {"answer": "green"})


def score(program, **environment):
    task = Task(items=ITEMS, metric="command", command=(sys.executable, "-c", program))
    return score_task(task, ANSWERS, run_command, environment)


def test_a_program_judges_every_answer():
    found = score(
        "import json, sys; print('noise'); rows = [json.loads(l) for l in sys.stdin];"
        "print(json.dumps({'ok': [r['prompt'] in r['answer'] for r in rows]}))"
    )

    assert (found.score, found.n) == (0.5, 2)
    assert [row["ok"] for row in found.per_item] == [True, False]
    assert found.per_item[0]["answer"] == "red!"


def test_a_program_may_ask_the_server_itself():
    found = score(
        "import json, os; print(json.dumps({'score': 0.25, 'n': 400,"
        " 'per_item': [{'prompt': os.environ['WEIGHTSMITH_URL'], 'ok': True}]}))",
        WEIGHTSMITH_URL="http://127.0.0.1:1/v1",
    )

    assert (found.score, found.n) == (0.25, 400)
    assert found.per_item[0]["prompt"] == "http://127.0.0.1:1/v1"


@pytest.mark.parametrize(
    ("printed", "says"),
    [
        ("no json", "printed no JSON object"),
        ({"ok": [True]}, "judged 1 of 2"),
        ({"ok": "yes"}, "judged no of 2"),
        ({"score": 1.5, "n": 2}, "invalid score"),
        ({"score": float("nan"), "n": 2}, "invalid score"),
        ({"score": True, "n": 2}, "invalid score"),
        ({"score": 0.5, "n": "many"}, "invalid score"),
        ({"score": 0.5, "n": 2, "per_item": [1]}, "per_item"),
        ({}, "invalid score"),
    ],
)
def test_what_is_no_judgement_is_reported(printed, says):
    text = printed if isinstance(printed, str) else json.dumps(printed)

    with pytest.raises(CheckFailed, match=says) as caught:
        score(f"print({text!r})")
    assert "score" in caught.value.hint


def test_a_program_that_fails_or_is_not_there_is_reported():
    with pytest.raises(CheckFailed, match=r"failed \(exit code 3\)[^$]*my reason"):
        score("import sys; print('my reason', file=sys.stderr); sys.exit(3)")
    task = Task(items=ITEMS, metric="command", command=("no-such-judge",))
    with pytest.raises(EnvironmentFailure, match="no-such-judge"):
        score_task(task, ANSWERS, run_command)


FAILS = (
    "import json, sys\nrows = [json.loads(line) for line in sys.stdin]\n"
    "if any(row['prompt'] == 'blue' for row in rows): sys.exit('odd')\n"
    "print(json.dumps({'ok': [row['prompt'] in row['answer'] for row in rows]}))"
)


def test_an_answer_on_which_the_program_fails_is_one_wrong_question():
    task = Task(items=ITEMS, metric="command", command=(sys.executable, "-c", FAILS))

    found = score_task(task, ({"answer": "red!"}, {"answer": "blue"}), run_command)

    assert [row["ok"] for row in found.per_item] == [True, False]
    assert re.search(r"line 2: .*failed \(exit code 1\): odd", found.per_item[1]["unjudged"])
    assert found.score == 0.5


def test_an_answer_on_which_the_program_hangs_is_one_wrong_question():
    """All have `command_seconds`, one alone has a minute of that; nobody waits here."""
    given = []

    def run(argv, environment, stdin, seconds):
        rows = [json.loads(line) for line in stdin.splitlines()]
        given.append((len(rows), seconds))
        if any(row["prompt"] == "blue" for row in rows):
            raise CheckFailed(f"judge did not end within {seconds:g} s", hint="")
        return json.dumps({"ok": [True] * len(rows)})

    task = Task(items=ITEMS * 2, metric="command", command=("judge",), command_seconds=900.0)
    found = score_task(task, ANSWERS * 2, run)

    assert given == [(4, 900.0), *[(1, 60.0)] * 4]
    assert [row["ok"] for row in found.per_item] == [True, False, True, False]
    assert found.per_item[1]["unjudged"] == "line 2: judge did not end within 60 s"


def test_a_program_that_uses_up_its_time_makes_no_other_answer_wrong(monkeypatch):
    """Three hang for a minute each, of two and a half; the fourth may well be right."""
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=0.0)
    monkeypatch.setattr(task_module, "time", clock)

    def run(argv, environment, stdin, seconds):
        clock.now += seconds
        raise CheckFailed(f"judge did not end within {seconds:g} s", hint="")

    task = Task(items=ITEMS * 2, metric="command", command=("judge",), command_seconds=150.0)
    clock.now = -150.0  # all at once take that long
    with pytest.raises(CheckFailed, match=r"judge took 150 s for 3 of 4 answers"):
        score_task(task, ANSWERS * 2, run)


def test_a_program_that_fails_on_the_first_answers_is_not_asked_for_all():
    calls = []

    def run(argv, environment, stdin, seconds):
        calls.append(stdin.count(b"\n"))
        raise CheckFailed("broken", hint="run it by hand")

    items = ITEMS * 50
    task = Task(items=items, metric="command", command=("judge",))
    with pytest.raises(CheckFailed, match="broken"):
        score_task(task, ANSWERS * 50, run)
    assert calls == [100, *[1] * 8]


def test_a_program_that_judges_all_together_cannot_be_asked_alone():
    """It fails on both at once; of one answer it prints a score, which is no verdict on it."""

    def run(argv, environment, stdin, seconds):
        if stdin.count(b"\n") > 1:
            raise CheckFailed("too slow", hint="")
        return '{"score": 1.0, "n": 1}'

    task = Task(items=ITEMS, metric="command", command=("judge",))
    with pytest.raises(CheckFailed, match="too slow"):
        score_task(task, ANSWERS, run)


def test_a_program_that_does_not_end_is_a_failed_check():
    with pytest.raises(CheckFailed, match=r"did not end within 0.5 s") as caught:
        run_command([sys.executable, "-c", "import time; time.sleep(600)"], {}, b"", 0.5)

    assert "command_seconds" in caught.value.hint
