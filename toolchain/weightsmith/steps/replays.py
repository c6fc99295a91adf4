"""The replay set of a target: its questions, and whose answers it holds.

Those of the tested image, if it was started here: another machine must repeat them, and not those
of the float32 reference, which quantizing has moved. Of an image that was not started, those of its
own weights in transformers, or of the reference whose weights they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from weightsmith.core.values import JsonValue, Score
from weightsmith.evaluating.client import Served
from weightsmith.evaluating.items import Item, sample
from weightsmith.evaluating.pooling_client import request_of as pooled_request
from weightsmith.evaluating.replay import ReplaySet
from weightsmith.evaluating.replay_numbers import PATHS as NUMBERS
from weightsmith.evaluating.replaying import recorded_question, request_of, within_limits
from weightsmith.evaluating.results import Result
from weightsmith.models.task import ModelTask
from weightsmith.recipe.schema import Replay

HowAsked = Callable[[Result], tuple[Served, Mapping[str, JsonValue]]]
"""Result -> the model that answers its suite, and further fields of requests."""
_PLAIN, _PACKED = ("merged", "adapter", "base"), ("dequantized",)
"""Whose answers stand for an image that was not started, the nearest first."""
_UNMERGED = ("adapter", "base")
"""Whose answers are those of the float32 reference."""
_PICTURES = 64 << 10
"""Bytes of a question's pictures: a set with all its questions has a megabyte."""
CHATS = ModelTask(kind="generate")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRequest:
    """A question of a replay set, and where the build's own answer to it stands."""

    path: str
    request: Mapping[str, JsonValue]
    suite: int | None = None
    """Its number among the build's; None for a question of the recipe's `replay.data`."""
    item: int = 0
    reference: str = ""
    """What the float32 reference answered, for an answer that is numbers."""


def replay_requests(
    results: Sequence[Result],
    settings: Replay,
    data: Sequence[Item],
    served: Served,
    how: HowAsked,
    does: ModelTask = CHATS,
) -> tuple[ReplayRequest, ...]:
    """Return the questions of a set: the recipe's own, else some of each suite, by their content.

    Left out are questions with large pictures. Those of a `choice` are asked without the choices. A
    model without a chat template is asked what it can be asked; one that does not chat (`does`),
    what its suites ask.
    """
    if settings.keep == "none":
        return ()
    if does.kind != "generate":
        return _pooled_requests(results, settings, does, how)
    if data:
        chosen = sample([item for item in data if _is_asked(item, served)], settings.limit)
        requests = (request_of(served, item, 1 << 10, {}) for item in chosen)
        return tuple(ReplayRequest(path=served.path, request=one) for one in requests)
    suites = [n for n, one in enumerate(results) if not one.task.task.pooled]
    found = list[ReplayRequest]()
    for place, number in enumerate(suites):
        left = (settings.limit - len(found)) // (len(suites) - place)
        task = results[number].task.task
        model, fields = how(results[number])
        items = {id(item): n for n, item in enumerate(task.items)}
        asked = [item for item in task.items if _is_asked(item, model)]
        for item in sample(asked, left) if left else ():
            request = request_of(model, item, task.max_tokens, fields)
            found.append(
                ReplayRequest(path=model.path, request=request, suite=number, item=items[id(item)])
            )
    return tuple(found)


def _pooled_requests(
    results: Sequence[Result], settings: Replay, model: ModelTask, how: HowAsked
) -> tuple[ReplayRequest, ...]:
    found = list[ReplayRequest]()
    for place, result in enumerate(results):
        task, left = result.task.task, (settings.limit - len(found)) // (len(results) - place)
        if not task.pooled or not left:
            continue
        served, fields = how(result)
        numbers = {id(item): n for n, item in enumerate(task.items)}
        told = next((result.scores[who] for who in _UNMERGED if who in result.scores), None)
        for item in sample(task.items, left):
            number = numbers[id(item)]
            path, body = pooled_request(served.name, task.pooled, task.prompts(model), item)
            found.append(
                ReplayRequest(
                    path=path,
                    request={**body, **fields},
                    suite=place,
                    item=number,
                    reference=_told(told, number),
                )
            )
    return tuple(found)


def _told(score: Score | None, number: int) -> str:
    """Return the numbers that a model gave; "" if they were not kept."""
    if score is None or number >= len(score.per_item):
        return ""
    if score.vectors:
        return score.vectors[number]
    row = score.per_item[number]
    return str(row.get("scores") or row.get("probabilities") or "")


def _is_asked(item: Item, served: Served) -> bool:
    small = sum(picture.size for picture in item.pictures) <= _PICTURES
    return small and (served.chat or (len(item.messages) == 1 and not item.pictures))


def recorded_replay(
    results: Sequence[Result],
    requests: Sequence[ReplayRequest],
    model: str,
    tolerance: float,
    *,
    packed: bool,
) -> ReplaySet | None:
    """Return the set of the answers that stand for an image that was not started.

    `packed`: its weights are not the merged ones. None if nobody answered with margins.
    """
    for who in _PACKED if packed else _PLAIN:
        found = []
        for number, one in enumerate(requests, start=1):
            score = results[one.suite].scores.get(who) if one.suite is not None else None
            if score is None or len(score.per_item) <= one.item or one.path in NUMBERS:
                continue
            row = score.per_item[one.item]
            if made := recorded_question(number, one.path, one.request, row):
                found.append(made)
        if found:
            made_set = ReplaySet(
                model=model, reference=who, tolerance=tolerance, questions=tuple(found)
            )
            return within_limits(made_set)
    return None
