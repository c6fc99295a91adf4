"""Builds of two users with a cache in the registry that they push to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from weightsmith.core.values import Blob
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.oci.registry_cache import RegistryCache
from weightsmith.outside.registries import PushedLayers

from tests.fakes.debian_registry import real_registry
from tests.fakes.memory import Memory, in_memory

pytestmark = pytest.mark.registry


class Watched(RegistryCache):
    """Notes what is read of it."""

    def __init__(self, registry: Registry, repository: Reference) -> None:
        super().__init__(registry, repository)
        self.reads: list[Blob] = []

    def read(self, blob: Blob) -> Iterator[bytes]:
        self.reads.append(blob)
        return super().read(blob)


class User:
    """A user with an empty machine, who pushes to a repository of the registry."""

    def __init__(self, memory: Memory, host: str, folder: Path, repository: str) -> None:
        self.layers = PushedLayers(folder / "layers")
        self.client = Registry(pause=lambda _: None, memory=self.layers)
        self.cache = Watched(self.client, Reference.parse(f"{host}/team/cache"))
        memory.client, memory.cache = self.client, self.cache
        memory.remember = self.layers.note
        memory.write_recipe(image={"repository": f"{host}/{repository}"})
        self.memory = memory


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with real_registry(tmp_path_factory.mktemp("registry")) as host:
        yield host


@pytest.fixture(scope="module")
def first(host: str, tmp_path_factory: pytest.TempPathFactory, client: Registry) -> str:
    """The digest of the image of the first user, whose results are in the cache."""
    folder = tmp_path_factory.mktemp("first")
    with in_memory(folder, client) as memory:
        user = User(memory, host, folder, "one/model")
        (built,) = memory.build(push=True).values()
        assert memory.given_up == 0
        user.client.close()
        return str(built.published.digest)


def test_weights_of_the_cache_are_mounted_and_none_is_read(
    memory: Memory, host: str, first: str, tmp_path: Path
) -> None:
    user = User(memory, host, tmp_path, "two/model")
    (built,) = memory.build(push=True).values()
    weights = [layer for layer in built.published.layers if layer.file.endswith(".gguf")]

    assert built.published.digest == first
    assert memory.jobs() == []
    assert weights
    layers = {layer.digest for layer in built.published.layers}  # the engine's too
    assert not {blob.digest for blob in user.cache.reads} & layers
    assert built.published.mounted >= 2
    assert built.published.uploaded_bytes < min(w.size for w in weights)
    assert not [entry for entry in memory.store.entries.values() if entry.tree.weight_bytes]
    user.client.close()
