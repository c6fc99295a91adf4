"""How long the replay set may take at the start, from the weights that each token reads."""

import pytest
from weightsmith.serving import engines
from weightsmith.serving.healthcheck import startup_replay
from weightsmith.serving.plan import ServingPlan

GB = 1_000_000_000


@pytest.mark.parametrize(
    ("plan", "call", "whole"),
    [
        (ServingPlan(device="cpu", weights_bytes_per_gpu=GB // 10), 50, 60),
        (ServingPlan(device="cpu", weights_bytes_per_gpu=5 * GB), 50, 1020),
        (ServingPlan(device="cpu", weights_bytes_per_gpu=40 * GB), 256, 8190),
        (ServingPlan(device="nvidia-l4", gpus=1, weights_bytes_per_gpu=15 * GB), 50, 90),
        (ServingPlan(device="nvidia-h100", gpus=8, weights_bytes_per_gpu=18 * GB), 50, 90),
    ],
)
def test_its_limits_grow_with_the_weights(plan: ServingPlan, call: int, whole: int) -> None:
    found = startup_replay(engines()["vllm"], plan)

    assert f"--seconds {call} " in " ".join(found.command)
    assert found.call_seconds == call + 10
    assert found.seconds == whole

    reading = startup_replay(engines()["vllm"], plan, whole_weights=True)
    slowest = plan.weights_bytes_per_gpu * max(1, plan.gpus) / 100_000_000
    assert reading.command == found.command
    assert reading.seconds >= whole + slowest


@pytest.mark.parametrize("name", engines())
def test_it_asks_where_the_engine_listens(name: str) -> None:
    engine = engines()[name]
    command = startup_replay(engine, ServingPlan(device="cpu")).command

    said = dict(zip(command[1::2], command[2::2], strict=False))
    assert (said["--port"], said["--health"]) == (str(engine.port), engine.health_path)
    assert said.get("--port-variable", "") == engine.port_variable
    assert ("--key-variable" in command) == bool(engine.key_variable)
