"""Builds in memory whose image drafts tokens."""

from __future__ import annotations

import json

import pytest
from weightsmith.core.errors import InputRefused

from tests.fakes.memory import Memory
from tests.fakes.predicting import add_predicting

TARGET = "llamacpp-q4_k_m"


def test_an_image_drafts_what_stands_there_already(memory: Memory) -> None:
    memory.build("serve.speculative.method=ngram", "serve.speculative.tokens=5")

    image = memory.engine.held(f"{memory.repository}:1.0.0-{TARGET}")
    assert "LLAMA_ARG_SPEC_TYPE=ngram-simple" in image.config["Env"]
    assert image.config["Cmd"][-1] == "5"


def test_a_base_that_lost_its_further_layers_is_refused(memory: Memory) -> None:
    """transformers keeps the number in config.json, and drops the tensors."""
    memory.use_vllm()
    base = memory.home / "base"
    added = add_predicting(base, "numbered")
    settings = ("serve.speculative.method=mtp", "serve.speculative.tokens=1")

    built = memory.build(*settings)["vllm"]
    assert built.scores["image"].score == 1
    image = memory.engine.held(f"{memory.repository}:1.0.0-vllm")
    assert (
        b'speculative-config: "{\\"method\\": \\"mtp\\"'
        in image.files()["/etc/weightsmith/vllm.yaml"]
    )
    assert added

    from safetensors.torch import load_file, save_file

    file = base / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k not in added}, file, {"format": "pt"})
    assert json.loads((base / "config.json").read_text())["num_nextn_predict_layers"] == 1
    with pytest.raises(InputRefused, match="no tensors of layers for further tokens"):
        memory.build(*settings)
