"""Split files hold the same tensors: the safetensors package reads them back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from weightsmith.checkpoints.reshard import INDEX, read_pieces, reshard, size_of
from weightsmith.errors import InputRefused, UsageError
from weightsmith.oci.image import ImageConfig, assemble
from weightsmith.oci.unpack import unpack
from weightsmith.oci.weights import weight_layers
from weightsmith.values import Digest, FileEntry, Tree

LARGEST = 400_000


def tree_of(root: Path) -> Tree:
    files = [
        FileEntry(path=p.name, size=p.stat().st_size, digest=Digest.of(p.read_bytes()))
        for p in sorted(root.iterdir())
    ]
    return Tree(root=root, files=tuple(files))


def tensors(seed: int, count: int = 8) -> dict[str, np.ndarray]:
    source = np.random.default_rng(seed)
    return {f"{seed}.{n}": source.random((160, 160), np.float32) for n in range(count)}


def plain(key: str, make: object) -> str:
    return make()  # type: ignore[operator]


def test_the_same_tensors_in_smaller_files(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_file(tensors(1), model / "model.safetensors", {"format": "pt"})
    (model / "config.json").write_text("{}")
    split = reshard(tree_of(model), LARGEST, plain)
    assert "model.safetensors" not in {file.path for file in split.tree.files}
    assert all(size_of(pieces) <= LARGEST for pieces in split.contents.values())
    layers = weight_layers(
        split.tree, own_layer=100_000, largest=LARGEST, contents=split.contents, epoch=0
    )
    assert len(layers) == 4
    assert all(layer.size <= LARGEST for layer in layers)
    unpack(assemble(layers, config=ImageConfig(), epoch=0), tmp_path / "root")
    out = tmp_path / "root" / "models"
    index = json.loads((out / INDEX).read_text())
    found = {}
    for path in out.glob("*.safetensors"):
        part = load_file(path)
        assert {index["weight_map"][name] for name in part} == {path.name}
        found |= part
    wanted = tensors(1)
    assert found.keys() == wanted.keys() == index["weight_map"].keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in wanted.values())
    for file in split.tree.files:
        assert Digest.of((out / file.path).read_bytes()) == file.digest


def test_files_that_fit_stay_and_the_index_is_kept(tmp_path: Path) -> None:
    save_file(tensors(1, 1), tmp_path / "model-00001-of-00002.safetensors")
    save_file(tensors(2), tmp_path / "model-00002-of-00002.safetensors")
    weights = {f"1.{n}": "model-00001-of-00002.safetensors" for n in range(1)}
    weights |= {f"2.{n}": "model-00002-of-00002.safetensors" for n in range(8)}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"x": 1}, "weight_map": weights}))
    tree = tree_of(tmp_path)
    split = reshard(tree, LARGEST, plain)
    assert split.tree.files[0] == tree.files[0]
    index = json.loads(b"".join(read_pieces(split.contents[INDEX])))
    assert index["metadata"] == {"x": 1}
    assert index["weight_map"]["1.0"] == "model-00001-of-00002.safetensors"
    assert index["weight_map"]["2.0"] == "model-00002-of-00002-00001-of-00003.safetensors"


def test_nothing_to_do(tmp_path: Path) -> None:
    save_file(tensors(1, 1), tmp_path / "model.safetensors")
    tree = tree_of(tmp_path)
    assert reshard(tree, LARGEST, plain).tree is tree


def test_what_cannot_be_split(tmp_path: Path) -> None:
    save_file({"a": np.zeros(200_000, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="tensor a alone"):
        reshard(tree_of(tmp_path), LARGEST, plain)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.gguf").write_bytes(bytes(500_000))
    with pytest.raises(UsageError, match="maximum layer size") as caught:
        reshard(tree_of(tmp_path), LARGEST, plain)
    assert "--split-max-size" in caught.value.hint


@pytest.mark.parametrize("how", ["is cut off", "is written to", "is gone", "is a pipe"])
def test_a_file_that_changes(tmp_path: Path, how: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors(1), path)
    split = reshard(tree_of(tmp_path), LARGEST, plain)
    last = max(name for name in split.contents if name != INDEX)
    reading = read_pieces(split.contents[last])
    next(reading)
    match how:
        case "is cut off":
            path.write_bytes(path.read_bytes()[:300_000])
        case "is written to":
            next(reading)  # it is open from here on
            os.utime(path, (1, 1))
        case "is gone":
            path.unlink()
        case "is a pipe":
            path.unlink()
            os.mkfifo(path)
    with pytest.raises(InputRefused, match="changed while"):
        list(reading)
