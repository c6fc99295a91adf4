"""The samples that calibration runs on: every text, in pieces that a model takes."""

from __future__ import annotations

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.quantizers.running import equal_length, samples


def letters(text: str) -> list[int]:
    return [ord(c) for c in text]


def test_texts_stay_apart_long_ones_are_cut_and_none_is_dropped() -> None:
    found = samples(["a" * 1200, "", "b" * 30], letters)

    assert found == [letters("a") * 512, letters("a") * 512, letters("a") * 176, letters("b") * 30]


def test_too_few_tokens_to_measure_on_are_reported() -> None:
    with pytest.raises(InputRefused, match="30 tokens"):
        samples(["b" * 15, "c" * 15], letters)


@pytest.mark.parametrize("count", [256, 511, 512, 513, 1025, 2013, 4096])
def test_joined_texts_fill_samples_of_one_length_and_none_is_dropped(count: int) -> None:
    tokens = list(range(count))

    found = equal_length([tokens[:100], tokens[100:]])

    assert len({len(sample) for sample in found}) == 1
    assert len(found[0]) <= 512
    joined = [token for sample in found for token in sample]
    assert joined[:count] == tokens
    assert joined[count:] == tokens[: len(joined) - count]
    assert len(joined) - count < len(found)
