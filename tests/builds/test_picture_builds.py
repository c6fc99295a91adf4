"""A build whose questions have pictures: transformers and llama.cpp's server see the same."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from weightsmith.oci.layout import read_layout
from weightsmith.oci.unpack import unpack

from tests.builds.test_gguf_projector import make_adapter
from tests.fakes.drawn import SHAPES, draw
from tests.fakes.memory import write_rows
from tests.fakes.painter import COLOURS, SIZE, make_blank
from tests.fakes.pictured import make_pictured
from tests.fakes.replays import replay_set
from tests.fakes.seeing import mute_tokens
from tests.fakes.started import free_port, started, weightsmith

TARGET = "llamacpp-f16"


@pytest.mark.full  # test_pictures_in_memory.py
@pytest.mark.builders
@pytest.mark.slow
def test_base_adapter_merged_and_the_started_image_say_the_same_of_pictures(tmp_path: Path) -> None:
    """Of random weights in 16 bits, which say something else of each picture."""
    base = make_blank(tmp_path / "base")
    make_sure(base)
    record = built(tmp_path, base)
    said = [{who: item[who] for who in ("base", "adapter", "merged", "image")}
            for item in record["items"]]  # fmt: skip
    assert len({one["adapter"] for one in said[:4]}) > 1
    assert any(one["base"] != one["adapter"] for one in said)
    same = record["sameness"]
    assert same["merged"]["share"] >= 0.8  # the nearest ties of random weights may turn
    assert same["image"]["share"] >= 0.8
    assert not [text for text in record["warnings"] if "tokens" in text]
    assert record["image"]["takes_pictures"]

    asked = replay_set(tmp_path / "image")["questions"]
    assert sum("image_url" in json.dumps(one["request"]) for one in asked) > 1
    unpack(read_layout(tmp_path / "image"), tmp_path / "root")
    assert probed(tmp_path / "root", tmp_path) == 0
    (projector,) = (tmp_path / "root" / "models").glob("*mmproj*")
    data = bytearray(projector.read_bytes())
    for tensor in GGUFReader(projector).tensors:
        if tensor.name.startswith("mm."):
            end = int(tensor.data_offset + tensor.n_bytes)
            data[int(tensor.data_offset) : end] = bytes(int(tensor.n_bytes))
    projector.write_bytes(data)
    assert probed(tmp_path / "root", tmp_path) == 1


def make_sure(base: Path) -> None:
    """Let it be sure of its answers, which are as random as before."""
    path = base / "model.safetensors"
    tensors = load_file(path)
    (norm,) = (
        n
        for n in tensors
        if n.endswith("norm.weight") and not {"layers", "visual"} & {*n.split(".")}
    )
    tensors[norm] *= 30
    save_file(tensors, path, metadata={"format": "pt"})


def probed(root: Path, folder: Path) -> int:
    """Start the server of an unpacked image; return the exit code of the image's own probe."""
    (model,) = (one for one in (root / "models").glob("*.gguf") if "mmproj" not in one.name)
    (projector,) = (root / "models").glob("*mmproj*")
    port = free_port()
    words = [root / "app" / "llama-server", "--model", model, "--mmproj", projector]
    words += ["--alias", "eyes", "--port", port, "--jinja", "-np", 1, "-c", 256, "-t", 1]
    probe = [root / "opt" / "weightsmith" / "healthcheck", "--port", port, "--seconds", 300]
    probe += ["--replay", "--set", root / "etc" / "weightsmith" / "replay.json"]
    probe += ["--result", folder / f"{port}.json"]
    with started([*map(str, words)], dict(os.environ), port, folder / "log"):
        done = subprocess.run([*map(str, probe)], capture_output=True, text=True, check=False)
    print(done.stderr)  # noqa: T201 - which question parted, if one should not
    return done.returncode


@pytest.mark.builders
@pytest.mark.full
def test_gemma_3_is_asked_with_the_line_breaks_of_its_processor(tmp_path: Path) -> None:
    """As many tokens in llama.cpp's server as in transformers."""
    base = make_pictured(tmp_path / "base", "Gemma3ForConditionalGeneration", num_hidden_layers=3)
    mute_tokens(base)
    record = built(tmp_path, base)
    assert record["sameness"]["merged"]["share"] >= 0.8
    assert not [text for text in record["warnings"] if "asked otherwise" in text]
    assert record["image"]["takes_pictures"]


def built(tmp_path: Path, base: Path) -> dict[str, Any]:
    make_adapter(base, tmp_path / "adapter")
    rows = []
    for number, (shape, colour) in enumerate(zip(SHAPES, COLOURS.values(), strict=True)):
        path = draw(tmp_path / "drawn" / f"{number}.png", shape, colour, (SIZE, SIZE))
        rows.append({"prompt": "Which?", "image": f"drawn/{path.name}", "expected": "x"})
    rows.append({"prompt": "Without any?", "expected": "x"})
    write_rows(tmp_path / "eval.jsonl", rows)
    recipe = {
        "name": "eyes", "version": "1.0.0", "base": {"source": "./base"},
        "adapters": [{"source": "./adapter"}], "targets": [TARGET],
        "evaluate": {"data": "eval.jsonl", "max_drop": 1.0, "max_tokens": 3},
        "serve": {"max_model_len": 256, "max_num_seqs": 2, "memory": "2GB"},
        "image": {"repository": "localhost/eyes"},
        "quality": {"gate": False}, "validate": {"enabled": False},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    weightsmith("build", "--recipe", tmp_path / "recipe.yaml", "--runner", "local",
                "--dist", tmp_path / "dist", "--layout", tmp_path / "image",
                store=tmp_path / "store")  # fmt: skip

    return dict(json.loads((tmp_path / f"dist/eyes/1.0.0/{TARGET}/build.json").read_text()))
