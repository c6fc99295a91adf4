"""Adapters served beside their base do in the image what they do in PEFT."""

import json
import re
import shutil
from pathlib import Path

import gguf
import pytest
import yaml
from weightsmith.building.wiring import cache_folder
from weightsmith.core.errors import InputRefused
from weightsmith.core.jobs import ConvertAdaptersJob, Input
from weightsmith.core.ports import Silent
from weightsmith.core.values import Digest
from weightsmith.oci.layout import read_layout
from weightsmith.oci.unpack import unpack
from weightsmith.outside.local import LocalRunner
from weightsmith.quantizers.gguf_lora import FILE

from tests.fakes.started import weightsmith
from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny" / "recipe.yaml"
pytestmark = pytest.mark.builders


def build(recipe, folder, store, *more, target="llamacpp-lora"):
    """Build the recipe's image for a target into the folder; return what --json says of it."""
    words = ("--recipe", recipe, "--target", target, "--runner", "local", *more)
    words += ("--dist", folder / "dist", "--layout", folder / "image")
    return weightsmith("build", *words, store=store)["targets"][target]


@pytest.mark.full  # tests/unit/serving/test_llamacpp.py holds the plan against what servers took
def test_a_server_with_many_adapters_starts_within_its_plan(tmp_path, shared_store):
    """The limit for one adapter is too low for twelve."""
    made = copies(tmp_path / "adapters", 16)
    recipe = yaml.safe_load(TINY.read_text()) | {
        "base": {"source": str(TINY.parent / "base")},
        "adapters": [{"source": str(path)} for path in made.values()],
    }
    del recipe["evaluate"], recipe["calibration"]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))

    build(path, tmp_path, shared_store)


def test_the_converter_reads_no_targets(tmp_path):
    """So it would add what PEFT leaves out, and such adapters are refused."""
    (path,) = copies(tmp_path, 1).values()
    file = path / "adapter_config.json"
    left_out = {"exclude_modules": ["v_proj"], "layers_to_transform": [0]}
    file.write_text(json.dumps(json.loads(file.read_text()) | left_out))

    assert converted(tmp_path / "out", {"a": path})["tensors"] == {"a": 56}


def converted(output, adapters):
    """Convert adapters by folder in one job; return its result."""
    output.mkdir(exist_ok=True)
    job = ConvertAdaptersJob(
        builder="gguf",
        base=Input(path=TINY.parent / "base"),
        adapters=tuple(Input(path=path) for path in adapters.values()),
        folders=tuple(adapters),
        output=output,
        seconds=600,
    )
    return LocalRunner(cache_folder()).run(job, Silent())


def copies(folder, count):
    """Write adapters that differ from each other, and from where they lie; return their folders."""
    made = {}
    for number in range(count):
        name = f"{number}" * (number + 1)
        path = shutil.copytree(TINY.parent / "adapters" / "ab"[number % 2], folder / name)
        file = path / "adapter_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"lora_alpha": 8 + number}))
        made[name] = path
    return made


def test_adapters_that_are_converted_together_have_the_bytes_of_each_alone(tmp_path):
    """Nor do the bytes depend on the names of folders."""
    adapters = copies(tmp_path, 4)

    found = converted(tmp_path / "together", adapters)

    assert found["tensors"].keys() == adapters.keys()
    written = {name: (tmp_path / "together" / name / FILE).read_bytes() for name in adapters}
    files = sorted(path.relative_to(tmp_path / "together").as_posix()
                   for path in (tmp_path / "together").rglob("*") if path.is_file())  # fmt: skip
    assert files == sorted(f"{name}/{FILE}" for name in adapters)
    assert len(set(written.values())) == len(adapters)
    for name, path in list(adapters.items())[1:2]:
        moved = shutil.copytree(path, tmp_path / "elsewhere" / f"other{name}")
        converted(tmp_path / f"alone{name}", {"made": moved})
        assert (tmp_path / f"alone{name}" / "made" / FILE).read_bytes() == written[name]


@pytest.mark.full  # tests/unit/worker/test_convert_adapters.py names it too
def test_a_refused_adapter_is_named_and_those_before_it_are_kept(tmp_path):
    adapters = copies(tmp_path, 3)
    bad = list(adapters.values())[1] / "adapter_model.safetensors"
    data = bad.read_bytes()
    bad.write_bytes(data.replace(b"q_proj.lora_A", b"q_proj.lora_X"))

    with pytest.raises(InputRefused, match=re.escape(str(bad.parent))):
        converted(tmp_path / "out", adapters)

    bad.write_bytes(data)
    first = tmp_path / "out" / "0" / FILE
    before = first.stat()
    assert converted(tmp_path / "out", adapters)["tensors"].keys() == adapters.keys()
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not list((tmp_path / "out").rglob("*.part"))


@pytest.mark.full  # test_unmerged_in_memory.py judges each
def test_each_of_several_adapters_answers_its_own_task_on_a_quantized_base(tmp_path, shared_store):
    target = "llamacpp-q4_k_m-lora"
    recipe = TINY.with_name("recipe-two.yaml")
    build(recipe, tmp_path, shared_store, "--kind", "adapter", target=target)
    record = json.loads((tmp_path / f"dist/tiny-two/1.0.0/{target}/build.json").read_text())

    # Merged they would disturb one another, so nothing is: each answers as it does alone.
    for told in record["suites"]:
        scores = {name: score["score"] for name, score in told["scores"].items()}
        assert set(scores) == {"base", "adapter", "image"}
        assert scores["base"] < 0.2
        assert scores["image"] == scores["adapter"] == 1.0
    assert len(record["suites"]) == 2
    assert "merge" not in record["inputs"]
    assert record["inputs"]["quantize"]["checkpoint"] == record["base"]["digest"]
    assert record["artifact"]["bits_per_weight"] < 5
    assert record["quality"]["texts"]
    types = {str(tensor.tensor_type.name) for tensor in gguf.GGUFReader(file_of(tmp_path)).tensors}
    assert "Q4_K" in types

    for name in ("a", "b"):  # each by itself, with what it was tested on
        source = f"oci:{tmp_path}/image-adapter-{name}-v1"
        told = weightsmith("verify", source, store=shared_store)
        found = {row["check"]: row["found"] for row in told["checks"]}
        assert found["base"] == "the adapter was tested on it, quantized to q4_k_m"
        assert "image: 1.0000 contains, n=20" in found["gate"]
        pulled = {layer.file: layer.digest for layer in read_layout(Path(source[4:])).layers}
        for file in (TINY.parent / "adapters" / name).iterdir():
            assert pulled[file.name] == Digest.of(file.read_bytes())


def file_of(folder):
    """Return the base's file of the image in a folder, unpacked."""
    unpack(read_layout(folder / "image"), folder / "root")
    return folder / "root" / "models" / "base.gguf"
