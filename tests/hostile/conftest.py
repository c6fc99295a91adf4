"""What several attackers need: a registry to lie, its client, and limits of half a second."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from weightsmith.core import time_limits
from weightsmith.oci.registry import Registry

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
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limits, "FOREIGN_SECONDS", 0.5)
