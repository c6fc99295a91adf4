"""gpt-oss in OpenAI's MXFP4 layout: transformers reads it back; other formats are refused."""

import json
import re

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from weightsmith.core.errors import CheckFailed, InputRefused
from weightsmith.models.facts import read_facts
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers import formats, of_format
from weightsmith.quantizers.calibration import GENERAL
from weightsmith.quantizers.packed import PackedLayout, view_of
from weightsmith.quantizers.packed_check import check_checkpoint
from weightsmith.quantizers.quality.measure import measure
from weightsmith.quantizers.rounded import quantize
from weightsmith.quantizers.schemes import SCHEMES, stored_as

from tests.fakes.decoders import make_sparse
from tests.unit.quantizers.conftest import model_of

GPT_OSS = "GptOssForCausalLM"
SCHEME = SCHEMES["mxfp4a16"]
LAYOUT = PackedLayout.of_scheme(stored_as(SCHEME, GPT_OSS))
STACKS = [f"model.layers.{n}.mlp.experts.{p}_proj" for n in (0, 1) for p in ("gate_up", "down")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_sparse(tmp_path_factory.mktemp("gpt-oss"), GPT_OSS)


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    of_format("mxfp4a16").check_input(formats()["mxfp4a16"], read_facts(model))
    quantize(SCHEME, model, out, [])
    return out


def test_only_the_experts_become_codes(model, made):
    found = check_checkpoint(made, model, LAYOUT)

    source, packed = CheckpointTensors(model), CheckpointTensors(made)
    assert packed.names == (source.names - {*STACKS}) | {
        f"{name}_{part}" for name in STACKS for part in ("blocks", "scales")
    }
    for name in source.names & packed.names:  # sinks, biases, routers, attention
        assert np.array_equal(source.raw(name), packed.raw(name)), name
    assert (found["layout"], found["experts"], found["quantized"]) == ("mxfp4", 8, 16)
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "mxfp4"
    rows = [json.loads(GENERAL.read_text("utf-8").splitlines()[0])]
    loss = measure(model, view_of(made, model), rows, 100, lambda *_: None)
    assert loss.kl_mean > 0
    assert 0 < loss.layer_error < 0.6


def test_transformers_reads_the_same_values(model, made):
    tensors, view = load_file(made / "model.safetensors"), view_of(made, model)
    for name in STACKS:
        right = convert_moe_packed_tensors(
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32
        )
        found = view.tensor(name)
        assert np.array_equal(found, right.numpy())
        own = load_file(model / "model.safetensors")[name].float()
        assert float((right - own).norm() / own.norm()) < 0.15


def test_transformers_computes_what_the_gate_computes(model, made):
    """Its own reader of such checkpoints, against the view's weights in a plain model."""
    asked = transformers.Mxfp4Config(dequantize=True)
    theirs = transformers.GptOssForCausalLM.from_pretrained(
        made, quantization_config=asked, dtype=torch.bfloat16
    ).float()
    ours = transformers.GptOssForCausalLM.from_pretrained(model, dtype=torch.float32)
    view = view_of(made, model)
    own = ours.state_dict()
    own.update({name: torch.from_numpy(view.tensor(name)) for name in STACKS})
    ours.load_state_dict(own)
    ids = torch.randint(5, 500, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)


def test_what_was_in_mxfp4_stays_bit_for_bit(model, tmp_path):
    """Codes and exponents of any kind: experts that no adapter touches lose nothing twice."""
    plain = {n: t.clone() for n, t in load_file(model / "model.safetensors").items()}
    draw = torch.Generator().manual_seed(3)
    for name in STACKS:
        experts, inputs, outputs = plain[name].shape
        groups = inputs // 32
        codes = torch.randint(0, 256, (experts, outputs, groups, 16), generator=draw)
        small = torch.randint(0, 4, (experts, outputs, groups, 1), generator=draw)
        mask = torch.tensor([0x99, 0xAA, 0xBB, 0xFF])[small]  # blocks without large codes, too
        scales = torch.randint(110, 126, (experts, outputs, groups), generator=draw)
        plain[name] = convert_moe_packed_tensors(
            (codes & mask).byte(), scales.byte(), dtype=torch.bfloat16
        ).contiguous()
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir(), out.mkdir()
    (base / "config.json").write_bytes((model / "config.json").read_bytes())
    save_file(plain, base / "model.safetensors", {"format": "pt"})

    quantize(SCHEME, base, out, [])

    view = view_of(out, base)
    for name in STACKS:
        assert np.array_equal(view.tensor(name), plain[name].float().numpy())


def test_damaged_codes_are_found(model, made, tmp_path):
    tensors = load_file(made / "model.safetensors")
    tensors[f"{STACKS[3]}_blocks"][2] = tensors[f"{STACKS[3]}_blocks"][2].flip(0)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((made / "config.json").read_bytes())

    bad = re.escape("model.layers.1.mlp.experts.2.down_proj has a relative error")
    with pytest.raises(CheckFailed, match=bad):
        check_checkpoint(tmp_path, model, LAYOUT)


@pytest.mark.parametrize(
    ("name", "says", "instead"),
    [
        *(
            (name, f"in MXFP4 only, not in {name}", "choose mxfp4a16, or serve it in 16 bits")
            for name in SCHEMES
            if name != "mxfp4a16"
        ),
        *(
            (name, f"unsupported architecture {GPT_OSS}", "choose mxfp4a16")
            for name in ("awq", "gptq", "nvfp4", "awq-gptqmodel", "fp8-static")
        ),
    ],
)
def test_other_formats_are_refused(name, says, instead):
    with pytest.raises(InputRefused, match=says) as refused:
        of_format(name).check_input(formats()[name], gpt_oss())
    assert refused.value.exit_code == 3
    assert refused.value.hint.startswith(instead)


def test_nothing_can_be_kept_and_groups_must_fit():
    quantizer, format_ = of_format("mxfp4a16"), formats()["mxfp4a16"]
    with pytest.raises(InputRefused, match="loads all experts of GptOssForCausalLM in MXFP4"):
        quantizer.check_options(gpt_oss(), {"keep": ["down_proj"]})
    with pytest.raises(InputRefused, match="32 inputs, and an expert's down_proj has 80"):
        quantizer.check_input(format_, gpt_oss(intermediate_size=80))


def gpt_oss(**more):
    return model_of(GPT_OSS, num_local_experts=4, **more)
