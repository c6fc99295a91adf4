"""A ModelPack: what its specification requires, and what it is read back as."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.values import Tree
from weightsmith.oci.layout import read_layout, write_layout
from weightsmith.oci.modelpack import ModelDescription, described, model_pack
from weightsmith.oci.unpack import unpack

from tests.fakes.images import tree_of

FILES = {
    "README.md": b"# Model\n",
    "chat_template.jinja": b"{{ messages }}",
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": bytes(range(256)) * 40,
    "model-00002-of-00002.safetensors": b"\0" * 5000,
    "sub/tokenizer.json": b"{}",
}


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return tree_of(tmp_path / "model", FILES)


def description(**facts: Any) -> ModelDescription:
    return ModelDescription(
        **{"name": "support", "version": "1.2.0", "format": "safetensors"} | facts
    )


def test_the_manifest_is_what_the_specification_requires(tree):
    """model-spec, docs/spec.md and docs/annotations.md; sha256 by hashlib, not by us."""
    document = json.loads(model_pack(tree, description(), {"a": "b"}).manifest_bytes)

    assert document["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert document["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert document["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    assert document["annotations"] == {"a": "b"}
    rows = [(row["annotations"]["org.cncf.model.filepath"], row) for row in document["layers"]]
    assert [path for path, _ in rows] == sorted(FILES)
    for path, row in rows:
        metadata = json.loads(row["annotations"]["org.cncf.model.file.metadata+json"])
        assert row["digest"] == f"sha256:{hashlib.sha256(FILES[path]).hexdigest()}"
        assert (row["size"], metadata["size"]) == (len(FILES[path]),) * 2
        assert metadata["name"] == path.rpartition("/")[2]
        assert (metadata["mode"], metadata["typeflag"]) == (0o644, 0)
        assert metadata["mtime"] == "1970-01-01T00:00:00Z"
        assert row["annotations"]["org.opencontainers.image.title"] == path
    kinds = {
        path: row["mediaType"].removeprefix("application/vnd.cncf.model.") for path, row in rows
    }
    assert kinds["README.md"] == "doc.v1.raw"
    assert kinds["model-00001-of-00002.safetensors"] == "weight.v1.raw"
    assert {kinds[n] for n in ("chat_template.jinja", "config.json", "sub/tokenizer.json")} == {
        "weight.config.v1.raw"
    }


def test_the_configuration_is_what_the_schema_allows(tree):
    """schema/config-schema.json: no other keys, no empty ones, diffIds in the layers' order."""
    facts = description(
        family="llama", licenses=("apache-2.0",), parameters=134_515_008, precision="bfloat16"
    )
    standard = {"source": "https://a/b", "revision": "0a1b", "vendor": "", "title": "no"}
    labels = {f"org.opencontainers.image.{key}": text for key, text in standard.items()}
    image = model_pack(tree, replace(facts, described=described(labels)), labels)
    document = json.loads(image.config_bytes)

    assert set(document) == {"descriptor", "config", "modelfs"}
    assert document["descriptor"] == {
        "name": "support", "version": "1.2.0", "family": "llama", "licenses": ["apache-2.0"],
        "sourceURL": "https://a/b", "revision": "0a1b",
    }  # fmt: skip
    assert document["config"] == {
        "architecture": "transformer", "format": "safetensors", "paramSize": "134.5m",
        "precision": "bfloat16",
        "capabilities": {"inputTypes": ["text"], "outputTypes": ["text"]},
    }  # fmt: skip
    layers = json.loads(image.manifest_bytes)["layers"]
    assert document["modelfs"] == {"type": "layers", "diffIds": [row["digest"] for row in layers]}


@pytest.mark.parametrize(
    ("count", "shown"),
    [(500, "500"), (1500, "1.5k"), (999_990, "1.0m"), (8_030_261_248, "8.0b"), (10**12, "1.0t")],
)
def test_a_number_of_parameters(tree, count, shown):
    found = json.loads(model_pack(tree, description(parameters=count), {}).config_bytes)

    assert found["config"]["paramSize"] == shown
    assert re.fullmatch(r"[0-9]+(\.[0-9])?[kmbtq]?", shown, re.IGNORECASE)


def test_it_is_read_back_from_a_layout(tree, tmp_path):
    image = model_pack(tree, description(), {"dev.weightsmith.format": "safetensors"})
    write_layout(image, tmp_path / "layout")
    found = read_layout(tmp_path / "layout")

    assert found.digest == image.digest
    assert found.artifact_type == image.artifact_type
    assert found.labels == {"dev.weightsmith.format": "safetensors"}
    assert {layer.file: b"".join(layer.open()) for layer in found.layers} == FILES
    (row,) = json.loads((tmp_path / "layout" / "index.json").read_bytes())["manifests"]
    assert "platform" not in row


def test_a_file_that_changes_is_not_packed(tree, tmp_path):
    image = model_pack(tree, description(), {})
    tree.path("config.json").write_bytes(b"[]")

    with pytest.raises(InputRefused, match=r"config\.json"):
        write_layout(image, tmp_path / "layout")
    assert not (tmp_path / "layout" / "index.json").exists()


def test_it_cannot_be_started(tree, tmp_path):
    with pytest.raises(UsageError, match="no program"):
        unpack(model_pack(tree, description(), {}), tmp_path / "root")
