import json
import sys

import pytest
from weightsmith.core.errors import CheckFailed, EnvironmentFailure
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


def test_a_program_that_does_not_end_is_a_failed_check():
    with pytest.raises(CheckFailed, match=r"did not end within 0.5 s") as caught:
        run_command([sys.executable, "-c", "import time; time.sleep(600)"], {}, b"", 0.5)

    assert caught.value.hint == "give it fewer questions"
