"""Tests of a drop that may stop after any question, against what chance does."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable

import pytest
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.sequential import (
    ERROR,
    DropTest,
    asking_order,
    candidates_testable,
    questions_needed,
)

RUNS = 2000
DRAWS = random.Random(7)


def often(count: int, chance: float) -> int:
    """The number of successes that so many runs exceed in one of a million cases at most."""
    spread = math.sqrt(count * chance * (1 - chance))
    return math.ceil(count * chance + 4.75 * spread + 1)


def lost(rate: float) -> Callable[[], float]:
    return lambda: float(DRAWS.random() < rate)


def both(lost_rate: float, won_rate: float) -> Callable[[], float]:
    rates = (lost_rate, won_rate, 1 - lost_rate - won_rate)
    return lambda: DRAWS.choices((1.0, -1.0, 0.0), rates)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("questions", "limit", "draw"),
    [
        (60, 0.1, lost(0.1)),
        (60, 0.1, both(0.3, 0.2)),
        (60, 0.35, lost(0.35)),
        (100, 0.05, both(0.07, 0.02)),
        (60, 0.2, both(0.6, 0.4)),
    ],
    ids=["lost", "lost and won", "a wide limit", "many questions", "much of both"],
)
def test_a_drop_of_the_limit_is_rarely_called_proven_however_often_one_looks(
    questions: int, limit: float, draw: Callable[[], float]
) -> None:
    """All candidates drop by exactly the limit: one that is published is an error."""
    tests = max(1, candidates_testable([(questions, limit)], 4))
    test = DropTest(limit=limit, level=ERROR / tests, questions=questions)

    wrong = sum(
        any(test.proven_at([draw() for _ in range(questions)]) for _ in range(tests))
        for _ in range(RUNS)
    )

    assert wrong <= often(RUNS, ERROR)


@pytest.mark.slow
def test_candidates_that_lose_the_same_questions_share_their_errors() -> None:
    """One set of questions for all, as in a build: each candidate loses a little more or less."""
    test = DropTest(limit=0.1, level=ERROR / 3, questions=60)
    wrong = 0
    for _ in range(RUNS):
        hard = [DRAWS.random() for _ in range(60)]
        wrong += any(
            test.proven_at([float(one < rate) for one in hard]) for rate in (0.13, 0.11, 0.1)
        )

    assert wrong <= often(RUNS, ERROR)


def test_a_small_drop_is_mostly_proven() -> None:
    test = DropTest(limit=0.1, level=ERROR / 4, questions=200)
    draw = lost(0.02)

    proven = sum(bool(test.proven_at([draw() for _ in range(200)])) for _ in range(500))

    assert proven > 450


@pytest.mark.slow
def test_the_interval_holds_after_every_question_at_once() -> None:
    test = DropTest(limit=0.1, level=0.05, questions=80)
    draw, misses = both(0.2, 0.05), 0
    for _ in range(200):
        drops = [draw() for _ in range(80)]
        ends = [test.interval(drops[:n]) for n in range(20, 81, 20)]
        misses += any(not one.low <= 0.15 <= one.high for one in ends)

    assert misses <= often(200, 0.1)


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.1, 0.35, 0.9])
@pytest.mark.parametrize("level", [0.05, 0.004])
def test_as_many_questions_are_needed_as_prove_it_if_no_answer_changes(
    limit: float, level: float
) -> None:
    needed = questions_needed(limit, level)

    def proven(count: int) -> bool:
        test = DropTest(limit=limit, level=level, questions=count)
        assert test.hopeless({}) == (not test.proven_at([0.0] * count))
        return bool(test.proven_at([0.0] * count))

    assert proven(needed)
    assert not proven(needed - 1)
    # The chance that so many questions show no loss at a rate of the limit.
    assert (1 - limit) ** needed <= level < (1 - limit) ** (needed - 1)


def test_nothing_shows_that_there_is_no_drop_at_all() -> None:
    assert questions_needed(0.0, 0.05) == 0
    assert candidates_testable([(10**6, 0.0)], 5) == 0


def test_what_is_hopeless_is_never_proven_without_gains() -> None:
    test = DropTest(limit=0.2, level=0.05, questions=20)
    for drops in itertools.product((0.0, 1.0), repeat=8):
        if test.hopeless(Counter(drops)):
            assert not test.proven_at([*drops, *[0.0] * 12])
    assert test.hopeless({1.0: 3})
    assert not DropTest(limit=0.2, level=0.05, questions=200).hopeless({1.0: 3})


def test_few_questions_leave_few_tests() -> None:
    assert candidates_testable([(28, 0.1)], 10) == 0
    assert candidates_testable([(29, 0.1)], 10) == 1
    assert candidates_testable([(60, 0.1)], 10) == 5
    assert candidates_testable([(100, 0.1)], 10) == 10
    assert candidates_testable([(100, 0.1), (29, 0.1)], 10) == 1
    assert candidates_testable([(100, 0.1), (1, 1.0)], 10) == 10


def test_the_bets_are_parts_of_one_stake() -> None:
    for questions in (1, 29, 33, 60, 1000):
        parts = DropTest(limit=0.1, level=0.05, questions=questions).parts
        assert sum(parts) == pytest.approx(1)
        assert min(parts) >= 0


def test_the_order_of_asking_is_that_of_the_questions_not_of_their_file() -> None:
    items = [
        Item(messages=({"role": "user", "content": f"question {n}"},), expected=(str(n),), line=n)
        for n in range(50)
    ]
    order = [items[place].prompt for place in asking_order(items)]

    assert sorted(order) == sorted(one.prompt for one in items)
    assert order != [one.prompt for one in items]
    assert [items[::-1][place].prompt for place in asking_order(items[::-1])] == order
