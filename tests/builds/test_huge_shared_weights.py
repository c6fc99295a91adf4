"""A cache in the registry that images are pushed to, also of 140 GB and beside a small disk."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from weightsmith.core.ports import Cache
from weightsmith.core.values import Blob, Digest, FileEntry, Published, Tree
from weightsmith.oci.layers import LAYER_TAR
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.oci.registry_cache import RegistryCache
from weightsmith.oci.weights import weight_layers
from weightsmith.outside.registries import PushedLayers

from tests.fakes.cache import MemoryCache
from tests.fakes.memory import Memory, in_memory
from tests.fakes.real_registries import real_registry

HUGE = 140 * 10**9
SMALL_DISK = 10**9
WEIGHTS = Digest.of(b"140 GB that nobody has")
SETTINGS = "serve.memory=400GiB"


class Hole(bytes):
    """A blob of the registry's that has a size and no bytes."""

    def __len__(self) -> int:
        return HUGE_LAYER


def inflated(document: bytes, digest: Digest) -> bytes:
    """Return a quantized result's document with weights of 140 GB, in a layer with this digest."""
    statement = json.loads(document)
    predicate = statement["predicate"]
    for file in predicate["files"]:
        file["size"] = HUGE if file["path"].endswith(".gguf") else file["size"]
    predicate["layers"] = [[digest, HUGE_LAYER]]
    return json.dumps(statement).encode()


def _layer_bytes(name: str) -> int:
    entry = FileEntry(path=name, size=HUGE, digest=Digest.of(b""))
    (layer,) = weight_layers(Tree(root=Path(), files=(entry,)), epoch=0)
    return layer.size


HUGE_LAYER = _layer_bytes("tiny.gguf")


@pytest.fixture
def cache(memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryCache:
    """A cache that has the weights, and what is known of an image with them.

    Nobody can start that image here: the answers are those of one with small weights.
    """
    cache = MemoryCache()
    with in_memory(_made(tmp_path / "small")) as small:
        small.cache = cache
        small.build(SETTINGS)
        engine = small.engine
    (key,) = [key for key, data in cache.documents.items() if stage(data) == "quantize"]
    cache.documents[key] = inflated(cache.documents[key], WEIGHTS)
    cache.origin = (memory.registry.host, "team/cache")
    memory.registry.blobs["team/cache", WEIGHTS] = Hole()
    with in_memory(_made(tmp_path / "tester")) as tester, monkeypatch.context() as patch:
        patch.setattr(
            "weightsmith.stages.evaluate.candidate", lambda *_: nullcontext(*engine.names)
        )
        tester.launcher.engine = engine
        build(tester, memory.repository, cache)
    return cache


def build(user: Memory, repository: str, cache: Cache) -> Published:
    """Build as a user with an empty disk of a gigabyte, and push to the registry that is there."""
    layers = PushedLayers(user.folder / "layers")
    user.write_recipe(image={"repository": repository})
    user.cache, user.remember, user.store.free = cache, layers.note, SMALL_DISK
    with Registry(pause=lambda _: None, memory=layers) as user.client:
        (built,) = user.build(SETTINGS, push=True).values()
    return built.published


def test_weights_of_140_gb_are_published_through_a_disk_of_1_gb(
    memory: Memory, cache: MemoryCache, tmp_path: Path
) -> None:
    cache.read_bytes = 0
    memory.registry.manifests.clear()
    for place in [place for place in memory.registry.blobs if place[0] == "team/tiny"]:
        del memory.registry.blobs[place]
    published = build(memory, memory.repository, cache)

    assert memory.jobs() == []
    was_mounted(published)
    assert cache.read_bytes < 1 << 20
    assert disk_bytes(tmp_path) < SMALL_DISK


def was_mounted(published: Published) -> None:
    assert {layer.digest: layer.size for layer in published.layers}[WEIGHTS] == HUGE_LAYER
    assert published.mounted >= 1
    assert published.uploaded_bytes < 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with a gigabyte."""
    folder = _made(tmp_path / "disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.root
@pytest.mark.registry
def test_docker_registry_mounts_weights_of_140_gb_for_a_machine_with_1_gb(
    cache: MemoryCache, tmp_path: Path, small_disk: Path
) -> None:
    """Its blob is a hole in its own storage: nobody uploads 140 GB here, and nobody reads them."""
    folder = _made(tmp_path / "registry")
    with (
        real_registry(folder) as host,
        in_memory(small_disk) as user,
        Registry(pause=lambda _: None) as client,
    ):
        fill(RegistryCache(client, Reference.parse(f"{host}/team/cache")), cache, folder)
        there = Watched(client, Reference.parse(f"{host}/team/cache"))
        published = build(user, f"{host}/team/tiny", there)

        assert user.jobs() == []
        was_mounted(published)
        assert there.bytes < 1 << 20
        assert client.confirmed(Reference.parse(published.reference))
    assert disk_bytes(folder) < SMALL_DISK


def fill(there: RegistryCache, cache: MemoryCache, folder: Path) -> None:
    """Put the same results into a registry's cache, with a hole for the weights' layer."""
    root, digits = folder / "data" / "docker" / "registry" / "v2", WEIGHTS.hex
    blob = root / "blobs" / "sha256" / digits[:2] / digits / "data"
    link = root / "repositories" / "team" / "cache" / "_layers" / "sha256" / digits / "link"
    for path in (blob, link):
        path.parent.mkdir(parents=True)
    with blob.open("wb") as file:
        file.truncate(HUGE_LAYER)
    link.write_text(WEIGHTS)
    for key, document in cache.documents.items():
        bodies = [body(cache.blobs[name]) for name in cache.named[key]]
        if stage(document) == "quantize":
            huge = Blob(digest=WEIGHTS, size=HUGE_LAYER, media_type=LAYER_TAR)
            bodies.append((huge, unread))
        there.write(key, document, bodies)


def body(data: bytes) -> tuple[Blob, Callable[[], Iterator[bytes]]]:
    return Blob(digest=Digest.of(data), size=len(data), media_type=LAYER_TAR), lambda: iter((data,))


def unread() -> Iterator[bytes]:
    raise AssertionError("the registry has it")


def stage(document: bytes) -> str:
    return str(json.loads(document)["predicate"]["note"]["stage"])


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


class Watched(RegistryCache):
    """Notes and counts what is read of it."""

    def __init__(self, registry: Registry, repository: Reference) -> None:
        super().__init__(registry, repository)
        self.reads: list[Blob] = []
        self.bytes = 0

    def read(self, blob: Blob) -> Iterator[bytes]:
        self.reads.append(blob)
        for chunk in super().read(blob):
            self.bytes += len(chunk)
            yield chunk


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
def first(host: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the image of the first user, whose results are in the cache."""
    folder = tmp_path_factory.mktemp("first")
    with in_memory(folder) as memory:
        user = User(memory, host, folder, "one/model")
        (built,) = memory.build(push=True).values()
        assert memory.given_up == 0
        user.client.close()
        return str(built.published.digest)


@pytest.mark.registry
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
