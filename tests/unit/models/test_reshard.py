"""Split files hold the same tensors: the safetensors package reads them back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.values import Digest, FileEntry, Tree
from weightsmith.models.reshard import INDEX, Resharded, read_pieces, reshard, size_of
from weightsmith.oci.image import ImageConfig, assemble
from weightsmith.oci.unpack import unpack
from weightsmith.oci.weights import weight_layers

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
    return make()


def index_of(split: Resharded) -> dict[str, str]:
    return json.loads(b"".join(read_pieces(split.contents[INDEX])))["weight_map"]


def test_the_same_tensors_in_smaller_files(tmp_path):
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


@pytest.mark.parametrize("largest", [30_000, 65_536, 100_000])
def test_small_limits_hold_too(tmp_path, largest):
    """A limit of some kilobytes has room for tensors of 4 kB, beside headers and padding."""
    rows = np.random.default_rng(0)
    wanted = {f"t{n}": rows.random(1000, np.float32) for n in range(30)}
    save_file(wanted, tmp_path / "model.safetensors")
    split = reshard(tree_of(tmp_path), largest, plain)
    layers = weight_layers(split.tree, largest=largest, contents=split.contents, epoch=0)
    assert len(layers) > 1
    assert max(layer.size for layer in layers) <= largest
    unpack(assemble(layers, config=ImageConfig(), epoch=0), tmp_path / "root")
    parts = (load_file(p) for p in (tmp_path / "root" / "models").glob("*.safetensors"))
    found = {name: value for part in parts for name, value in part.items()}
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_files_that_fit_stay_and_the_index_is_kept(tmp_path):
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


def test_what_cannot_be_split(tmp_path):
    save_file(tensors(1, 1), tmp_path / "model.safetensors")
    tree = tree_of(tmp_path)
    assert reshard(tree, LARGEST, plain).tree is tree, "there is nothing to split"
    save_file({"a": np.zeros(200_000, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="tensor a alone"):
        reshard(tree_of(tmp_path), LARGEST, plain)
    (tmp_path / "model.safetensors").unlink()
    for name, hint in (("model.gguf", "--split-max-size"), ("tokenizer.json", "--max-layer-size")):
        (tmp_path / name).write_bytes(bytes(500_000))
        with pytest.raises(UsageError, match=f"{name} is larger than the maximum") as caught:
            reshard(tree_of(tmp_path), LARGEST, plain)
        assert hint in caught.value.hint
        (tmp_path / name).unlink()


def test_what_cannot_be_split_may_stay_whole(tmp_path):
    save_file(tensors(1), tmp_path / "model.safetensors")
    (tmp_path / "model.gguf").write_bytes(bytes(500_000))
    split = reshard(tree_of(tmp_path), LARGEST, plain, strict=False)
    shards = {f"model-{n:05}-of-00003.safetensors" for n in range(1, 4)}
    assert split.contents.keys() == {INDEX} | shards
    assert split.tree.has("model.gguf")
    save_file({"a": np.zeros(200_000, np.float32)}, tmp_path / "model.safetensors")
    tree = tree_of(tmp_path)
    assert reshard(tree, LARGEST, plain, strict=False).tree is tree


def test_a_large_tensor_is_alone_in_its_file(tmp_path):
    wide = {"b": np.zeros(200_000, np.float32), "a": np.ones(9, np.float32)}
    save_file(wide | tensors(1, 3), tmp_path / "model.safetensors")
    split = reshard(tree_of(tmp_path), LARGEST, plain, strict=False)
    places = index_of(split)
    assert [name for name in places if places[name] == places["b"]] == ["b"]


def test_other_models_beside_the_weights_stay_whole(tmp_path):
    """Adapters lie in folders of the image, and elsewhere on disk; the index is not for them."""
    base, adapter = tmp_path / "base", tmp_path / "adapter.safetensors"
    base.mkdir()
    save_file(tensors(1), base / "model.safetensors")
    save_file({"lora_A": np.zeros(200_000, np.float32)}, adapter)
    place = "adapters/one/adapter_model.safetensors"
    data = adapter.read_bytes()
    entry = FileEntry(path=place, size=len(data), digest=Digest.of(data))
    tree = Tree(root=base, files=(entry, *tree_of(base).files), places={place: adapter})
    split = reshard(tree, LARGEST, plain, strict=False)
    assert split.tree.path(place) == adapter
    assert split.tree.files[0] == entry
    assert index_of(split).keys() == tensors(1).keys()
    with pytest.raises(UsageError, match=place):
        reshard(tree, LARGEST, plain)


@pytest.mark.parametrize("indexed", [False, True])
def test_a_file_that_is_not_the_models_stays_whole(tmp_path, indexed):
    """One that the index does not name, or that lies beside the only one of the model."""
    name = "model-00001-of-00001.safetensors" if indexed else "model.safetensors"
    save_file(tensors(1), tmp_path / name)
    save_file(tensors(2), tmp_path / "a.safetensors")
    if indexed:
        weights = {f"1.{n}": name for n in range(8)}
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weights}))
    tree = tree_of(tmp_path)
    split = reshard(tree, LARGEST, plain, strict=False)
    assert tree.files[0] in split.tree.files
    assert len(split.contents) == 4
    assert index_of(split).keys() == tensors(1).keys()


def test_a_changed_file_changes_its_own_layers_only(tmp_path):
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = {f"{n}.{i}": name for n, name in enumerate(names, 1) for i in range(8)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    found = []
    for seed in (2, 3):
        save_file(tensors(1), tmp_path / names[0])
        changed = {key.replace("3.", "2."): value for key, value in tensors(seed).items()}
        save_file(changed, tmp_path / names[1])
        split = reshard(tree_of(tmp_path), LARGEST, plain, strict=False)
        found.append({file.path: file.digest for file in split.tree.files})
    same = {path for path in found[0] if found[0][path] == found[1][path]}
    assert same == {path for path in found[0] if path.startswith("model-00001")} | {INDEX}


def test_a_weight_map_of_something_else(tmp_path):
    save_file(tensors(1), tmp_path / "model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"1.0": ["model.safetensors"]}}))
    with pytest.raises(InputRefused, match="weight_map"):
        reshard(tree_of(tmp_path), LARGEST, plain)


@pytest.mark.parametrize("how", ["is cut off", "is written to", "is gone", "is a pipe"])
def test_a_file_that_changes(tmp_path, how):
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
