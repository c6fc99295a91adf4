"""Why passing a gate shows nothing: it could not have failed, or not the same was asked.

A gain is as odd as a loss: if merged model or image are significantly better than their reference,
they were probably asked something else. It is no failure, because the fault may be the reference's,
and chance gives one in forty such gains.
"""

from __future__ import annotations

from collections.abc import Iterator

from weightsmith.core.values import Score, Scores
from weightsmith.evaluating.gate import NAMES, DropLimit, comparison_of, shown
from weightsmith.evaluating.statistics import items_needed, least_drop

_NEAR_ZERO = 0.05
"""A reference's score up to which there is next to nothing to lose."""
_CHANCE = 0.05
_JUDGED = ("merged", "dequantized", "image")


def inconclusive_reasons(scores: Scores, limit: DropLimit) -> tuple[str, ...]:
    """Return why these scores do not show that the image does what its reference does.

    One sentence each; () if they show, with 95 % confidence, that at most `max_drop` was lost. Of a
    task that the image was not asked yet, what the other scores already say.
    """
    reference = scores.get("adapter", scores.get("base"))
    if reference is None:
        return ()
    judged = {who: scores[who] for who in _JUDGED if who in scores}
    return (
        *_asked_otherwise(reference, judged),
        *_nothing_to_lose(scores, reference, limit.max_drop),
        *_gains(reference, judged),
        *_too_few(reference, scores.get("image"), scores.get("merged"), limit.max_drop),
    )


def _asked_otherwise(reference: Score, judged: Scores) -> Iterator[str]:
    """Yield which subjects got other tokens than the reference for the same questions.

    Counts are compared, since servers return no token ids; answers without them are left out.
    """
    for who, score in judged.items():
        pairs = zip(_prompt_tokens(reference), _prompt_tokens(score), strict=False)
        wrong = [(had, got) for had, got in pairs if had and got and had != got]
        if wrong:
            had, got = wrong[0]
            yield (
                f"{NAMES[who]} was asked otherwise than the reference in {len(wrong)} of"
                f" {score.n} questions: the first has {had} tokens for the reference and {got} for"
                f" {NAMES[who]}"
            )


def _prompt_tokens(score: Score) -> list[int]:
    return [row.get("prompt_tokens") or 0 for row in score.per_item]


def _nothing_to_lose(scores: Scores, reference: Score, max_drop: float) -> Iterator[str]:
    """Yield why the base, or an image that knows nothing, would pass too."""
    base = scores.get("base")
    if reference.score <= max(_NEAR_ZERO, max_drop):
        yield f"the reference scores {shown(reference)}: an image without a right answer would pass"
    elif base is None or base is reference:
        return
    elif base.score >= reference.score - max_drop:
        yield (
            f"the base alone scores {shown(base)} and would pass, because base + adapter scores"
            f" {shown(reference)}"
        )
    elif (gain := comparison_of(reference, base)) and gain.p > _CHANCE:
        yield (
            f"base + adapter scores {shown(reference)}, not significantly more than the base alone,"
            f" {shown(base)} (p={gain.p:.2g})"
        )


def _gains(reference: Score, judged: Scores) -> Iterator[str]:
    """Yield who is significantly better than its reference, which is as odd as a loss."""
    for who, score in judged.items():
        change = comparison_of(score, reference)
        if change and change.won > change.lost and change.p <= _CHANCE:
            yield (
                f"{NAMES[who]} scores {shown(score)}, significantly more than the reference,"
                f" {shown(reference)} (p={change.p:.2g}): check whether it was asked the same"
            )


def _too_few(
    reference: Score, image: Score | None, merged: Score | None, max_drop: float
) -> Iterator[str]:
    """Yield that the questions do not show a drop of at most `max_drop`.

    Before the image was asked, only what no answer of it could change.
    """
    last = image or merged
    if last is None:
        return
    needed, change = items_needed(max_drop), comparison_of(last, reference)
    if change is None:
        yield "there is no result per question, so chance cannot be excluded"
    elif max_drop <= 0 or needed > change.n:
        yield _few(change.n, max_drop, needed)
    elif image is not None and change.interval[1] > max_drop + 1e-9:
        yield (
            f"{change.n} questions do not show that the drop is at most {max_drop:g}: with 95 %"
            f" confidence it is at most {change.interval[1]:.3f}"
        )


def sampled(n: int, of: int) -> str:
    """Return what a sample of n of so many questions can show."""
    return (
        f"{n} of {of} questions are asked: at best they show that the drop is at most"
        f" {least_drop(n):.3f}"
    )


def _few(n: int, max_drop: float, needed: int) -> str:
    if not needed:
        return f"no number of questions can show that the drop is at most {max_drop:g}"
    return (
        f"{n} questions are too few to show that the drop is at most {max_drop:g}: even if no"
        f" answer changes, {needed} are needed"
    )
