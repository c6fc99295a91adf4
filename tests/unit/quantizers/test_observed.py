"""NVFP4 with scales of inputs: the largest inputs of the whole model, shared where engines fuse."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization.utils import generate_gparam
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from weightsmith.core.errors import CheckFailed
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers.calibration import GENERAL
from weightsmith.quantizers.layerwise.maxima import input_maxima
from weightsmith.quantizers.matrices import matrices
from weightsmith.quantizers.packed import PackedLayout
from weightsmith.quantizers.packed_check import check_checkpoint
from weightsmith.quantizers.rounded import quantize
from weightsmith.quantizers.schemes import NVFP4

from tests.fakes.decoders import make_dense, make_sparse
from tests.fakes.seeing import make_seeing

LINES = [json.loads(line)["text"] for line in GENERAL.read_text("utf-8").splitlines()[:3]]


def made(tmp_path: Path, model: Path) -> tuple[Path, dict[str, float]]:
    out = tmp_path / "out"
    out.mkdir()
    inputs = dict(input_maxima(model, LINES, matrices(CheckpointTensors(model), model)))
    quantize(NVFP4, model, out, [], inputs)
    return out, inputs


def by_transformers(model: Path) -> dict[str, float]:
    """The largest inputs of each linear layer, text by text in the whole model."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    most: dict[str, float] = {}

    def see(name: str, _, args) -> None:
        most[name] = max(most.get(name, 0.0), float(args[0].abs().max()))

    for name, module in network.named_modules():
        if type(module) is torch.nn.Linear:
            module.register_forward_pre_hook(partial(see, name))
    for line in LINES:
        ids = tokenizer(line, add_special_tokens=False, return_tensors="pt")["input_ids"]
        for start in range(0, ids.shape[1], 512):
            with torch.inference_mode():
                network(input_ids=ids[:, start : start + 512])
    return most


def test_scales_are_those_of_the_largest_inputs(tmp_path: Path) -> None:
    model = make_dense(tmp_path / "model", "Qwen3ForCausalLM")
    out, inputs = made(tmp_path, model)

    check_checkpoint(out, model, PackedLayout.of_scheme(NVFP4))
    right, tensors = by_transformers(model), load_file(out / "model.safetensors")
    assert inputs.keys() <= right.keys()
    for module, most in inputs.items():
        assert most == pytest.approx(right[module], rel=1e-3)
        scale = generate_gparam(torch.tensor(-most), torch.tensor(most))
        assert torch.equal(tensors[f"{module}.input_global_scale"], scale.reshape(1))
    told = json.loads((out / "config.json").read_text())["quantization_config"]
    assert told["config_groups"]["group_0"]["input_activations"]["dynamic"] == "local"


@pytest.mark.parametrize(
    ("make", "architecture"),
    [
        (make_sparse, "Qwen3MoeForCausalLM"),
        (make_sparse, "MixtralForCausalLM"),
        (make_seeing, "Gemma3ForConditionalGeneration"),
    ],
)
def test_experts_of_a_layer_have_one_scale(tmp_path: Path, make, architecture: str) -> None:
    model = make(tmp_path / "model", architecture)
    out, inputs = made(tmp_path, model)

    check_checkpoint(out, model, PackedLayout.of_scheme(NVFP4))
    tensors = load_file(out / "model.safetensors")
    for end in ("0.gate_proj", "0.w1", "0.down_proj", "0.w2"):
        for first in (n for n in inputs if n.endswith(f".experts.{end}")):
            names = [first.replace(".experts.0.", f".experts.{n}.") for n in (1, 2)]
            others = [tensors[f"{name}.input_global_scale"] for name in names]
            assert all(torch.equal(tensors[f"{first}.input_global_scale"], o) for o in others)


def test_fused_matrices_of_different_scales_are_found(tmp_path: Path) -> None:
    model = make_dense(tmp_path / "model", "LlamaForCausalLM")
    out, _ = made(tmp_path, model)
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.input_global_scale"] *= 2
    save_file(tensors, out / "model.safetensors", {"format": "pt"})

    with pytest.raises(CheckFailed, match=r"different global scales \(input_global_scale\)"):
        check_checkpoint(out, model, PackedLayout.of_scheme(NVFP4))
