"""Weights of 140 GB in a cache of the registry that an image is pushed to, on a small disk."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from weightsmith.drivers.pushed_layers import PushedLayers
from weightsmith.oci.registry import Registry
from weightsmith.oci.weights import weight_layers
from weightsmith.values import Digest, FileEntry, Published, Tree

from tests.fakes.cache import MemoryCache
from tests.fakes.memory import Memory, in_memory

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
def cache(
    memory: Memory, client: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> MemoryCache:
    """A cache that has the weights, and what is known of an image with them.

    Nobody can start that image here: the answers are those of one with small weights.
    """
    cache = MemoryCache()
    with in_memory(_made(tmp_path / "small"), client) as small:
        small.cache = cache
        small.build(SETTINGS)
        engine = small.engine
    (key,) = [key for key, data in cache.documents.items() if stage(data) == "quantize"]
    cache.documents[key] = inflated(cache.documents[key], WEIGHTS)
    cache.origin = (memory.registry.host, "team/cache")
    memory.registry.blobs["team/cache", WEIGHTS] = Hole()
    with in_memory(_made(tmp_path / "tester"), client) as tester, monkeypatch.context() as patch:
        patch.setattr("weightsmith.pipeline.candidate", lambda *_: nullcontext(*engine.names))
        tester.launcher.engine = engine
        build(tester, memory, cache)
    return cache


def build(user: Memory, there: Memory, cache: MemoryCache) -> Published:
    """Build as a user with an empty disk of a gigabyte, and push to the registry that is there."""
    layers = PushedLayers(user.folder / "layers")
    user.write_recipe(image={"repository": there.repository})
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
    published = build(memory, memory, cache)

    assert memory.jobs() == []
    assert {layer.digest: layer.size for layer in published.layers}[WEIGHTS] == HUGE_LAYER
    assert published.mounted >= 1
    assert published.uploaded_bytes < 1 << 20
    assert cache.read_bytes < 1 << 20
    assert disk_bytes(tmp_path) < SMALL_DISK


def stage(document: bytes) -> str:
    return str(json.loads(document)["predicate"]["note"]["stage"])


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
