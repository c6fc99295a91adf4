"""The image's scores beside those of the models that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from weightsmith.evaluating.gate import too_few
from weightsmith.evaluating.results import Result, judged, named
from weightsmith.evaluating.task import Answers, score_task
from weightsmith.tools import Tools


def with_image(
    results: Sequence[Result], answers: Sequence[Answers], tools: Tools
) -> tuple[Result, ...]:
    """Return the tasks with the image's scores, judged against the adapter's or else the base's.

    The image against the merged model shows what quantizing and serving changed; it is
    reported, and does not decide.
    """
    done = []
    for result, answer in zip(results, answers, strict=True):
        tried, scores = result.tried, dict(result.scores)
        scores["image"] = score_task(tried.task, answer, tools.command)
        against = "adapter" if "adapter" in scores else "base"
        verdicts = [judged(tried, "image", scores["image"], against, scores[against], tried.limit)]
        if "merged" in scores:
            beside = judged(
                tried, "image", scores["image"], "merged", scores["merged"], tried.limit
            )
            verdicts.append(replace(beside, binding=False))
        if few := too_few(verdicts[0], tried.limit.max_drop):
            tools.progress.warn(named(tried, few))
        done.append(replace(result, scores=scores, verdicts=(*result.verdicts, *verdicts)))
    return tuple(done)
