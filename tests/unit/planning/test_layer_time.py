"""What is estimated of a stage's time from that of one layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from weightsmith.errors import InputRefused
from weightsmith.planning import layer_time
from weightsmith.planning.layer_time import LayerTime, stage_seconds, with_times
from weightsmith.validating import greedy

TIMES = LayerTime(layers=10, counts=(8, 256), layer=(1.0, 32.0), head=(0.5, 0.5))
"""A layer takes an eighth of a second per token, the head always half a second."""


def test_a_pass_is_one_layer_times_all_of_them_and_the_head() -> None:
    assert TIMES.passed(8, 8) == pytest.approx(10.5)
    assert TIMES.passed(80, 1) == pytest.approx(100.5)


@pytest.mark.parametrize(("size", "new"), [(2 * 10**9, 16), (140 * 10**9, 4)])
def test_a_large_model_generates_few_tokens_for_its_validation(size: int, new: int) -> None:
    tree = SimpleNamespace(weight_bytes=size)
    sources = cast("Any", SimpleNamespace(base=SimpleNamespace(tree=tree), adapters=("one",)))
    shape = cast("Any", None)

    found = stage_seconds(TIMES, shape, sources, (), 0, 0)["validate"]

    assert found == pytest.approx(new * TIMES.passed(8, 8) + TIMES.passed(3 * 640, 3 * 640))
    theirs = (greedy._MOST_NEW, greedy._FEW_NEW, greedy._LARGE)
    assert theirs == (layer_time.NEW, layer_time.FEW_NEW, layer_time.LARGE)


def test_noise_makes_no_time_negative() -> None:
    slower = LayerTime(layers=10, counts=(8, 256), layer=(2.0, 1.0), head=(0.0, 1000.0))

    assert slower.passed(1000, 0) == pytest.approx(20.0)


def test_rows_have_times_where_the_model_runs_and_is_not_cached() -> None:
    rows = [
        {"stage": "merge", "cached": False},
        {"stage": "validate", "cached": True},
        {"stage": "quality", "cached": False},
    ]

    found = with_times(rows, lambda: {"validate": 3.0, "quality": 4.04})

    assert [row["seconds"] for row in found] == [None, None, 4.0]


def test_a_model_of_unknown_dimensions_has_no_times() -> None:
    def unknown() -> dict[str, float]:
        raise InputRefused("no shape")

    assert with_times([{"stage": "quality", "cached": False}], unknown)[0]["seconds"] is None
