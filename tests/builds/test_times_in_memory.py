"""`plan --measure`: one layer is timed, and stages that run the model have estimated times."""

from __future__ import annotations

import json

from weightsmith.api.commands.plan import table
from weightsmith.building.explain import forecast

from tests.fakes.memory import Memory

RUN = {"validate", "reference", "quality"}


def test_stages_that_run_the_model_have_times(memory: Memory) -> None:
    request = memory.request()
    args = (request.file, request.targets, memory.dist, memory.tools)

    plain = forecast(*args)
    timed = forecast(*args, measure=True)

    seconds = {row["stage"]: row["seconds"] for row in timed["stages"]}
    assert {stage for stage, value in seconds.items() if value} == RUN
    # A pass with a token of each of eight probes takes at least 80 layers of half a second.
    assert seconds["validate"] > 16 * 80 * 0.5
    assert timed["layer_time"]["layers"] == 80
    assert memory.jobs() == ["layer_time"]
    json.dumps(timed, allow_nan=False)
    assert "one of 80 layers took 0.5 s for 8 tokens" in table(timed).replace("\n", " ")
    assert "min" in table(timed)
    assert "layer_time" not in plain
    assert "time" not in table(plain).splitlines()[2]


def test_what_is_cached_takes_no_time(memory: Memory) -> None:
    memory.build()
    request = memory.request()

    found = forecast(request.file, request.targets, memory.dist, memory.tools, measure=True)

    assert [row["seconds"] for row in found["stages"] if row["cached"]] == [None] * sum(
        row["cached"] for row in found["stages"]
    )
