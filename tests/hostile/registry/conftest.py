"""A registry, a hub, and the images of one key, for attackers to change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from weightsmith.oci.registry import Registry

from tests.fakes.baking import make_key, push_base
from tests.fakes.hub import FakeHub, fake_hub
from tests.fakes.registry import FakeRegistry
from tests.hostile.registry.shop import Shop


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(tmp_path / "cache", monkeypatch) as state:
        yield state


@pytest.fixture
def shop(
    fake: FakeRegistry, client: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Shop:
    monkeypatch.setenv("WEIGHTSMITH_STORE", str(tmp_path / "store"))
    base = f"{fake.host}/base/engine:1"
    engine = {"dev.weightsmith.engine": "llamacpp", "org.opencontainers.image.version": "1.0.0"}
    for tag in ("1", "2"):
        push_base(client, base[:-1] + tag, engine, {"app/llama-server": tag.encode()})
    return Shop(fake, client, *make_key(tmp_path), base, tmp_path)
