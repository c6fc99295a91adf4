"""Whole merges onto quantized bases, and onto 16-bit ones seen as 4-bit training saw them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from weightsmith.core.errors import InputRefused
from weightsmith.merging.quantized.decode import NF4

from tests.unit.merging.conftest import MakeAdapter, MakeModel
from tests.unit.merging.oracle import run

Tensors = dict[str, torch.Tensor]
Quantize = Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]


def to_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, scales and what they stand for, by the definition."""
    blocks = weight.float().reshape(-1, 64)
    absmax = blocks.abs().amax(1)
    levels = torch.tensor(NF4)
    codes = (blocks / absmax[:, None]).unsqueeze(-1).sub(levels).abs().argmin(-1)
    decoded = (levels[codes] * absmax[:, None]).view(weight.shape).to(torch.bfloat16)
    return codes.view(-1).to(torch.uint8), absmax, decoded


def bnb(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, absmax, decoded = to_nf4(weight)
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": list(weight.shape),
    }
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        name: (codes[::2] << 4 | codes[1::2]).unsqueeze(1),
        f"{name}.absmax": absmax,
        f"{name}.quant_map": torch.tensor(NF4),
        f"{name}.quant_state.bitsandbytes__nf4": text,
    }, decoded


def fp8(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = torch.rand(-(-weight.shape[0] // 16), weight.shape[1] // 16) + 0.5
    spread = scale.repeat_interleave(16, 0)[: weight.shape[0]].repeat_interleave(16, 1)
    codes = (weight.float() / spread).to(torch.float8_e4m3fn)
    activations = name.replace("weight", "input_scale")
    return (
        {name: codes, f"{name}_scale_inv": scale, activations: torch.ones(1)},
        (codes.float() * spread).to(torch.bfloat16),
    )


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def modelopt_fp8(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    scale = weight.float().abs().max() / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    more = {f"{name}_scale": scale, name.replace("weight", "input_scale"): torch.tensor(0.5)}
    return {name: codes, **more}, (codes.float() * scale).to(torch.bfloat16)


def modelopt_nvfp4(name: str, weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Codes and scales by the definition: two codes a byte, low one first; scales multiplied."""
    groups = weight.float().unflatten(1, (-1, 16))
    second = weight.float().abs().max() / (6 * 448)
    scale = (groups.abs().amax(2) / 6 / second).to(torch.float8_e4m3fn)
    spread = (scale.float() * second)[..., None]
    codes = (groups.abs() / spread).unsqueeze(-1).sub(E2M1).abs().argmin(-1)
    signed = (codes + 8 * (groups < 0)).flatten(1).to(torch.uint8)
    decoded = (E2M1[codes] * torch.where(groups < 0, -1, 1) * spread).flatten(1)
    return {
        name: signed[:, ::2] | signed[:, 1::2] << 4,
        f"{name}_scale": scale,
        f"{name}_scale_2": second,
        name.replace("weight", "input_scale"): torch.tensor(0.5),
    }, decoded.to(torch.bfloat16)


METHODS: dict[str, tuple[Quantize, dict[str, Any]]] = {
    "bitsandbytes": (bnb, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [16, 16]}),
    "modelopt FP8": (modelopt_fp8, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "modelopt NVFP4": (modelopt_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
}


@pytest.fixture
def plain(make_model: MakeModel) -> Path:
    return make_model(dtype=torch.bfloat16)


def quantized(plain: Path, folder: Path, method: str) -> tuple[Path, Path]:
    """Write the base quantized, sharded by hand, and the 16-bit base that it stands for."""
    quantize, told = METHODS[method]
    stored: Tensors = {}
    decoded: Tensors = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if name.endswith("proj.weight"):
            parts, decoded[name] = quantize(name, tensor)
            stored |= parts
        else:
            stored[name] = decoded[name] = tensor
    for kind, tensors in (("quantized", stored), ("decoded", decoded)):
        shutil.copytree(plain, folder / kind)
        save_file(tensors, folder / kind / "model.safetensors", {"format": "pt"})
    config = folder / "quantized" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": told}))
    for stale in ("quantize_config.json", "hf_quant_config.json"):
        (folder / "quantized" / stale).write_text("{}")
    return folder / "quantized", folder / "decoded"


@pytest.mark.parametrize("method", METHODS)
def test_dequantize_merges_onto_what_the_codes_stand_for(
    method: str, plain: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(plain, target_modules=["q_proj", "down_proj"])
    base, decoded = quantized(plain, tmp_path, method)
    result = run(base, adapter, tmp_path / "out", quantized_base="dequantize")
    other = run(base, adapter, tmp_path / "3", quantized_base="dequantize", workers=3)
    assert other["shards"] == result["shards"]
    run(decoded, adapter, tmp_path / "wanted")
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = load_file(tmp_path / "wanted" / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert not list((tmp_path / "out").glob("*quant*"))
    assert result["quantized_base"]["choice"] == "dequantize"
    assert result["quantized_base"]["method"] == method.partition(" ")[0]
    assert result["quantized_base"]["tensors"] == 14
    assert result["tensors"] == {"merged": 4, "copied": len(wanted) - 4, "replaced": 0}
    assert any("dequantized" in finding for finding in result["findings"])

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16


def test_codes_in_the_place_of_a_conv1d_are_those_of_a_linear_layer(
    make_model: MakeModel, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """GPT-2 stores (in, out), but transformers quantizes the transposed weight, (out, in)."""
    plain = make_model("gpt2", dtype=torch.bfloat16)
    adapter = make_adapter(plain, target_modules=["c_attn", "mlp.c_proj"])
    base, decoded = tmp_path / "quantized", tmp_path / "decoded"
    stored: Tensors = {}
    meant: Tensors = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        stored[name] = meant[name] = tensor
        if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")):
            del stored[name]
            parts, values = bnb(name, tensor.T.contiguous())
            stored, meant = stored | parts, meant | {name: values.T.contiguous()}
    for folder, tensors in ((base, stored), (decoded, meant)):
        shutil.copytree(plain, folder)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    run(base, adapter, tmp_path / "out", quantized_base="dequantize")

    run(decoded, adapter, tmp_path / "wanted")
    files = [tmp_path / kind / "model.safetensors" for kind in ("out", "wanted")]
    found, wanted = map(load_file, files)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def test_a_quantized_base_is_refused_with_both_ways_on(
    plain: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(plain)
    base, _ = quantized(plain, tmp_path, "bitsandbytes")
    with pytest.raises(InputRefused, match=r"is quantized \(bitsandbytes\)") as caught:
        run(base, adapter, tmp_path / "out")
    assert "dequantize" in caught.value.hint
    assert "simulate-nf4" in caught.value.hint
    assert "46 times" in caught.value.hint
    with pytest.raises(InputRefused, match="already"):
        run(base, adapter, tmp_path / "out", quantized_base="simulate-nf4")
    assert not (tmp_path / "out").exists()


def test_simulation_is_the_merge_onto_the_quantized_base(
    plain: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """Also the layers that the adapter leaves alone are as training saw them."""
    adapter = make_adapter(plain, target_modules=["q_proj"])
    base, _ = quantized(plain, tmp_path, "bitsandbytes")
    one = run(base, adapter, tmp_path / "one", quantized_base="dequantize")
    two = run(plain, adapter, tmp_path / "two", quantized_base="simulate-nf4")
    found = load_file(tmp_path / "two" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "one" / "model.safetensors").items():
        assert torch.equal(found[name], tensor), name
    assert two["quantized_base"]["tensors"] == one["quantized_base"]["tensors"] == 14
    three = run(plain, adapter, tmp_path / "three", quantized_base="simulate-nf4-double")
    assert three["shards"][0]["sha256"] != two["shards"][0]["sha256"]


def test_simulation_where_it_cannot_be_known_is_refused(
    make_model: MakeModel, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    base = make_model("gpt2")
    adapter = make_adapter(base, target_modules=["c_attn"])
    with pytest.raises(InputRefused, match="cannot be reproduced"):
        run(base, adapter, tmp_path / "out", quantized_base="simulate-nf4")


def test_a_plain_base_has_nothing_to_dequantize(
    plain: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(plain)
    run(plain, adapter, tmp_path / "plain")
    result = run(plain, adapter, tmp_path / "out", quantized_base="dequantize")
    assert any("not quantized" in finding for finding in result["findings"])
    names = [tmp_path / kind / "model.safetensors" for kind in ("plain", "out")]
    assert names[0].read_bytes() == names[1].read_bytes()
