"""What tests of several commands start: a server that misbehaves, a registry to bake for."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from weightsmith.api.commands.verify import verify_image
from weightsmith.core.errors import CheckFailed
from weightsmith.core.ports import Silent
from weightsmith.oci.image import Image
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry

from tests.fakes.baking import Bakery, bake, make_key, make_model, push_base
from tests.fakes.openai_server import servers
from tests.fakes.registry import FakeRegistry, fake_registry


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


ENGINE = {"dev.weightsmith.engine": "llamacpp", "org.opencontainers.image.version": "1.0.0"}


@dataclass
class Scene:
    fake: FakeRegistry
    client: Registry
    model: Path
    key: Path
    public: Path
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.fake.host}/team/app:1"

    @property
    def base(self) -> str:
        return f"{self.fake.host}/base/engine:1"

    def check(self, name: str = "", key: Path | None = None) -> dict[str, str]:
        """Return what does not hold: check -> what was found; {} where all does."""
        try:
            verify_image(name or self.name, key or self.public, self.client, Silent())
        except CheckFailed as error:
            rows = error.details["checks"]
            return {row["check"]: row["found"] for row in rows if row["ok"] is False}
        return {}

    def image(self, name: str = "team/app:1") -> Image:
        place = Reference.parse(f"{self.fake.host}/{name}")
        return self.client.pull(place, platform="linux/amd64")


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setenv("WEIGHTSMITH_STORE", str(tmp_path / "store"))
    key, public = make_key(tmp_path)
    with fake_registry() as fake, Registry(pause=lambda _: None) as client:
        made = Scene(fake, client, make_model(tmp_path / "model"), key, public, tmp_path)
        push_base(client, made.base, ENGINE, {"app/llama-server": b"1"})
        bake(client, made.model, made.base, key, push=made.name)
        yield made
