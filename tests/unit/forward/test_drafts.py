"""How much of a draft is read next."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from weightsmith.forward.greedy import Draft, read_at_once


def passes(true: Sequence[int], draft: Sequence[int], ends: Sequence[int] = (0,)) -> list[int]:
    """Write a text with a draft; return how many tokens of it each pass read."""
    text, probable, read = list[int](), Draft(draft), list[int]()
    while len(text) < len(true):
        guess = probable.guess(len(true) - len(text) - 1, ends)
        rest = true[len(text) :]
        right = next((n for n, t in enumerate(guess) if t != rest[n]), len(guess))
        probable.learn(len(guess), right, rest[right])
        text += rest[: right + 1]
        read.append(len(guess))
    assert text == list(true)
    return read


TRUE = list(range(1, 65))


def test_what_is_right_is_read_in_ever_longer_parts() -> None:
    assert passes(TRUE, TRUE) == [16, 32, 13]


def test_no_pass_reads_more_than_is_planned() -> None:
    long = list(range(1, 999))

    assert max(passes(long, long)) < read_at_once(1, 998) == 65
    assert read_at_once(100, 998) == 116
    assert read_at_once(100, 0) == 100


def test_what_is_wrong_is_read_once() -> None:
    assert passes(TRUE, [99] * 64) == [16, *[0] * 63]
    assert passes(TRUE, []) == [0] * 64


@pytest.mark.parametrize(
    "draft",
    [
        pytest.param([*TRUE[:9], 99, *TRUE[10:]], id="another token"),
        pytest.param([*TRUE[:9], *TRUE[10:]], id="a token less"),
        pytest.param([*TRUE[:9], *TRUE[11:]], id="two tokens less"),
        pytest.param([*TRUE[:9], 99, *TRUE[9:]], id="a token more"),
    ],
)
def test_the_rest_of_a_draft_is_read_where_it_fits_again(draft: Sequence[int]) -> None:
    read = passes(TRUE, draft)

    assert len(read) <= 9
    assert sum(read) <= 64 + 24


def test_the_end_itself_is_not_read() -> None:
    assert Draft([5, 6, 0, 7]).guess(9, [0]) == [5, 6]
    assert Draft([5, 6, 7]).guess(1, [0]) == [5]
    assert passes([5, 6, 0], [5, 6, 0]) == [2]
