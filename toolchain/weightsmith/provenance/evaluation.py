"""Scores as documents: the questions with all subjects' answers side by side."""

from __future__ import annotations

from collections.abc import Sequence

from weightsmith.core.values import JsonValue, Scores


def side_by_side(scores: Scores) -> list[dict[str, JsonValue]]:
    """Return the questions with the answers of every subject."""
    names = [name for name in scores if scores[name].per_item]
    if len({len(scores[name].per_item) for name in names}) > 1:  # a command's own choice of rows
        names = names[-1:]
    rows = zip(*(scores[name].per_item for name in names), strict=True)
    return [
        {
            "prompt": row[0]["prompt"],
            **{key: row[0][key] for key in ("messages", "choices") if key in row[0]},
            "expected": row[0]["expected"],
            **{name: answer["answer"] for name, answer in zip(names, row, strict=True)},
            "ok": {name: answer["ok"] for name, answer in zip(names, row, strict=True)},
        }
        for row in rows
    ]


def evaluation(scores: Scores) -> dict[str, JsonValue]:
    """Return the whole evaluation: scores, questions and answers."""
    return {
        "schema": 1,
        "scores": {
            name: {"score": s.score, "n": s.n, "metric": s.metric} for name, s in scores.items()
        },
        "items": side_by_side(scores),
    }


def test_result(
    scores: Scores, max_drop: float, min_score: float, unproven: Sequence[str]
) -> dict[str, JsonValue]:
    """Return in-toto's test result predicate: a published image has passed, perhaps with doubts.

    https://github.com/in-toto/attestation/blob/main/spec/predicates/test-result.md
    """
    passed = [f"{name}: {s.score:.4f} {s.metric}, n={s.n}" for name, s in sorted(scores.items())]
    return {
        "result": "WARNED" if unproven else "PASSED",
        "configuration": [],
        "passedTests": [*passed, f"max_drop={max_drop:g}", f"min_score={min_score:g}"],
        **({"warnedTests": [f"not proven: {reason}" for reason in unproven]} if unproven else {}),
        "failedTests": [],
    }
