"""Forms of a model in a real registry, read as their runners read them."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from weightsmith.core.errors import WeightsmithError
from weightsmith.core.values import Tree
from weightsmith.oci.image import Image, ImageConfig, assemble
from weightsmith.oci.layout import read_layout
from weightsmith.oci.modelpack import (
    ModelDescription,
    model_pack,
    ollama_model,
    tar_model_pack,
)
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.oci.weights import weight_layers

from tests.fakes.images import tree_of
from tests.fakes.real_registries import real_registry

pytestmark = pytest.mark.registry
WEIGHTS = b"GGUF" + bytes(range(256)) * 5000
DOCKER = "application/vnd.docker.distribution.manifest.v2+json"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[tuple[Registry, str]]:
    (tmp_path / "registry").mkdir()
    with real_registry(tmp_path / "registry") as host, Registry() as client:
        yield client, host


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return tree_of(tmp_path, {"bot.gguf": WEIGHTS, "LICENSE": b"Free.\n"})


def for_ollama(tree: Tree, **more: Any) -> Image:
    facts: dict[str, Any] = {
        "family": "llama", "file_type": "Q4_K_M", "parameters": 134_515_008, "context": 2048,
        "licenses": ("Free.\n",), "labels": {"a": "b"},
    }  # fmt: skip
    return ollama_model(tree, tree.files[0], **(facts | more))


def as_ollama_pulls(host: str, name: str, tag: str, models: Path) -> dict[str, bytes]:
    """Pull as ollama's server/images.go does: one media type accepted, each blob checked."""
    address = f"http://{host}/v2/{name}"
    request = Request(f"{address}/manifests/{tag}", headers={"Accept": DOCKER})
    with urlopen(request) as reply:
        assert reply.headers["Content-Type"] == DOCKER
        manifest = json.loads(reply.read())
    found = {}
    for row in (*manifest["layers"], manifest["config"]):
        with urlopen(f"{address}/blobs/{row['digest']}") as reply:
            data = reply.read()
        assert hashlib.sha256(data).hexdigest() == row["digest"].removeprefix("sha256:")
        assert len(data) == row["size"]
        found[row["mediaType"]] = data
        (models / row["digest"].replace(":", "-")).write_bytes(data)
    return found


def test_ollama_pulls_a_model(registry: tuple[Registry, str], tree: Tree, tmp_path: Path) -> None:
    client, host = registry
    image = for_ollama(tree)
    client.push(image, Reference.parse(f"{host}/team/bot:1"))
    (tmp_path / "blobs").mkdir()
    found = as_ollama_pulls(host, "team/bot", "1", tmp_path / "blobs")

    prefix = "application/vnd.ollama.image."
    assert found[f"{prefix}model"] == WEIGHTS
    assert found[f"{prefix}license"] == b"Free.\n"
    assert json.loads(found[f"{prefix}params"]) == {"num_ctx": 2048}
    config = json.loads(found["application/vnd.docker.container.image.v1+json"])
    expected = {
        "model_format": "gguf", "model_family": "llama", "model_families": ["llama"],
        "model_type": "134.52M", "file_type": "Q4_K_M", "architecture": "amd64", "os": "linux",
        "requires": "0.30.0",
    }  # fmt: skip
    assert expected.items() <= config.items()
    back = client.pull(Reference.parse(f"{host}/team/bot:1"))
    assert back.digest == image.digest
    assert back.has_files
    assert dict(back.labels) == {"a": "b"}


@pytest.mark.parametrize(
    ("count", "shown"), [(8_030_261_248, "8.0B"), (134_515_008, "134.52M"), (900, "900")]
)
def test_sizes_are_written_as_ollama_writes_them(tree: Tree, count: int, shown: str) -> None:
    settings = for_ollama(tree, parameters=count).settings
    assert settings["model_type"] == shown


def test_a_tar_pack_sends_no_weights_again(registry: tuple[Registry, str], tree: Tree) -> None:
    client, host = registry
    layers = weight_layers(tree)
    facts = ModelDescription(name="bot", version="1", format="gguf")
    first = client.push(
        assemble(layers, config=ImageConfig()), Reference.parse(f"{host}/team/bot:1")
    )
    again = client.push(
        tar_model_pack(layers, facts, {}), Reference.parse(f"{host}/team/bot:1-modelpack-tar")
    )
    raw = client.push(model_pack(tree, facts, {}), Reference.parse(f"{host}/team/bot:1-modelpack"))
    ollama = client.push(for_ollama(tree), Reference.parse(f"{host}/team/bot:1-ollama"))

    assert first.uploaded_bytes > len(WEIGHTS)
    assert again.uploaded_bytes < 2000
    assert raw.uploaded_bytes > len(WEIGHTS)
    assert ollama.uploaded_bytes < 2000  # its model is the ModelPack's blob
    back = client.pull(Reference.parse(f"{host}/team/bot:1-modelpack-tar"))
    assert [layer.digest for layer in back.layers] == [layer.digest for layer in layers]
    assert [layer.media_type for layer in back.layers] == [
        "application/vnd.cncf.model.weight.v1.tar",
        "application/vnd.cncf.model.weight.config.v1.tar",
    ]


@pytest.mark.skipif(not shutil.which("oras"), reason="oras is not installed")
def test_oras_copies_ollamas_form(
    registry: tuple[Registry, str], tree: Tree, tmp_path: Path
) -> None:
    """skopeo refuses Ollama's media types below a manifest of Docker's."""
    client, host = registry
    image = for_ollama(tree)
    client.push(image, Reference.parse(f"{host}/team/bot:1"))
    words = ["oras", "cp", "--from-plain-http", f"{host}/team/bot:1"]
    subprocess.run([*words, "--to-oci-layout", f"{tmp_path}/copy:1"], check=True)
    assert read_layout(tmp_path / "copy", "1").digest == image.digest


def test_a_media_type_that_nobody_knows_is_refused(
    registry: tuple[Registry, str], tree: Tree
) -> None:
    client, host = registry
    image = for_ollama(tree)
    other = image.manifest_bytes.replace(b"ollama.image.params", b"ollama.image.script")
    client.push(image, Reference.parse(f"{host}/team/bot:1"))
    client.push_manifest(Reference.parse(f"{host}/team/bot:2"), other, DOCKER)
    with pytest.raises(WeightsmithError, match="media type"):
        client.pull(Reference.parse(f"{host}/team/bot:2"))
