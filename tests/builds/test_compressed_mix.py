"""Mixes for vLLM in their builder: transformers answers alike, and losses are as foreseen."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers.compressed_mix import rounded, tensor_of
from weightsmith.quantizers.gguf_importance import read_importance
from weightsmith.quantizers.matrices import matrices

from tests.fakes.ggufs import TINY, quantize

pytestmark = [pytest.mark.builders, pytest.mark.slow]
ROWS = tuple(
    json.loads(line) for line in (TINY / "calibration.jsonl").read_text("utf-8").splitlines()
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("mix") / "out"
    options = {"imatrix": "walk", "bits": 8}
    return out, dict(quantize(TINY / "base", out, "mix-compressed", options, texts=ROWS))


@pytest.mark.full  # test_vllm_mix_in_memory.py
def test_a_mix_is_within_its_budget_and_is_taken_again(made, tmp_path):
    out, details = made
    assert 7 < details["bits_per_weight"] <= 8
    assert len(details["types"]) > 1
    assert 0 < details["mix"]["bound"] <= details["mix"]["loss"]

    given = {"imatrix": "walk", "mix": details["tensor_types"]}
    quantize(TINY / "base", tmp_path / "given", "mix-compressed", given, texts=ROWS)
    name = "model.safetensors"
    assert (tmp_path / "given" / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.full  # of other types, test_gguf_mix.py shows the same
def test_foreseen_losses_are_what_transformers_measures(made):
    """Each unit of four alone is rounded in the whole model, whose divergence is then measured."""
    losses = json.loads((made[0] / "losses.json").read_text())
    importance = read_importance(made[0] / "imatrix.gguf")
    model = AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    text = "\n".join(tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in ROWS)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    windows = ids[: len(ids) // 128 * 128].reshape(-1, 128)[:32]

    def logs():
        with torch.inference_mode():
            return model(input_ids=windows).logits.log_softmax(-1)

    right, ratios = logs(), []
    found = {one.module: one for one in matrices(CheckpointTensors(TINY / "base"), TINY / "base")}
    for module in (
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.2.self_attn.o_proj",
        "model.layers.3.mlp.up_proj",
    ):
        weight = model.get_submodule(module).weight
        own = weight.detach().clone()
        (weighed,) = importance.of(tensor_of(found[module]), own.shape[1], 1)
        weight.data = torch.from_numpy(rounded("int4-32", own.numpy(), weighed))
        measured = (right.exp() * (right - logs())).sum(-1).mean()
        weight.data = own
        ratios.append(losses[tensor_of(found[module])]["int4-32"] / float(measured))

    assert all(0.3 < ratio < 2.5 for ratio in ratios), ratios
    assert np.exp(np.mean(np.log(ratios))) == pytest.approx(1, abs=0.5), ratios
