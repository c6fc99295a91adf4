"""What tests of several commands start: a server that misbehaves, a registry to bake for."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from weightsmith.oci.registry import Registry

from tests.fakes.baking import Bakery
from tests.fakes.openai_server import servers
from tests.fakes.registry import fake_registry


@pytest.fixture
def serve():
    """Start servers that behave as a test wants it."""
    with servers() as start:
        yield start


@pytest.fixture
def bakery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bakery]:
    """A model and an engine base, and a registry to push to."""
    monkeypatch.setenv("WEIGHTSMITH_STORE", str(tmp_path / "store"))
    with fake_registry() as fake, Registry(pause=lambda _: None) as client:
        yield Bakery(fake, client, tmp_path)
