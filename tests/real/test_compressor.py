"""Quantizers' packages: they read what we read, and make the same in an image of their builder."""

import hashlib
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from weightsmith.building.wiring import cache_folder
from weightsmith.outside.environment import Pins, environment_folder
from weightsmith.quantizers.packed import PackedView

from tests.fakes.started import weightsmith
from tests.paths import TINY

KEPT = "o_proj"

pytestmark = [pytest.mark.real, pytest.mark.builders, pytest.mark.timeout(3600)]

READER = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
network = AutoModelForCausalLM.from_pretrained(
    sys.argv[1], dtype=torch.float32,
    quantization_config=CompressedTensorsConfig(run_compressed=False))
save_file({name: value.detach().float().contiguous()
           for name, value in network.named_parameters() if name.endswith("_proj.weight")},
          sys.argv[2])
"""


@pytest.mark.parametrize(
    ("format_", "words", "most"),
    [
        ("fp8-static", (), 0.04),
        ("awq-compressed", (), 0.12),
        ("awq-compressed", ("--no-zero-point", "--group-size", "64"), 0.15),
    ],
    ids=["fp8-static", "awq", "awq-symmetric"],
)
def test_the_package_reads_what_we_read(
    tmp_path: Path, format_: str, words: tuple[object, ...], most: float
) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain.safetensors"

    made = weightsmith(
        "quantize", "--model", TINY / "base", "--format", format_, "--keep-module", KEPT, *words,
        "--calibration", TINY / "calibration.jsonl", "--runner", "local", "--out", out,
    )  # fmt: skip

    python = environment_folder(cache_folder(), Pins(name="compressor", flavour="cpu"))
    subprocess.run([python / "bin" / "python", "-c", READER, out, plain], check=True)
    theirs, ours = load_file(plain), PackedView(out)
    assert made["quality"]["layer_error"] < most
    assert len(theirs) == made["details"]["quantized"] + 4
    assert not any(KEPT in name for name in ours.modules)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours.tensor(name), value, err_msg=name)


@pytest.mark.parametrize("format_", ["awq-gptqmodel", "gptq-gptqmodel"])
def test_what_gptqmodel_makes_passes_the_gate(format_: str, tmp_path: Path) -> None:
    """Our reading of its file answers as the checkpoint does."""
    told = weightsmith(
        "quantize", "--model", TINY / "base", "--format", format_, "--out", tmp_path / "out",
        "--calibration", TINY / "calibration.jsonl", "--runner", "local",
    )  # fmt: skip
    assert told["quality"]["exceeded"] == []
    assert told["quality"]["layer_error"] < 0.15


# An image is 1.5 GB and takes about three minutes to build, once.
@pytest.mark.docker
@pytest.mark.parametrize("format_", ["awq-autoawq", "gptq", "fp8-static"])
def test_a_container_makes_what_an_environment_makes(format_: str, tmp_path: Path) -> None:
    """The same pins on another distribution's Python, with the same CPU and number of threads.

    Which it also makes a second time: llm-compressor's scales differed in their last bits.
    """
    found = {}
    for runner in ("local", "docker"):
        out, store = tmp_path / runner, tmp_path / f"store-{runner}"
        told = weightsmith(
            "quantize", "--model", TINY / "base", "--format", format_, "--out", out,
            "--calibration", TINY / "calibration.jsonl", "--runner", runner, store=store,
        )  # fmt: skip
        assert told["quality"]["exceeded"] == []
        found[runner] = {p.name: hashlib.sha256(p.read_bytes()).digest() for p in out.iterdir()}

    assert found["local"] == found["docker"]
