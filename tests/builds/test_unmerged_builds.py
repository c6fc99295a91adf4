"""Adapters served beside their base do in the image what they do in PEFT."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from weightsmith.drivers.local import LocalRunner
from weightsmith.job_inputs import Input
from weightsmith.jobs import ConvertAdapterJob
from weightsmith.ports import Silent
from weightsmith.quantizers.gguf_lora import FILE
from weightsmith.wiring import cache_folder

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny" / "recipe.yaml"
pytestmark = pytest.mark.builders


def build(recipe, folder, store):
    """Build the recipe's llamacpp-lora image into the folder; return what --json says of it."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "weightsmith.cli.program", "build", "--recipe", str(recipe)),
            *("--target", "llamacpp-lora", "--runner", "local", "--dist", str(folder / "dist")),
            *("--layout", str(folder / "image"), "--json"),
        ],
        env={**os.environ, "WEIGHTSMITH_STORE": str(store)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)["targets"]["llamacpp-lora"]


def test_an_image_with_the_adapter_beside_the_base_answers_as_the_adapter_does(
    tmp_path, shared_store
):
    built = build(TINY, tmp_path, shared_store)

    # The base knows none of it: only an adapter that was added answers.
    assert built["scores"]["base"] == 0.0
    assert built["scores"]["image"] == built["scores"]["adapter"] == 1.0
    record = json.loads(
        (tmp_path / "dist/tiny-capitals/1.0.0/llamacpp-lora/build.json").read_text()
    )
    assert {file["path"] for file in record["artifact"]["files"]} == {
        "tiny-capitals.gguf",
        "adapters/a-v1.gguf",
    }


def test_a_converted_adapter_does_not_depend_on_its_folders_name(tmp_path):
    made = []
    for name in ("a", "other"):
        adapter = shutil.copytree(TINY.parent / "adapters" / "a", tmp_path / name / name)
        output = tmp_path / name / "out"
        output.mkdir()
        job = ConvertAdapterJob(
            builder="gguf",
            base=Input(path=TINY.parent / "base"),
            adapter=Input(path=adapter),
            output=output,
            seconds=600,
        )
        LocalRunner(cache_folder()).run(job, Silent())
        assert [path.name for path in output.iterdir()] == [FILE]
        made.append((output / FILE).read_bytes())

    assert made[0] == made[1]


def test_each_of_several_adapters_answers_its_own_task(tmp_path, shared_store):
    build(TINY.with_name("recipe-two.yaml"), tmp_path, shared_store)
    record = json.loads((tmp_path / "dist/tiny-two/1.0.0/llamacpp-lora/build.json").read_text())

    # Merged they would disturb one another, so nothing is: each answers as it does alone.
    for told in (record, *record["more_tasks"]):
        scores = {name: score["score"] for name, score in told["scores"].items()}
        assert set(scores) == {"base", "adapter", "image"}
        assert scores["base"] < 0.2
        assert scores["image"] == scores["adapter"] == 1.0
    assert len(record["more_tasks"]) == 1
    assert "merge" not in record["inputs"]
