"""Metric `command`: the user's program judges the answers, or asks the server itself.

Its standard input has one JSON object per question, `{prompt, messages, expected, answer}`; if a
server is running, its environment has WEIGHTSMITH_URL (including /v1) and WEIGHTSMITH_MODEL. Its
last output must be a JSON object: `{"ok": [true, …]}` with one value per question, in order, or
`{"score": 0.93, "n": 200}` with an optional `per_item`. An exit code other than 0 is a failure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from weightsmith.core.errors import CheckFailed
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import Json, Score
from weightsmith.evaluating.items import Item

_HINT = 'it must print {"ok": [true, …]} or {"score": 0.93, "n": 200} as its last line'


def question_lines(items: Sequence[Item], answers: Sequence[Mapping[str, Json]]) -> bytes:
    """Return the program's standard input."""
    lines = [
        json.dumps(
            {
                "prompt": item.prompt,
                "messages": [dict(message) for message in item.messages],
                "expected": list(item.expected),
                "answer": answer["answer"],
            },
            ensure_ascii=False,
        )
        for item, answer in zip(items, answers, strict=True)
    ]
    return "".join(f"{line}\n" for line in lines).encode()


def read_verdict(
    output: str, items: Sequence[Item], answers: Sequence[Mapping[str, Json]]
) -> Score:
    """Return the score that a program printed, with the questions' verdicts if it gave them.

    Raises CheckFailed for invalid output.
    """
    verdict = _last_object(output)
    if "ok" in verdict:
        return _judged(verdict["ok"], items, answers)
    score, n = verdict.get("score"), verdict.get("n", 0)
    if (
        isinstance(score, bool)
        or not isinstance(score, int | float)
        or not math.isfinite(score)
        or not 0 <= score <= 1
        or not isinstance(n, int)
        or n < 0
    ):
        raise CheckFailed(f"invalid score from the command: {score!r}, n={n!r}", hint=_HINT)
    rows = verdict.get("per_item", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CheckFailed("the command's per_item is not a list of objects", hint=_HINT)
    return Score(score=float(score), n=n, metric="command", per_item=_rows(rows))


def _judged(verdicts: Json, items: Sequence[Item], answers: Sequence[Mapping[str, Json]]) -> Score:
    if not isinstance(verdicts, list) or len(verdicts) != len(items):
        count = len(verdicts) if isinstance(verdicts, list) else "no"
        raise CheckFailed(f"the command judged {count} of {len(items)} answers", hint=_HINT)
    rows = tuple(
        {
            "prompt": item.prompt,
            "expected": list(item.expected),
            **answer,
            "ok": bool(verdict),
        }
        for item, answer, verdict in zip(items, answers, verdicts, strict=True)
    )
    right = sum(bool(row["ok"]) for row in rows)
    share = right / len(rows) if rows else 0.0
    return Score(score=share, n=len(rows), metric="command", per_item=rows)


def _rows(rows: Sequence[Mapping[str, Json]]) -> tuple[Mapping[str, Json], ...]:
    """Return the program's rows if all have `ok`, so that runs can be compared; else none."""
    if not all("ok" in row for row in rows):
        return ()
    return tuple(
        {
            **row,
            "prompt": str(row.get("prompt", f"item {place}")),
            "expected": row.get("expected", []),
            "answer": str(row.get("answer", "")),
            "ok": bool(row["ok"]),
        }
        for place, row in enumerate(rows, start=1)
    )


def _last_object(output: str) -> Mapping[str, Json]:
    """Return the output, or its last line that is a JSON object."""
    for text in (output, *reversed(output.splitlines())):
        try:
            value = parse(text)
        except ValueError:
            continue
        if isinstance(value, dict):
            return value
    raise CheckFailed("the command printed no JSON object", hint=_HINT)
