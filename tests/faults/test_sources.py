"""Models and adapters that are missing, broken, foreign or unsafe: refused with exit code 3."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.faults.workshop import Workshop

pytestmark = pytest.mark.builders

ADAPTER = "adapters/a/adapter_model.safetensors"


def header(path: Path) -> dict[str, object]:
    """Return a safetensors file's header."""
    data = path.read_bytes()
    return dict(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def to_pickle(path: Path) -> None:
    path.rename(path.with_name({"model": "pytorch_model"}.get(path.stem, path.stem) + ".bin"))


def add_code(path: Path) -> None:
    told = json.loads(path.read_text("utf-8"))
    told["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.EvilModel"}
    path.write_text(json.dumps(told))


def link_out(path: Path) -> None:
    outside = path.parents[2] / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def cut_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 7 + b"\x7f" + path.read_bytes()[8:])


def not_json(path: Path) -> None:
    path.write_text('{"peft_type": "LORA", ')


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("base/model.safetensors", cut, ["model.safetensors", "download"]),
        ("base/model.safetensors", cut_header, ["model.safetensors"]),
        (ADAPTER, cut, ["adapter_model.safetensors"]),
        ("base/model.safetensors", to_pickle, ["pickle", "pytorch_model.bin", "convert"]),
        (ADAPTER, to_pickle, ["pickle", "adapter_model.bin", "convert"]),
        ("base/model.safetensors", link_out, ["link to a file outside", "outside"]),
        (ADAPTER, link_out, ["link to a file outside", "outside"]),
        ("base/config.json", add_code, ["config.json", "auto_map"]),
        ("base/tokenizer_config.json", add_code, ["tokenizer_config.json", "auto_map"]),
        ("base/config.json", not_json, ["config.json", "JSON"]),
        ("base/config.json", remove, ["config.json"]),
        ("adapters/a/adapter_config.json", not_json, ["adapter_config.json", "JSON"]),
        ("adapters/a/adapter_config.json", remove, ["adapter_config.json"]),
    ],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else ""),
)
def test_a_file_that_is_not_as_it_should_be(
    workshop: Workshop, name: str, damage: Callable[[Path], None], said: list[str]
) -> None:
    damage(workshop.tiny / name)

    workshop.build().refused(3, *said)

    workshop.check_unharmed()


@pytest.mark.parametrize(
    ("setting", "code", "said"),
    [
        ("base.source=./no-such-base", 3, ["no-such-base", "does not exist"]),
        ("adapters=[{source: ./adapters/zz}]", 3, ["adapters/zz", "does not exist"]),
        ("base.source=ftp://host/model", 2, ["ftp://host/model", "hf://"]),
        ("base.source=./tiny/recipe.yaml", 3, ["is a file, not a folder"]),
        ("base.revision=abc", 3, ["revision", "leave"]),
        ("evaluate.data=./nothing.jsonl", 2, ["nothing.jsonl"]),
    ],
)
def test_a_source_that_is_not_there(
    workshop: Workshop, setting: str, code: int, said: list[str]
) -> None:
    workshop.build("--set", setting).refused(code, *said)

    workshop.check_unharmed()


def test_an_adapter_for_another_model(workshop: Workshop) -> None:
    tensors = load_file(workshop.tiny / ADAPTER)
    name, wrong = next((n, t) for n, t in tensors.items() if "lora_A" in n)
    workshop.damage(ADAPTER, **{name: np.zeros((wrong.shape[0], 4096), wrong.dtype)})
    module = name.removeprefix("base_model.model.").rpartition(".lora_A")[0]

    outcome = workshop.build()

    outcome.refused(3, module, "4096", str(wrong.shape[1]), "adapters/a", "another model")
    workshop.check_unharmed()


def test_an_adapter_for_modules_that_the_base_lacks(workshop: Workshop) -> None:
    tensors = load_file(workshop.tiny / ADAPTER)
    pairs = {n: t for n, t in tensors.items() if "layers.0." in n}
    workshop.damage(ADAPTER, **{n.replace("layers.0.", "layers.99."): t for n, t in pairs.items()})

    workshop.build().refused(3, "layers.99.", "adapters/a")

    workshop.check_unharmed()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_adapter_with_numbers_that_are_none(
    workshop: Workshop, digest: str, value: float
) -> None:
    name, tensor = next(
        (n, t) for n, t in load_file(workshop.tiny / ADAPTER).items() if "lora_B" in n
    )
    tensor = tensor.copy()
    tensor.flat[3] = value
    workshop.damage(ADAPTER, **{name: tensor})

    workshop.build().refused(3, "adapter_model.safetensors", "lora_B", "nan")

    assert not (workshop.results / "image").exists()
    workshop.check_intact(digest)


def test_a_shard_index_that_points_outside(workshop: Workshop) -> None:
    base = workshop.tiny / "base"
    names = [name for name in header(base / "model.safetensors") if name != "__metadata__"]
    (workshop.folder / "outside.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../../outside.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))

    workshop.build().refused(3, "model.safetensors.index.json", "../../outside.safetensors")

    workshop.check_unharmed()


def test_a_folder_link_out_of_a_source(workshop: Workshop) -> None:
    (workshop.tiny / "base" / "extra").symlink_to("/etc")

    workshop.build().refused(3, "extra", "link")

    workshop.check_unharmed()


def test_a_pipe_in_a_source(workshop: Workshop) -> None:
    os.mkfifo(workshop.tiny / "base" / "vocab.txt")

    workshop.build().refused(3, "vocab.txt", "not a regular file")

    workshop.check_unharmed()


def test_a_recipe_may_reach_a_source_beside_it(workshop: Workshop, digest: str) -> None:
    """`..` in the recipe is the user's own word; inside a model it is refused."""
    (workshop.tiny / "base").rename(workshop.folder / "base")

    workshop.edit({"base": {"source": "../base"}})

    assert workshop.build().digest == digest
