"""What is estimated of a stage's time from that of one layer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from weightsmith.forward.memory import LayerTime
from weightsmith.stages import validate
from weightsmith.stages.validate import ValidateStep
from weightsmith.validating import probes

TIMES = LayerTime(layers=10, counts=(8, 256), layer=(1.0, 32.0), head=(0.5, 0.5))
"""A layer takes an eighth of a second per token, the head always half a second."""


def test_a_pass_is_one_layer_times_all_of_them_and_the_head() -> None:
    assert TIMES.passed(8, 8) == pytest.approx(10.5)
    assert TIMES.passed(80, 1) == pytest.approx(100.5)


@pytest.mark.parametrize(("size", "new"), [(2 * 10**9, 16), (140 * 10**9, 4)])
def test_a_large_model_generates_few_tokens_for_its_validation(size: int, new: int) -> None:
    tree = SimpleNamespace(weight_bytes=size)
    sources = cast("Any", SimpleNamespace(base=SimpleNamespace(tree=tree), adapters=("one",)))
    given = cast("Any", SimpleNamespace(sources="sources"))

    found = ValidateStep.seconds(given, TIMES, cast("Any", {"sources": sources}))

    assert found == pytest.approx(new * TIMES.passed(8, 8) + TIMES.passed(3 * 640, 3 * 640))
    theirs = (probes._MOST_NEW, probes._FEW_NEW, probes._LARGE)
    assert theirs == (validate._NEW, validate._FEW_NEW, validate._LARGE)


def test_noise_makes_no_time_negative() -> None:
    slower = LayerTime(layers=10, counts=(8, 256), layer=(2.0, 1.0), head=(0.0, 1000.0))

    assert slower.passed(1000, 0) == pytest.approx(20.0)
