"""A fake registry, a client that does not sleep, and an image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from weightsmith.oci.image import Image
from weightsmith.oci.registry import Registry

from tests.fakes.images import tiny_image
from tests.fakes.registry import FakeRegistry, fake_registry


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


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return tiny_image(tmp_path / "model")
