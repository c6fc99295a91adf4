"""Adapters with the head of another task: the new model's settings in config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from weightsmith.core.errors import InputRefused
from weightsmith.merging.claim import AdapterView, Claim

TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
"""PEFT's `task_type` -> suffix of the architecture's name in transformers."""

_HEAD = re.compile(r"(?:LMHeadModel|For[A-Z]\w*|Model)$")


def task_settings(
    config: Mapping[str, Any], views: Sequence[AdapterView], claims: Sequence[Sequence[Claim]]
) -> dict[str, Any]:
    """Return architecture and labels of a model with a new head, {} without one.

    Raises InputRefused if the architecture is ambiguous.
    """
    heads = [
        (view, claim)
        for view, some in zip(views, claims, strict=True)
        for claim in some
        if claim.new
    ]
    if not heads:
        return {}
    view, first = heads[0]
    listed = config.get("architectures") or [""]
    if any(other is not view for other, _ in heads) or view.weight != 1.0 or not listed[0]:
        raise InputRefused(
            f"{view.path} has {first.target}, a head that the base does not have",
            hint="merge it alone, at weight 1, and onto a base whose config.json has "
            "`architectures`",
        )
    suffix = TASKS[str(view.config.raw["task_type"])]
    settings: dict[str, Any] = {"architectures": [_HEAD.sub("", listed[0]) + suffix]}
    shapes = [claim.replacement.shape for _, claim in heads if claim.replacement]
    counts = [shape[0] for shape in shapes if len(shape) > 1]
    if suffix != "ForQuestionAnswering" and counts:
        count = counts[-1]
        settings["id2label"] = {str(number): f"LABEL_{number}" for number in range(count)}
        settings["label2id"] = {f"LABEL_{number}": number for number in range(count)}
    return settings
