import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from weightsmith.evaluating.gate import (
    compare,
    items_needed,
    mcnemar,
    paired_interval,
    wilson,
)


def test_wilson_by_hand():
    # p = 0.8, n = 10, z = 1.96: (0.8 + 0.19208) / 1.38416 -+ 1.96 / 1.38416 * sqrt(0.025604)
    low, high = wilson(8, 10)

    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(min_value=1, max_value=10**6), st.data())
def test_wilson_holds_the_share(n, data):
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
def test_mcnemar_by_hand(lost, won, p):
    assert mcnemar(lost, won) == pytest.approx(p)


def test_mcnemar_of_many():
    # Beyond what a float can hold: the normal approximation with continuity correction is close.
    z = (1100 - 900 - 1) / math.sqrt(2000)
    assert mcnemar(1100, 900) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.05)


def test_mcnemar_computes_each_coefficient_from_the_one_before(monkeypatch):
    exact = 2 * sum(math.comb(700, k) for k in range(331)) / 2**700
    monkeypatch.delattr(math, "comb")  # of 50,000 changed answers, each takes milliseconds

    assert mcnemar(330, 370) == exact
    assert mcnemar(370, 330) == exact
    assert mcnemar(25_500, 24_500) == pytest.approx(math.erfc(999 / math.sqrt(1e5)), rel=0.05)


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 200))
def test_the_interval_is_symmetric_and_grows_narrow(lost, won, same):
    n = lost + won + same
    low, high = paired_interval(lost, won, n)
    mirrored = paired_interval(won, lost, n)

    assert -1 <= low <= high <= 1
    assert (low, high) == pytest.approx((-mirrored[1], -mirrored[0]))
    if n:
        wider = paired_interval(lost, won, n)[1] - paired_interval(lost, won, n)[0]
        narrow = paired_interval(4 * lost, 4 * won, 4 * n)
        assert narrow[1] - narrow[0] <= wider + 1e-12


def test_the_interval_covers_as_often_as_it_says():
    """Simulated: 200 items of which 6 % are lost and 3 % won, true drop 0.03."""
    import random

    chance = random.Random(1)
    covered = 0
    for _ in range(2000):
        drawn = [chance.random() for _ in range(200)]
        lost, won = sum(x < 0.06 for x in drawn), sum(0.06 <= x < 0.09 for x in drawn)
        low, high = paired_interval(lost, won, 200)
        covered += low <= 0.03 <= high
    assert 0.93 < covered / 2000 < 0.98


@pytest.mark.parametrize("drop", [0.001, 0.01, 0.05, 0.2, 1.0])
def test_so_many_items_are_just_enough(drop):
    n = items_needed(drop)

    assert paired_interval(0, 0, n)[1] <= drop + 1e-9
    assert n == 1 or paired_interval(0, 0, n - 1)[1] > drop
    assert items_needed(0.0) == 0


def test_compares_in_order():
    found = compare([True, False, True, False], [True, True, False, False])

    assert (found.lost, found.won, found.n, found.drop) == (1, 1, 4, 0.0)
    with pytest.raises(ValueError, match="zip"):
        compare([True], [])
