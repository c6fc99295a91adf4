"""Whether drafts pay: verdicts by rounds of both, and the cost of a step by hand."""

import pytest
from weightsmith.evaluating.acceptance import Drafted
from weightsmith.evaluating.drafting import draft_speed


@pytest.mark.parametrize(
    ("with_drafts", "without", "verdict"),
    [
        ((20, 21, 22), (10, 11, 12), "pay"),
        ((10, 11, 12), (20, 21, 22), "do not pay"),
        ((10, 20, 21), (11, 12, 13), "not shown"),
        ((10, 10, 10), (10, 10, 10), "not shown"),
    ],
)
def test_only_rounds_that_do_not_overlap_show_it(with_drafts, without, verdict) -> None:
    found = draft_speed(with_drafts, without, 3, None)

    assert found.verdict == verdict
    assert found.interval[0] <= found.times <= found.interval[1]
    assert "as long as a token" not in found.reason


def test_the_cost_of_a_step_is_what_it_gives_by_what_it_gains() -> None:
    """By hand: 10 steps gave 10 + 15 tokens, 2.5 each, at 1.25 times the speed: 2 times as long.

    As Leviathan et al. 2023 count it: the factor is the tokens of a step by its relative cost.
    """
    found = draft_speed((25, 25, 25), (20, 20, 20), 4, Drafted(steps=10, tokens=30, accepted=15))

    assert (found.times, found.interval, found.verdict) == (1.25, (1.25, 1.25), "pay")
    assert "2.00 times as long as a token without, and gives 2.50 tokens" in found.reason
    assert found.reason.startswith("drafts pay: 25 tokens per second with them, 20 without")
