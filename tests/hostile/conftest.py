"""What several attackers need: a registry or hub to lie, a client, limits of half a second."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from weightsmith.core import time_limits
from weightsmith.evaluating import metrics
from weightsmith.oci.registry import Registry

from tests.fakes.hub import FakeHub, fake_hub
from tests.fakes.registry import FakeRegistry, fake_registry


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with fake_registry() as state:
        yield state


@pytest.fixture
def client() -> Iterator[Registry]:
    with Registry(pause=lambda _: None) as registry:
        yield registry


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[FakeHub]:
    with fake_hub(tmp_path / "cache", monkeypatch) as state:
        yield state


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limits, "FOREIGN_SECONDS", 0.5)
    monkeypatch.setattr(metrics, "SECONDS_EACH", 0.05)
