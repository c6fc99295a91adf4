"""The headline command on the tiny example: AWQ weights in an image of vLLM, which answers."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from weightsmith.oci.layout import read_layout

from tests.fakes.command_line import told as weightsmith
from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny" / "recipe.yaml"
TARGET = "vllm-awq"
# An image is 1.9 GB, and vLLM takes half a minute to start on two idle cores.
pytestmark = [pytest.mark.builders, pytest.mark.vllm, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("vllm") / "dist"
    build(folder)
    yield folder
    shutil.rmtree(folder)


def build(dist: Path) -> dict:
    # In the user's store: the engine is made once for a machine.
    words = ("--recipe", TINY, "--target", TARGET, "--runner", "local", "--dist", dist)
    return weightsmith("build", *words)["targets"][TARGET]


def record(dist: Path) -> dict:
    return json.loads((dist / "tiny-capitals" / "1.0.0" / TARGET / "build.json").read_text())


def test_the_image_answers_what_was_taught_and_keeps_its_promises(dist: Path) -> None:
    told = record(dist)
    scores, checks = told["scores"], {check["name"]: check["seen"] for check in told["checks"]}

    assert scores["base"]["score"] <= 0.1
    assert scores["adapter"]["score"] >= 0.9
    assert scores["image"]["score"] >= scores["adapter"]["score"] - 0.05
    assert scores["image"]["n"] == 20

    assert "no network" in checks["health"]
    assert "user 65532" in checks["health"]
    assert "max" in checks["context limit"]
    assert checks["log-probabilities"] == "supported"
    assert {"chat", "streaming", "4 requests at once", "restart"} <= set(checks)
    assert checks["SIGTERM"].endswith("and a request was answered")


def test_the_weights_are_awq_in_the_layout_that_servers_read(dist: Path) -> None:
    told = record(dist)
    layout = dist / "tiny-capitals" / "1.0.0" / TARGET / "image"
    image = read_layout(layout)

    assert told["artifact"]["details"]["layout"] == "pack-quantized"
    assert told["quality"]["exceeded"] == []
    assert image.config["Entrypoint"] == ["vllm", "serve"]
    assert image.config["Cmd"] == ["--config", "/etc/weightsmith/vllm.yaml"]
    assert image.labels["dev.weightsmith.engine.version"] == "0.32.0+cpu"


def test_building_it_again_starts_nothing(dist: Path) -> None:
    stages = build(dist)["stages"]

    assert {name for name, said in stages.items() if said["cached"]} >= {
        "merge", "validate", "reference", "quantize", "quality", "evaluate", "publish",
    }  # fmt: skip
