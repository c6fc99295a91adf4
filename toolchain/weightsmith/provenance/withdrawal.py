"""Withdraws images: a signed statement beside each says why; nothing is deleted.

It is an in-toto statement of the predicate type `WITHDRAWAL`, in the form of signatures that is
chosen, so that policies find it as they find the others. Its predicate has `reason`
(text), `withdrawnOn` (RFC 3339) and `madeFrom` (what the images have in common, such as
`{"adapter": "hf://acme/support-lora"}`). Its subject is the image, or the index.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from weightsmith.core.values import Blob, JsonValue
from weightsmith.provenance.statements import (
    TEST_RESULT,
    WITHDRAWAL,
    Statement,
    image_resource,
    statement,
)

_LONGEST = 500
_FAILED = "withdrawn: "
"""How the failed test in a withdrawal's test result begins."""


def withdrawal(image: Blob, reason: str, made_from: Mapping[str, str]) -> Statement:
    """Return the statement that withdraws an image or an index now."""
    when = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    predicate: dict[str, JsonValue] = {"reason": reason, "withdrawnOn": when}
    if made_from:
        predicate["madeFrom"] = dict(made_from)
    return statement([image_resource(image)], WITHDRAWAL, predicate)


def failed_result(told: Statement, image: Blob) -> Statement:
    """Return the test result that goes with a withdrawal.

    Policies of clusters cannot ask for a statement that is not there. They hold every test result
    of an image to their conditions, so one that failed keeps the image out.
    """
    why = f"{_FAILED}{told.predicate.get('reason')}"
    result = {"result": "FAILED", "configuration": [], "failedTests": [why]}
    return statement([image_resource(image)], TEST_RESULT, result)


def withdraws(told: Statement) -> bool:
    """Return whether a statement is a withdrawal, or the test result that goes with one."""
    failed = told.predicate.get("failedTests")
    rows = failed if told.predicate_type == TEST_RESULT and isinstance(failed, list) else []
    named = any(isinstance(row, str) and row.startswith(_FAILED) for row in rows)
    return named or told.predicate_type == WITHDRAWAL


def withdrawn_in(stated: Iterable[Statement], image: str) -> str | None:
    """Return why statements withdraw an image, and since when; None if they do not."""
    for one in stated:
        if one.predicate_type == WITHDRAWAL and image in one.digests:
            reason, when = one.predicate.get("reason"), one.predicate.get("withdrawnOn")
            said = reason if isinstance(reason, str) and reason else "no reason is stated"
            since = f" ({when[:20]})" if isinstance(when, str) and when else ""
            return said[:_LONGEST] + since
    return None
