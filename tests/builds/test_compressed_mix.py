"""Mixes for vLLM in their builder: transformers answers alike, and losses are as foreseen."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers.compressed_mix import MixSettings, tensor_of, units_of
from weightsmith.quantizers.matrices import matrices
from weightsmith.quantizers.packed import view_of
from weightsmith.worker.quantize_mixed import _write as write

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
def test_foreseen_losses_are_what_transformers_measures(made, tmp_path):
    """Each unit of four alone is quantized in the whole model, whose divergence is measured."""
    losses = json.loads((made[0] / "losses.json").read_text())
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    model = AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    text = "\n".join(tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in ROWS)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    windows = ids[: len(ids) // 128 * 128].reshape(-1, 128)[:32]

    def logs():
        with torch.inference_mode():
            return model(input_ids=windows).logits.log_softmax(-1)

    right, ratios = logs(), []
    units = units_of(matrices(CheckpointTensors(TINY / "base"), TINY / "base"))
    plain = dict.fromkeys(units, "16bit")
    for layer, (unit, kind) in enumerate((
        ("self_attn.qkv_proj", "int4-32"), ("mlp.down_proj", "int4-32"),
        ("self_attn.o_proj", "int4-32-zeros"), ("mlp.gate_up_proj", "int4-32-zeros"),
    )):  # fmt: skip
        name, out = f"model.layers.{layer}.{unit}", tmp_path / kind / unit
        out.mkdir(parents=True)
        write(MixSettings(
            model=str(TINY / "base"), out=str(out), texts=str(texts), matrix="", losses="",
            wanted={"mix": {**plain, name: kind}}, measured_on="",
        ))  # fmt: skip
        view, before = view_of(out, TINY / "base"), {}
        for one in units[name]:
            weight = model.get_submodule(one.module).weight
            before[weight] = weight.detach().clone()
            weight.data = torch.from_numpy(view.tensor(one.tensor))
        measured = (right.exp() * (right - logs())).sum(-1).mean()
        for weight, own in before.items():
            weight.data = own
        foreseen = sum(losses[tensor_of(one)][kind] for one in units[name])
        ratios.append(foreseen / float(measured))

    assert all(0.3 < ratio < 2.5 for ratio in ratios), ratios
    assert np.exp(np.mean(np.log(ratios))) == pytest.approx(1, abs=0.5), ratios
