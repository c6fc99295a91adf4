"""A mix is the best there is within its budget, by trying all of them."""

import itertools
import random

import pytest
from weightsmith.quantizers import mixing
from weightsmith.quantizers.mixing import Choice, choose, smallest

KINDS = {"q3": 110, "q4": 144, "q5": 176, "q6": 210, "q8": 272}


def drawn(seed):
    """Few matrices, so that every mix can be tried, and a budget between smallest and largest."""
    draw = random.Random(seed)
    unit = draw.choice([1, 7, 64])
    choices = {
        f"m{row}": [
            Choice(f"k{n}", unit * draw.randint(1, 40), draw.random())
            for n in range(draw.randint(1, 4))
        ]
        for row in range(draw.randint(1, 5))
    }
    largest = sum(max(one.size for one in row) for row in choices.values())
    return choices, draw.randint(smallest(choices), largest + 3)


def best(choices, budget):
    mixes = itertools.product(*choices.values())
    return min(sum(c.loss for c in mix) for mix in mixes if sum(c.size for c in mix) <= budget)


@pytest.mark.parametrize("seed", range(60))
def test_no_other_mix_of_the_budget_loses_less(seed):
    choices, budget = drawn(seed)

    found = choose(choices, budget)

    assert found.loss == pytest.approx(best(choices, budget))
    assert found.size <= budget
    assert found.bound <= found.loss + 1e-12
    taken = {name: {one.kind: one for one in row} for name, row in choices.items()}
    assert found.size == sum(taken[name][kind].size for name, kind in found.kinds.items())


@pytest.mark.parametrize("seed", range(60))
def test_with_a_small_table_the_bound_says_how_far_the_best_may_be(monkeypatch, seed):
    monkeypatch.setattr(mixing, "_CELLS", 20)
    choices, budget = drawn(seed)

    found, right = choose(choices, budget), best(choices, budget)

    assert found.size <= budget
    assert found.bound - 1e-12 <= right <= found.loss + 1e-12


def test_a_large_model_is_is_within_half_a_percent_of_its_bound():
    draw = random.Random(0)
    choices = {}
    for layer in range(40):
        for name, weights in (("q", 1 << 24), ("k", 1 << 22), ("up", 14336 << 12)):
            harm = draw.random()
            choices[f"{layer}.{name}"] = [
                Choice(kind, weights // 256 * size, harm * weights * 4 ** -(size / 32))
                for kind, size in KINDS.items()
            ]
    budget = smallest(choices) * 5 // 4

    found = choose(choices, budget)

    assert found == choose(dict(reversed(choices.items())), budget)
    assert found.loss <= found.bound * 1.005
    assert budget - found.size < budget / 1000


def test_a_budget_below_the_smallest_is_refused():
    choices = {"a": [Choice("x", 10, 0.5), Choice("y", 20, 0.1)]}

    assert choose(choices, 10).kinds == {"a": "x"}
    with pytest.raises(ValueError, match="at least 10 bytes"):
        choose(choices, 9)


def test_what_is_larger_and_no_better_is_never_taken():
    choices = {"a": [Choice("x", 10, 0.1), Choice("y", 20, 0.1), Choice("z", 30, 0.2)]}

    assert choose(choices, 100).kinds == {"a": "x"}
