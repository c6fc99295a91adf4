"""The largest inputs, keys and values of layers; those of inputs also in test_architectures.py."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache
from weightsmith.core.errors import CheckFailed
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers.calibration import GENERAL
from weightsmith.quantizers.layerwise.maxima import cache_scales, input_maxima
from weightsmith.quantizers.matrices import matrices
from weightsmith.quantizers.packed import PackedLayout
from weightsmith.quantizers.packed_check import check_checkpoint
from weightsmith.quantizers.rounded import quantize
from weightsmith.quantizers.schemes import NVFP4

from tests.fakes.decoders import make_dense

LINES = [json.loads(line)["text"] for line in GENERAL.read_text("utf-8").splitlines()[:3]]


def test_fused_matrices_of_different_scales_are_found(tmp_path, out):
    model = make_dense(tmp_path / "model", "LlamaForCausalLM")
    inputs = input_maxima(model, LINES, matrices(CheckpointTensors(model), model))
    quantize(NVFP4, model, out, [], inputs)
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.input_global_scale"] *= 2
    save_file(tensors, out / "model.safetensors", {"format": "pt"})

    with pytest.raises(CheckFailed, match=r"different global scales \(input_global_scale\)"):
        check_checkpoint(out, model, PackedLayout.of_scheme(NVFP4))


def cached_by_transformers(model):
    """The largest keys and values that its own cache holds, text by text."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    most = [[0.0, 0.0] for _ in range(network.config.num_hidden_layers)]
    for line in LINES:
        ids = tokenizer(line, add_special_tokens=False, return_tensors="pt")["input_ids"]
        for start in range(0, ids.shape[1], 512):
            with torch.inference_mode():
                made = network(input_ids=ids[:, start : start + 512], use_cache=True)
            (cache,) = (one for one in made.values() if isinstance(one, Cache))
            for layer, pair in zip(cache.layers, most, strict=True):
                pair[0] = max(pair[0], float(layer.keys.abs().max()))
                pair[1] = max(pair[1], float(layer.values.abs().max()))
    return [(keys / 448, values / 448) for keys, values in most]


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM"]
)
def test_they_are_those_of_transformers_cache(tmp_path, architecture):
    model = make_dense(tmp_path / "model", architecture)
    found = cache_scales(model, LINES)

    right = cached_by_transformers(model)
    assert list(found) == [f"model.layers.{n}.self_attn" for n in range(len(right))]
    for mine, theirs in zip(found.values(), right, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
