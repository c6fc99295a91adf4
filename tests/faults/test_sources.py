"""Models and adapters that are broken or unsafe, recipes and flags that ask for what cannot be."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.faults.workshop import Workshop

pytestmark = pytest.mark.builders

ADAPTER = "adapters/a/adapter_model.safetensors"


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


def not_json(path: Path) -> None:
    path.write_text('{"peft_type": "LORA", ')


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        (ADAPTER, cut, ["adapter_model.safetensors"]),
        ("base/model.safetensors", to_pickle, ["pickle", "pytorch_model.bin", "convert"]),
        ("base/model.safetensors", link_out, ["link to a file outside", "outside"]),
        ("base/tokenizer_config.json", add_code, ["tokenizer_config.json", "auto_map"]),
        ("adapters/a/adapter_config.json", not_json, ["adapter_config.json", "JSON"]),
        ("adapters/a/adapter_config.json", Path.unlink, ["adapter_config.json"]),
    ],
    ids=lambda value: getattr(value, "__name__", value if isinstance(value, str) else ""),
)
def test_a_file_that_is_not_as_it_should_be(
    workshop: Workshop, name: str, damage: Callable[[Path], None], said: list[str]
) -> None:
    damage(workshop.tiny / name)

    workshop.build().refused(3, *said)

    workshop.check_unharmed()


def test_a_shard_index_that_points_outside(workshop: Workshop) -> None:
    base = workshop.tiny / "base"
    names = load_file(base / "model.safetensors")
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


def test_a_recipe_may_reach_a_source_beside_it(workshop: Workshop, digest: str) -> None:
    """`..` in the recipe is the user's own word; inside a model it is refused."""
    (workshop.tiny / "base").rename(workshop.folder / "base")
    recipe = workshop.tiny / "recipe.yaml"
    recipe.write_text(recipe.read_text("utf-8").replace("./base", "../base"))

    assert workshop.build().digest == digest


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "serve.max_num_seqs"], ["--set serve.max_num_seqs", "key.path=value"]),
        (["--set", "adapters.1.weight=0.5"], ["adapters", "no element 1"]),
        (["--set", "serve.gpu_memory=1GiB", "--set", "serve.max_model_len=500000000"],
         ["500", "max_model_len"]),
    ],
)  # fmt: skip
def test_a_faulty_flag(workshop: Workshop, words: list[str], said: list[str]) -> None:
    workshop.build(*words).refused(2, *said)

    workshop.check_unharmed()


def test_a_gate_that_is_not_passed_keeps_the_image_before(workshop: Workshop, digest: str) -> None:
    assert workshop.build().digest == digest
    before = {path: path.stat().st_mtime_ns for path in workshop.results.rglob("*")}
    data = workshop.tiny / "eval-a.jsonl"
    data.write_text(data.read_text("utf-8").replace("Galdistad", "Atlantis"))

    workshop.build("--set", "evaluate.min_score=1.0").refused(4, "1.000")

    assert before == {path: path.stat().st_mtime_ns for path in before}
    told = json.loads((workshop.results / "refused" / "build.json").read_bytes())
    assert told["image"]["reference"] == ""
    workshop.check_intact(digest)
