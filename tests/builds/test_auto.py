"""The target `auto` through the command line, with llama.cpp: what is chosen, and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TinyBuild
from tests.fakes.command_line import told as weightsmith
from tests.fakes.real_registries import real_registry
from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny" / "recipe.yaml"
AUTO = ("--recipe", TINY, "--target", "auto", "--set", "auto.engine=llamacpp", "--runner", "local")
pytestmark = pytest.mark.builders


@pytest.mark.full  # test_auto_in_memory.py chooses one, the next test asks a real one
@pytest.mark.slow
def test_an_image_is_chosen_and_proven(
    tiny_build: TinyBuild, shared_store: Path, tmp_path: Path
) -> None:
    """With the merge and the answers of the other tests; 20 questions can test one candidate."""
    told: Any = weightsmith("build", *AUTO, "--dist", tmp_path, store=shared_store)
    built = told["targets"]["auto"]
    record = json.loads((Path(built["report"]).parent / "build.json").read_text())
    (chosen,) = (row for row in record["auto"]["candidates"] if not row["left"])

    assert built["verdict"] == "passed"
    assert built["target"] == record["target"] == chosen["target"]
    assert record["auto"]["tests"] == 1
    assert chosen["size"] == record["artifact"]["size"]
    assert chosen["price"] == pytest.approx(chosen["size"], rel=0.35)
    (suite,) = chosen["sequence"]
    assert (suite["asked"], suite["lost"]) == (20, 0)
    assert suite["proven_at"] > 10
    # Of the merged model, eight probes and four others were asked.
    assert record["scores"]["merged"]["carried"] == 8
    assert record["stages"]["merge"]["cached"]
    assert record["stages"]["reference"]["cached"]


@pytest.mark.full
@pytest.mark.registry
def test_the_fastest_is_measured_and_published(
    tiny_build: TinyBuild, shared_store: Path, tmp_path: Path
) -> None:
    with real_registry(tmp_path) as host:
        told: Any = weightsmith(
            "build", *AUTO, "--set", "auto.prefer=speed", "--dist", tmp_path / "dist",
            "--set", f"image.repository={host}/team/tiny", "--push", store=shared_store,
        )  # fmt: skip
        built = told["targets"]["auto"]
        weightsmith("inspect", f"{host}/team/tiny@{built['digest']}")  # it is there
    record = json.loads((Path(built["report"]).parent / "build.json").read_text())
    rows = record["auto"]["candidates"]
    (chosen,) = (row for row in rows if not row["left"])

    assert (built["verdict"], record["auto"]["prefer"]) == ("passed", "speed")
    assert record["image"]["digest"] == built["digest"]
    # What was measured and is slower, or may at most be slower, gave way.
    assert chosen["speed"] > 0
    for row in rows:
        untried = row["left"] == "not tried: a faster one is proven"
        assert not untried or chosen["speed"] >= row.get("speed", row["foreseen_speed"])


@pytest.mark.real  # of two engines: test_auto_in_memory.py shows the rest
@pytest.mark.vllm
@pytest.mark.timeout(3600)
def test_one_choice_of_two_engines(tmp_path: Path) -> None:
    """llama.cpp's files fail the gate, whose limits are set so; vLLM's image is asked and chosen.

    In the user's store: vLLM's engine is made once for a machine.
    """
    smaller = ("mix", "iq4_nl", "q4_k_m", "q4_k_s", "q4_0", "q4_1")
    limits = {name: {"kl_mean": 0} for name in smaller}
    told: Any = weightsmith(
        "build", "--recipe", TINY, "--target", "auto", "--runner", "local", "--dist", tmp_path,
        "--set", "auto={engine: [llamacpp, vllm], prefer: speed, at_most: 2700KB}",
        "--set", "evaluate.max_drop=0.3", "--set", f"quality.limits={json.dumps(limits)}",
    )  # fmt: skip
    built = told["targets"]["auto"]
    record = json.loads((Path(built["report"]).parent / "build.json").read_text())
    rows = [row for row in record["auto"]["candidates"] if row["seconds"]]
    shutil.rmtree(tmp_path)  # the image is 1.9 GB

    assert (built["verdict"], built["target"]) == ("passed", "vllm-awq")
    assert record["auto"]["engines"] == ["llamacpp", "vllm"]
    left = {row["target"]: row["stage"] for row in rows if row["left"]}
    assert {target.partition("-")[0] for target in left} == {"llamacpp"}
    assert set(left.values()) == {"quality"}
    (chosen,) = (row for row in rows if not row["left"])
    assert (chosen["target"], chosen["sequence"][0]["asked"]) == ("vllm-awq", 20)
    assert chosen["speed"] > 0


def test_twelve_questions_prove_nothing(tmp_path: Path) -> None:
    for command in ("plan", "build"):
        said: Any = weightsmith(
            command, *AUTO, "--set", "evaluate.limit=12", "--dist", tmp_path, code=3
        )
        assert "nothing can be proven: 12 questions" in said["error"]["message"]
        assert "even if no answer changes, 19 are needed" in said["error"]["message"]
    assert not any(tmp_path.iterdir())
