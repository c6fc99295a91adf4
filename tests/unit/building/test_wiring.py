"""Tools as the command line asks for them."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from docker.errors import DockerException
from weightsmith.building import wiring
from weightsmith.building.wiring import open_tools
from weightsmith.core.errors import EnvironmentFailure, UsageError
from weightsmith.core.ports import Silent
from weightsmith.recipe.user_config import RunOptions


class Warned(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def warn(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize(("memory", "warnings"), [("", 0), ("3GiB", 0), ("5GiB", 1)])
def test_more_memory_than_is_free_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, memory: str, warnings: int
) -> None:
    monkeypatch.setattr(wiring, "free_memory", lambda: 4 << 30)
    progress = Warned()

    with open_tools(RunOptions(runner="local", memory=memory), progress):
        pass

    assert progress.texts == warnings * [
        "--memory 5GiB is more than the 4.0 GiB that are free, so jobs may swap"
    ]


@pytest.mark.parametrize(
    ("cpus", "gpus", "two"), [(1, (), False), (2, (), True), (8, ("NVIDIA L4",), False)]
)
def test_two_jobs_run_at_once_only_where_nobody_must_plan_a_gpu_for_both(
    monkeypatch: pytest.MonkeyPatch, cpus: int, gpus: tuple[str, ...], *, two: bool
) -> None:
    monkeypatch.setattr(wiring, "cores", lambda: cpus)
    monkeypatch.setattr(wiring, "gpu_names", lambda: gpus)

    with open_tools(RunOptions(runner="local"), Silent()) as tools:
        assert tools.two_at_once() == two


def test_an_engine_that_is_asked_for_and_does_not_answer_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its socket can be connected to, and what listens there says nothing."""

    def ping() -> None:
        raise DockerException("no answer")

    client = SimpleNamespace(ping=ping)
    monkeypatch.setattr(wiring.DockerEngine, "client", property(lambda _: client))

    with (
        pytest.raises(EnvironmentFailure, match="no answer"),
        open_tools(RunOptions(runner="docker"), Silent()),
    ):
        pass


def test_settings_that_a_caller_gives_are_read_as_those_of_the_file() -> None:
    missing = str(Path.home() / "not-there.pem")

    with (
        pytest.raises(UsageError, match=f"^the public key {re.escape(missing)} cannot be read"),
        open_tools(RunOptions(runner="local"), Silent(), trusted={"verify_key": "~/not-there.pem"}),
    ):
        pass
