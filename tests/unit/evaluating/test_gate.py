"""Intervals and comparisons, what passes a gate, and what passing does not show."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from weightsmith.core.errors import CheckFailed
from weightsmith.core.values import Score
from weightsmith.core.vectors import packed
from weightsmith.evaluating.gate import (
    Rule,
    Verdict,
    adjusted,
    chances,
    compare,
    holm,
    inconclusive_reasons,
    items_needed,
    judge_drop,
    mcnemar,
    paired_interval,
    score_interval,
    sign_flips,
    too_few,
    wilson,
)


def test_wilson_by_hand() -> None:
    # p = 0.8, n = 10, z = 1.96: (0.8 + 0.19208) / 1.38416 -+ 1.96 / 1.38416 * sqrt(0.025604)
    low, high = wilson(8, 10)

    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(min_value=1, max_value=10**6), st.data())
def test_wilson_holds_the_share(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(min_value=0, max_value=n))
    low, high = wilson(right, n)

    assert 0 <= low <= right / n + 1e-12
    assert right / n - 1e-12 <= high <= 1


@pytest.mark.parametrize(
    ("lost", "won", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (6, 0, 2 / 64),
        (5, 1, 2 * 7 / 64),
        (1, 5, 2 * 7 / 64),
        (10, 10, 1.0),
        # 2 (1 + 15 + 105) / 2^15
        (2, 13, 2 * 121 / 32768),
    ],
)
def test_mcnemar_by_hand(lost: int, won: int, p: float) -> None:
    assert mcnemar(lost, won) == pytest.approx(p)


def test_mcnemar_computes_each_coefficient_from_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = 2 * sum(math.comb(700, k) for k in range(331)) / 2**700
    monkeypatch.delattr(math, "comb")  # of 50,000 changed answers, each takes milliseconds

    assert mcnemar(330, 370) == mcnemar(370, 330) == exact
    # Beyond what a float can hold: the normal approximation with continuity correction is close.
    assert mcnemar(25_500, 24_500) == pytest.approx(math.erfc(999 / math.sqrt(1e5)), rel=0.05)


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 200))
def test_the_interval_is_symmetric_and_grows_narrow(lost: int, won: int, same: int) -> None:
    n = lost + won + same
    low, high = paired_interval(lost, won, n)
    mirrored = paired_interval(won, lost, n)

    assert -1 <= low <= high <= 1
    assert (low, high) == pytest.approx((-mirrored[1], -mirrored[0]))
    if n:
        narrow = paired_interval(4 * lost, 4 * won, 4 * n)
        assert narrow[1] - narrow[0] <= high - low + 1e-12


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Simulated: 200 items of which 6 % are lost and 3 % won, true drop 0.03."""
    chance = random.Random(1)
    covered = 0
    for _ in range(2000):
        drawn = [chance.random() for _ in range(200)]
        lost, won = sum(x < 0.06 for x in drawn), sum(0.06 <= x < 0.09 for x in drawn)
        low, high = paired_interval(lost, won, 200)
        covered += low <= 0.03 <= high
    assert 0.93 < covered / 2000 < 0.98


@pytest.mark.parametrize("drop", [0.001, 0.01, 0.05, 0.2, 1.0])
def test_so_many_items_are_just_enough(drop: float) -> None:
    n = items_needed(drop)

    assert paired_interval(0, 0, n)[1] <= drop + 1e-9
    assert n == 1 or paired_interval(0, 0, n - 1)[1] > drop
    assert items_needed(0.0) == 0


def test_compares_in_order() -> None:
    found = compare([True, False, True, False], [True, True, False, False])

    assert (found.lost, found.won, found.n, found.drop) == (1, 1, 4, 0.0)
    with pytest.raises(ValueError, match="zip"):
        compare([True], [])


def score(right: int, n: int = 60, tokens: int = 5) -> Score:
    """The last `right` of n questions are answered rightly."""
    rows = tuple(
        {"prompt": f"q{k}", "answer": f"{k} {k >= n - right}", "ok": k >= n - right,
         "prompt_tokens": tokens}
        for k in range(n)
    )  # fmt: skip
    return Score(score=right / n, n=n, metric="contains", per_item=rows)


def gate(image: Score, reference: Score | None, max_drop: float, min_score: float = 0.0) -> Verdict:
    limit = Rule(max_drop=max_drop, min_score=min_score)
    verdict = judge_drop("image", image, "adapter", reference, limit)
    verdict.require()
    return verdict


def test_a_drop_of_exactly_what_is_allowed_passes() -> None:
    gate(score(1, 2), score(1, 2), 0.0, 0.5)
    gate(score(7, 10), score(8, 10), 0.1)
    gate(score(990, 1000), score(1000, 1000), 0.01)

    with pytest.raises(CheckFailed, match=r"0\.011 below.*at most 0\.010 is allowed"):
        gate(score(989, 1000), score(1000, 1000), 0.01)


def test_a_larger_drop_fails_with_the_numbers_and_what_changed() -> None:
    with pytest.raises(CheckFailed, match=r"scores 0\.200 .*0\.800 below.*1\.000") as caught:
        gate(score(1, 5), score(5, 5), 0.01)

    assert caught.value.exit_code == 4
    assert "'0 False', was '0 True'" in caught.value.hint
    assert caught.value.hint.count("now gives") == 3


def test_a_low_score_fails_even_where_the_reference_is_as_low() -> None:
    with pytest.raises(CheckFailed, match="below the minimum"):
        gate(score(0, 1), score(0, 1), 1.0, 0.5)
    with pytest.raises(CheckFailed) as caught:
        gate(score(1, 2), None, 1.0, 0.9)

    assert "'q0' now gives" in caught.value.hint
    # A harness states scores alone.
    with pytest.raises(CheckFailed) as caught:
        gate(Score(score=0.5, n=0, metric="acc"), Score(score=0.9, n=0, metric="acc"), 0.1)

    assert "train the adapter further" in caught.value.hint


def test_what_is_the_servers_fault_is_said_before_what_changed() -> None:
    rows = [dict(row) for row in score(5, 5).per_item]
    rows[0] |= {"ok": False, "parser": "the server's parser left a call in the text"}
    rows[1] |= {"ok": False, "answer": "", "error": "HTTP 400: too long"}
    image = Score(score=0.6, n=5, metric="tool-call", per_item=tuple(rows))

    with pytest.raises(CheckFailed, match="in 1 of 5 questions the server's parser") as caught:
        gate(image, score(5, 5), 0.1)
    assert caught.value.message.endswith(
        "1 of 5 questions got no answer, the first: HTTP 400: too long"
    )
    assert caught.value.hint.startswith("another serve.tool_parser may read it")
    assert "now gives 'no answer: HTTP 400: too long', was '1 True'" in caught.value.hint

    passed = gate(image, score(5, 5), 0.5)
    assert "the server's parser" in passed.reason
    assert passed.hint == ""


def test_a_verdict_says_how_certain_it_is_and_how_many_questions_would_do() -> None:
    verdict = gate(score(29, 30), score(30, 30), 0.05)

    assert "0.033 below" in verdict.reason
    assert "may be chance (p=1)" in verdict.reason
    assert (verdict.facts["lost"], verdict.facts["won"], verdict.facts["p"]) == (1, 0, 1.0)
    assert verdict.facts["interval"][0] < 1 / 30 < verdict.facts["interval"][1]
    few = too_few(gate(score(33, 33), score(33, 33), 0.05), 0.05)

    assert "33 questions are too few" in few
    assert "54 are needed" in few
    assert too_few(gate(score(54, 54), score(54, 54), 0.05), 0.05) == ""


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holms_method_is_the_closed_test_of_bonferroni(ps: list[float]) -> None:
    """A hypothesis is rejected if each set of them that holds it is (Marcus and others, 1976)."""
    places = range(len(ps))
    sets = [s for size in places for s in combinations(places, size + 1)]
    closed = [
        max(min(1.0, len(s) * min(ps[n] for n in s)) for s in sets if place in s)
        for place in places
    ]

    assert holm(ps) == pytest.approx(closed)


def test_suites_are_proven_together() -> None:
    """A drop of 0.05 is shown by 54 questions alone, and by 54 beside ten other suites is not."""
    one = {"base": score(3, 54), "adapter": score(54, 54), "image": score(54, 54)}
    rule = Rule(max_drop=0.05)
    p = adjusted([chances(one, rule)] * 11)[0]

    assert inconclusive_reasons(one, rule) == ()
    (reason,) = inconclusive_reasons(one, rule, p)
    assert "judged together with the other suites" in reason


def test_what_the_adapter_gained_on_the_base_is_no_doubt_of_the_image() -> None:
    """Of a suite that is held against the base; what the image gained on the adapter is one."""
    rule = Rule(max_drop=0.05, against="base")
    scores = {"base": score(20), "adapter": score(40), "merged": score(40)}

    assert inconclusive_reasons({**scores, "image": score(40)}, rule) == ()
    (reason,) = inconclusive_reasons({**scores, "image": score(58)}, rule)
    assert "the image scores 0.967" in reason
    assert "significantly more than base + adapter, 0.667" in reason


NOTHING, ALL = Score(score=0.0, n=60, metric="m"), Score(score=1.0, n=60, metric="m")


def doubted(max_drop: float = 0.05, **scores: Score) -> tuple[str, ...]:
    return inconclusive_reasons(scores, Rule(max_drop=max_drop))


@pytest.mark.parametrize(
    "scores",
    [
        {"base": score(3), "adapter": score(60), "merged": score(60), "image": score(60)},
        {"base": score(60), "image": score(60)},
        {"base": score(24), "adapter": score(30), "image": score(30)},
    ],
    ids=["all", "no adapter", "six won of sixty: p = 0.03"],
)
def test_a_gate_that_could_have_failed_leaves_no_doubt(scores: dict[str, Score]) -> None:
    assert doubted(**scores) == ()


@pytest.mark.parametrize(
    ("max_drop", "scores", "says"),
    [
        (
            0.05,
            {"base": score(58), "adapter": score(60), "image": score(60)},
            r"the base alone scores 0\.967 \(0\.89 to 0\.99, n=60\) and would pass",
        ),
        (
            0.05,  # five won of sixty: p = 0.06
            {"base": score(25), "adapter": score(30), "image": score(30)},
            r".*not significantly more than the base alone.*p=0\.062",
        ),
        (
            0.05,  # a Gemma without a chat template: the server had asked in ChatML
            {"base": score(0), "adapter": score(6), "merged": score(6), "image": score(50)},
            r"the image scores 0\.833 \(0\.72.*, significantly more than.*was asked the same$",
        ),
        (
            0.05,
            {"base": score(0, 33), "adapter": score(33, 33), "image": score(33, 33)},
            "33 questions are too few to show that the drop is at most 0.05: .* 54 are",
        ),
        (
            0.05,
            {"base": score(0), "adapter": score(60), "image": score(59)},
            "60 questions do not show that the drop .* it is at most 0.071",
        ),
        (
            0.0,
            {"base": score(0), "adapter": score(60), "image": score(60)},
            "no number of questions can show that the drop is at most 0",
        ),
        (
            0.05,  # of the image, which was not asked yet, this is known already
            {"base": score(0, 20), "adapter": score(20, 20), "merged": score(20, 20)},
            "20 questions are too few",
        ),
        (
            0.05,
            {"base": score(0), "adapter": score(60), "image": score(60, tokens=41)},
            "the image was asked otherwise .* in 60 of 60 .*5 tokens .* and 41 for the image$",
        ),
        (
            0.05,
            {"base": NOTHING, "adapter": ALL, "image": ALL},
            "there is no result per question, so chance cannot be excluded$",
        ),
    ],
)
def test_the_one_reason_why_passing_shows_nothing(
    max_drop: float, scores: dict[str, Score], says: str
) -> None:
    (reason,) = doubted(max_drop, **scores)

    assert re.match(says, reason)


@pytest.mark.parametrize(("right", "max_drop"), [(3, 0.04), (12, 0.2)])
def test_with_nothing_to_lose_nothing_is_shown(right: int, max_drop: float) -> None:
    reasons = doubted(max_drop, base=score(0), adapter=score(right), image=score(right))

    assert "an image without a right answer would pass" in reasons[0]


def graded(*values: float, guess: float | None = None) -> Score:
    more = {} if guess is None else {"guess": guess}
    rows = [
        {"prompt": str(n), "answer": "…", "ok": value == 1, "value": value, **more}
        for n, value in enumerate(values)
    ]
    share = sum(values) / len(values)
    return Score(score=share, n=len(values), metric="embedding", per_item=tuple(rows))


def test_scores_of_right_and_wrong_alone_are_judged_as_ever() -> None:
    right, wrong = graded(1.0, 1.0, 0.0, 1.0), graded(1.0, 0.0, 1.0, 0.0)
    found = compare(wrong.values, right.values)
    assert found == compare([True, False, True, False], [True, True, False, True])
    assert (found.lost, found.won, found.p) == (2, 1, mcnemar(2, 1))
    assert found.interval == paired_interval(2, 1, 4)


@pytest.mark.slow
def test_the_randomization_test_is_that_of_scipy() -> None:
    import numpy as np
    from scipy.stats import permutation_test

    draw = np.random.default_rng(0)
    for _ in range(20):
        changes = draw.normal(0.1, 0.3, 10)
        expected = permutation_test(
            (changes,), np.mean, permutation_type="samples", n_resamples=np.inf
        )
        assert sign_flips(changes.tolist()) == pytest.approx(expected.pvalue)
    many = draw.normal(0.03, 0.2, 200)
    drawn = permutation_test(
        (many,), np.mean, permutation_type="samples", n_resamples=20_000, rng=draw
    )
    assert sign_flips(many.tolist()) == pytest.approx(drawn.pvalue, abs=0.02)


def test_the_interval_holds_losses_that_are_rare() -> None:
    """Of nDCG, where a query in thirty loses most of its score, and the others nothing."""
    draw, held = random.Random(0), 0
    for _ in range(400):
        changes = [draw.uniform(0.5, 1) if draw.random() < 1 / 30 else 0.0 for _ in range(30)]
        low, high = compare([1 - change for change in changes], [1.0] * 30).interval
        held += low <= 0.75 / 30 <= high
    assert held >= 0.95 * 400
    low, high = compare([1.0] * 3, [1.0] * 3).interval
    assert high > 0.3, "three queries that did not change show next to nothing"


def test_a_graded_score_has_an_interval_by_its_spread() -> None:
    alike, spread = graded(*[0.5] * 40), graded(*[0.0, 1.0] * 20)
    narrow, wide = score_interval(alike), score_interval(spread)
    assert narrow[0] > wide[0]
    assert wide == pytest.approx(wilson(20, 40), abs=0.01)


def test_a_graded_drop_is_judged_and_its_worst_questions_are_named() -> None:
    before, now = graded(*[0.9] * 30), graded(*[0.9] * 28, 0.2, 0.3)
    verdict = judge_drop("image", now, "adapter", before, Rule(max_drop=0.01))
    assert not verdict.passed
    assert "0.043 below base + adapter" in verdict.reason
    assert verdict.hint.startswith("'28' now gives '… (0.200)', was '… (0.900)'; '29' now gives")
    assert judge_drop("image", now, "adapter", before, Rule(max_drop=0.05)).passed


def test_where_the_base_lacks_the_head_guessing_stands_for_it() -> None:
    """A gate that whoever has not read the texts would pass proves nothing."""
    rule = Rule(max_drop=0.05)
    known = graded(*[1.0] * 300, guess=0.4)
    scores = {"adapter": known, "merged": known, "image": known}
    assert inconclusive_reasons(scores, rule) == ()
    guessed = graded(*[1.0] * 300, guess=0.96)
    scores = {"adapter": guessed, "merged": guessed, "image": guessed}
    (reason,) = inconclusive_reasons(scores, rule)
    assert reason.startswith("who has not read the texts scores 0.960")
    few = {who: graded(*[1.0] * 4, guess=0.4) for who in ("adapter", "merged", "image")}
    assert any("not significantly more than" in one for one in inconclusive_reasons(few, rule))


def test_vectors_that_point_elsewhere_prove_nothing_whatever_they_find() -> None:
    known = replace(graded(*[1.0] * 300), vectors=(packed([1, 0]), packed([0, 1])))
    base = graded(*[0.2] * 300)
    near = replace(known, vectors=(packed([1, 0.1]), packed([0.1, 1])))
    turned = replace(known, vectors=(packed([0, 1]), packed([1, 0])))
    rule, scores = Rule(max_drop=0.05), {"base": base, "adapter": known, "merged": known}
    assert inconclusive_reasons({**scores, "image": near}, rule) == ()
    (reason,) = inconclusive_reasons({**scores, "image": turned}, rule)
    assert reason.startswith(
        "the image gives other vectors than the reference: their cosine is 0.000"
    )
