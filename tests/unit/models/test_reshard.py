"""Split files hold the same tensors: the safetensors package reads them back."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.values import Digest, FileEntry, Tree
from weightsmith.models.reshard import (
    INDEX,
    Resharded,
    cut,
    read_pieces,
    repeated_bytes,
    reshard,
    size_of,
)
from weightsmith.oci.image import ImageConfig, assemble
from weightsmith.oci.unpack import unpack
from weightsmith.oci.weights import fastest_layer, weight_layers

LARGEST = 400_000
SINGLE = "model.safetensors"
Tensors: TypeAlias = dict[str, np.ndarray]
Files: TypeAlias = dict[str, Digest]


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


def at_most(size: int) -> Callable[[int], int]:
    return lambda _: size


def test_the_same_tensors_in_other_files(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    save_file(tensors(1), model / "model.safetensors", {"format": "pt"})
    (model / "config.json").write_text("{}")
    split = reshard(tree_of(model), at_most(LARGEST), plain)
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
        assert set(split.tensors[path.name]) == part.keys()
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
    split = reshard(tree_of(tmp_path), at_most(largest), plain)
    layers = weight_layers(split.tree, largest=largest, contents=split.contents, epoch=0)
    assert len(layers) > 1
    assert max(layer.size for layer in layers) <= largest
    unpack(assemble(layers, config=ImageConfig(), epoch=0), tmp_path / "root")
    parts = (load_file(p) for p in (tmp_path / "root" / "models").glob("*.safetensors"))
    found = {name: value for part in parts for name, value in part.items()}
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


WIDTH, LAYERS = 128, 12
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")


def decoder(changed: tuple[str, ...] = (), layers: Iterable[int] = range(LAYERS)) -> Tensors:
    """A model of which an adapter changed some kinds of matrices in some layers."""
    source = np.random.default_rng(0)
    found = {"model.embed_tokens.weight": source.random((512, WIDTH), np.float32)}
    for layer in range(LAYERS):
        for kind in KINDS:
            name = f"model.layers.{layer}.{kind}"
            value = source.random((WIDTH, WIDTH), np.float32)
            found[f"{name}.weight"] = value + (kind in changed and layer in layers)
            found[f"{name}.bias"] = source.random(WIDTH, np.float32)
        norm = source.random(WIDTH, np.float32)
        found[f"model.layers.{layer}.input_layernorm.weight"] = norm
    return found


def files_of(
    folder: Path,
    model: Tensors,
    *,
    shards: int = 1,
    largest: Callable[[int], int] = lambda _: 10**6,
) -> Files:
    """The digests of a model's files in an image, from a checkpoint of some shards."""
    folder.mkdir()
    names = sorted(model)
    parts = [names[first::shards] for first in range(shards)]
    places = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{shards:05}.safetensors" if shards > 1 else SINGLE
        save_file({name: model[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    if shards > 1:
        total = sum(value.nbytes for value in model.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index))
    split = reshard(tree_of(folder), largest, plain, strict=False)
    return {file.path: file.digest for file in split.tree.files}


@pytest.mark.parametrize(
    ("changed", "own"),
    [
        ((), 0),
        (("self_attn.q_proj",), 1),
        (("self_attn.q_proj", "self_attn.k_proj"), 2),
        (("mlp.down_proj",), 1),
        (KINDS, 4),
    ],
)
def test_what_an_adapter_leaves_is_in_files_that_stay(tmp_path, changed, own):
    base = files_of(tmp_path / "base", decoder())
    tuned = files_of(tmp_path / "tuned", decoder(changed))
    assert base.keys() == tuned.keys()
    differ = {name for name in base if base[name] != tuned[name]}
    assert differ == {f"model-layers.{kind}-001.safetensors" for kind in changed}
    assert len(differ) == own
    assert INDEX not in differ


def test_the_files_do_not_depend_on_the_checkpoints_own(tmp_path):
    one, three = (files_of(tmp_path / f"{n}", decoder(), shards=n) for n in (1, 3))
    assert one == three


@pytest.mark.parametrize("spoiled", ["", "header", "end"])
def test_what_is_cut_already_is_not_hashed_again(tmp_path, spoiled):
    (first := tmp_path / "first").mkdir()
    save_file(decoder(), first / SINGLE)
    split = reshard(tree_of(first), at_most(LARGEST), plain)
    (again := tmp_path / "again").mkdir()
    for name, pieces in split.contents.items():
        (again / name).write_bytes(b"".join(read_pieces(pieces)))
    file = max(again.glob("*.safetensors"))
    if spoiled == "header":
        save_file(load_file(file), file, {"other": "metadata"})
    elif spoiled == "end":
        save_file({**load_file(file), "zzz": np.zeros(4, np.float32)}, file)
        index = {**index_of(split), "zzz": file.name}
        (again / INDEX).write_text(json.dumps({"weight_map": index}))
    hashed: list[str] = []

    def memo(key: str, make: Callable[[], str]) -> str:
        hashed.append(key)
        return make()

    found = reshard(tree_of(again), at_most(LARGEST), memo)

    for name, pieces in found.contents.items():
        (entry,) = (one for one in found.tree.files if one.path == name)
        data = b"".join(read_pieces(pieces))
        assert (entry.size, entry.digest) == (len(data), Digest.of(data)), name
    assert len(hashed) == (2 if spoiled else 1)  # the index, and what is spoiled


def test_layers_that_stay_are_in_files_that_stay(tmp_path):
    """A kind that is larger than a file is cut between layers, in their order: 2 before 10."""
    limit = at_most(300_000)
    base = files_of(tmp_path / "base", decoder(), largest=limit)
    tuned = files_of(tmp_path / "tuned", decoder(KINDS[:1], range(9, 12)), largest=limit)
    differ = {name for name in base if base[name] != tuned[name]}
    assert differ == {"model-layers.self_attn.q_proj-003.safetensors"}


def test_what_an_adapter_adds_moves_no_other_file(tmp_path):
    """A head that was tied, or a table for more tokens."""
    model = decoder()

    def eighth(size: int) -> int:
        return size // 8

    base = files_of(tmp_path / "base", model, largest=eighth)
    head = {"lm_head.weight": np.zeros((2048, WIDTH), np.float32)}
    untied = files_of(tmp_path / "untied", model | head, largest=eighth)
    assert untied.keys() - base.keys() == {"model-lm_head-001.safetensors"}
    assert {name for name in base if base[name] != untied[name]} == {INDEX}


def test_a_matrix_and_what_it_is_packed_with_are_together(tmp_path):
    """Wide types come first, so that all tensors are aligned."""
    types = {"weight_packed": np.uint8, "weight_scale": np.float32}
    shape = 256, 256
    model = {
        f"layers.{n}.q_proj.{part}": np.zeros(shape, kind)
        for n in range(4)
        for part, kind in types.items()
    }
    save_file(model, tmp_path / SINGLE)
    split = reshard(tree_of(tmp_path), at_most(10**7), plain)
    (names,) = split.tensors.values()
    order = ("weight_scale", "weight_packed")
    assert names == tuple(f"layers.{n}.q_proj.{part}" for part in order for n in range(4))


@pytest.mark.parametrize("kind", ["adapter.proj", "a/b", "training_head", "rest", "é", "a" * 200])
def test_names_that_loaders_take_for_something_else(tmp_path, kind):
    """TGI leaves out files whose name has `adapter`; a name is also a path in an image."""
    model = {f"layers.{n}.{kind}.weight": np.full((256, 256), n, np.float32) for n in range(4)}
    model |= {"rest.weight": np.ones((256, 256), np.float32)}
    save_file(model, tmp_path / SINGLE)
    split = reshard(tree_of(tmp_path), at_most(10**7), plain)
    assert len(split.tensors) == 2
    for name in split.tensors:
        assert re.fullmatch(r"model-[0-9a-f]{16}-001\.safetensors|model-layers\.rest-.*", name)


def test_a_checkpoint_of_many_kinds_has_few_files(tmp_path):
    model = {f"layers.{n}.kind{k}.weight": np.full((64, 128), k, np.float32)
        for n in range(3) for k in range(50)}  # fmt: skip
    save_file(model, tmp_path / SINGLE)
    split = reshard(tree_of(tmp_path), at_most(10**7), plain)
    assert len(split.tensors) == 21
    assert sum(len(names) for names in split.tensors.values()) == len(model)


@pytest.mark.slow
def test_transformers_reads_the_same_model(tmp_path):
    config = transformers.Qwen2Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=512, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model", max_shard_size="1MB")
    split = reshard(tree_of(tmp_path / "model"), at_most(300_000), plain, strict=False)
    assert len(split.contents) > 12
    layers = weight_layers(split.tree, contents=split.contents, epoch=0)
    unpack(assemble(layers, config=ImageConfig(), epoch=0), tmp_path / "root")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "root" / "models")
    wanted, found = model.state_dict(), read.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


class Planned(NamedTuple):
    name: str
    dtype: str
    size: int


def test_a_model_of_8_billion_weights_has_few_files():
    """Llama 3.1 8B: as many layers as before, and shares that the pages state."""
    hidden, inner, keys, vocabulary = 4096, 14336, 1024, 128256
    shapes = {
        "self_attn.q_proj": hidden * hidden,
        "self_attn.k_proj": hidden * keys,
        "self_attn.v_proj": hidden * keys,
        "self_attn.o_proj": hidden * hidden,
        "mlp.gate_proj": hidden * inner,
        "mlp.up_proj": hidden * inner,
        "mlp.down_proj": hidden * inner,
        "input_layernorm": hidden,
        "post_attention_layernorm": hidden,
    }
    tensors = [
        Planned(f"model.layers.{layer}.{kind}.weight", "BF16", 2 * count)
        for layer in range(32)
        for kind, count in shapes.items()
    ]
    table = 2 * hidden * vocabulary
    tensors += [
        Planned("model.embed_tokens.weight", "BF16", table),
        Planned("lm_head.weight", "BF16", table),
        Planned("model.norm.weight", "BF16", 2 * hidden),
    ]
    files = cut(tensors, fastest_layer(repeated_bytes(tensors)))
    assert len(files) == 35
    sizes = {name: sum(one.size for one in some) for name, some in files.items()}
    assert max(size for name, size in sizes.items() if "layers" in name) < 500e6
    total = sum(sizes.values())
    for kinds, share in (("qv", 0.083), ("qkvo", 0.167)):
        some = [size for name, size in sizes.items() for k in kinds if f".{k}_proj" in name]
        assert sum(some) / total == pytest.approx(share, abs=0.001)


def test_small_checkpoints_stay_as_they_are(tmp_path):
    save_file(tensors(1), tmp_path / SINGLE)
    tree = tree_of(tmp_path)
    assert reshard(tree, at_most(10**7), plain).tree is tree
    assert reshard(tree, at_most(10**7), plain, strict=False).tree is tree


def test_what_cannot_be_split(tmp_path):
    save_file({"a": np.zeros(200_000, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="tensor a alone"):
        reshard(tree_of(tmp_path), at_most(LARGEST), plain)
    (tmp_path / "model.safetensors").unlink()
    for name, hint in (("model.gguf", "--split-max-size"), ("tokenizer.json", "--max-layer-size")):
        (tmp_path / name).write_bytes(bytes(500_000))
        with pytest.raises(UsageError, match=f"{name} is larger than the maximum") as caught:
            reshard(tree_of(tmp_path), at_most(LARGEST), plain)
        assert hint in caught.value.hint
        (tmp_path / name).unlink()


def test_what_cannot_be_split_may_stay_whole(tmp_path):
    save_file(tensors(1), tmp_path / "model.safetensors")
    (tmp_path / "model.gguf").write_bytes(bytes(500_000))
    split = reshard(tree_of(tmp_path), at_most(LARGEST), plain, strict=False)
    assert len(split.tensors) == 3
    assert split.tree.has("model.gguf")
    (tmp_path / "model.safetensors").write_bytes(b"no model")
    tree = tree_of(tmp_path)
    assert reshard(tree, at_most(LARGEST), plain, strict=False).tree is tree
    with pytest.raises(InputRefused, match="not a valid checkpoint file"):
        reshard(tree, at_most(LARGEST), plain)


def test_a_large_tensor_is_alone_in_its_file(tmp_path):
    wide = {"b": np.zeros(200_000, np.float32), "a": np.ones(9, np.float32)}
    save_file(wide | tensors(1, 3), tmp_path / "model.safetensors")
    split = reshard(tree_of(tmp_path), at_most(LARGEST), plain, strict=False)
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
    split = reshard(tree, at_most(LARGEST), plain, strict=False)
    assert split.tree.path(place) == adapter
    assert split.tree.files[0] == entry
    assert index_of(split).keys() == tensors(1).keys()
    with pytest.raises(UsageError, match=place):
        reshard(tree, at_most(LARGEST), plain)


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
    split = reshard(tree, at_most(LARGEST), plain, strict=False)
    assert tree.files[0] in split.tree.files
    assert len(split.contents) == 4
    assert index_of(split).keys() == tensors(1).keys()


def test_a_weight_map_of_something_else(tmp_path):
    save_file(tensors(1), tmp_path / "model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"1.0": ["model.safetensors"]}}))
    with pytest.raises(InputRefused, match="weight_map"):
        reshard(tree_of(tmp_path), at_most(LARGEST), plain)


@pytest.mark.parametrize("how", ["is cut off", "is written to", "is gone", "is a pipe"])
def test_a_file_that_changes(tmp_path, how):
    path = tmp_path / "model.safetensors"
    save_file(tensors(1), path)
    split = reshard(tree_of(tmp_path), at_most(LARGEST), plain)
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
