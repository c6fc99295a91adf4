"""A fake registry, and a client that does not sleep."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.registry import FakeRegistry, fake_registry
from toolchain.oci.registry import Registry


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with fake_registry() as state:
        yield state


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def client(pauses: list[float]) -> Iterator[Registry]:
    with Registry(pause=pauses.append) as registry:
        yield registry
