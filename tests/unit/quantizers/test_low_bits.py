"""Integers of 2, 3 and 5 bits: compressed-tensors packs and reads the same words."""

import json

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from safetensors.torch import load_file, save_file
from weightsmith.core.errors import CheckFailed, InputRefused
from weightsmith.models.facts import Packing, read_facts
from weightsmith.quantizers import formats, of_format, quantizers
from weightsmith.quantizers.calibration import GENERAL
from weightsmith.quantizers.checkpoints import integers_config
from weightsmith.quantizers.layerwise.quantizing import Grid, best_grid, packed_integers, quantize
from weightsmith.quantizers.low_bits import BITS
from weightsmith.quantizers.packed import PackedLayout, view_of
from weightsmith.quantizers.packed_check import check_checkpoint
from weightsmith.quantizers.running import ProgramSettings
from weightsmith.stages.quantize import QuantizeOptions, nominal
from weightsmith.worker.jobs import _quantizer

from tests.unit.quantizers.conftest import make_any, model_of

ROWS = [json.loads(line) for line in GENERAL.read_text("utf-8").splitlines()[:2]]
GROUP = 32


def codes_of(bits, columns):
    random = np.random.default_rng(bits)
    return torch.from_numpy(random.integers(0, 2**bits, (5, columns)))


@pytest.mark.parametrize("bits", BITS.values())
@pytest.mark.parametrize("columns", [32, 96, 576])
def test_words_are_those_of_compressed_tensors(bits, columns):
    codes = codes_of(bits, columns)
    one = torch.ones(5, columns // GROUP)
    grid = Grid(one, one * 2 ** (bits - 1), 2**bits - 1)

    made = packed_integers(grid, (codes - 2 ** (bits - 1)).float())

    expected = pack_to_int32((codes - 2 ** (bits - 1)).to(torch.int8), bits)
    assert torch.equal(made["weight_packed"], expected)
    assert made["weight_shape"].tolist() == [5, columns]


@pytest.mark.parametrize("bits", [2, 3, 5])
def test_a_grid_has_the_values_of_its_bits(bits):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(bits))
    grid = best_grid(weight, None, GROUP, symmetric=True, bits=bits)

    codes = grid.codes(grid.rounded(weight))

    assert (int(codes.min()), int(codes.max())) == (0, 2**bits - 1)
    whole = weight.abs().reshape(8, -1, GROUP).amax(-1) / ((2**bits - 1) / 2)
    assert torch.equal(grid.scale, whole.bfloat16().float())


@pytest.mark.parametrize("name", quantizers())
def test_a_job_finds_its_quantizer_by_the_name_of_its_file(name):
    assert _quantizer(name) == quantizers()[name]


def made(tmp_path, name, keep=(), architecture="LlamaForCausalLM"):
    model, out = make_any(tmp_path / "model", architecture), tmp_path / "out"
    out.mkdir()
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({**row, "tokens": 1}) + "\n" for row in ROWS))
    of_format(name).check_input(formats()[name], read_facts(model))
    quantize(
        ProgramSettings(
            model=model, out=out, calibration=str(texts), method=name, bits=BITS[name],
            group_size=GROUP, keep=keep,
        )
    )  # fmt: skip
    return model, out


def layout(name):
    return PackedLayout(method="pack-quantized", bits=BITS[name], group_size=GROUP, symmetric=True)


@pytest.mark.parametrize("name", BITS)
def test_compressed_tensors_reads_what_we_read(tmp_path, name):
    model, out = made(
        tmp_path, name, ["o_proj"], "Qwen3MoeForCausalLM" if name == "w3a16" else "LlamaForCausalLM"
    )

    found = check_checkpoint(out, model, layout(name), ("o_proj",))
    asked = QuantizeOptions(name="demo", format=formats()[name], options={"group_size": GROUP})
    planned = nominal(asked, 10**6, read_facts(model)).bits_per_weight
    assert planned == pytest.approx(found["bits_per_quantized_weight"], abs=0.1)
    told = json.loads((out / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(told)
    scheme = config.config_groups["group_0"]
    preset = PRESET_SCHEMES[name.upper()]["weights"]
    assert scheme.weights == preset.model_copy(update={"group_size": GROUP})
    assert infer_module_format(torch.nn.Linear, scheme) == config.format == "pack-quantized"
    assert "model.layers.0.self_attn.o_proj" in told["ignore"]
    assert Packing.of(told).kinds == {"compressed-tensors"}
    compressor = BaseCompressor.get_value_from_registry(config.format)
    view, tensors = view_of(out, model), load_file(out / "model.safetensors")
    assert view.modules
    for module in view.modules:
        parts = ("weight_packed", "weight_scale", "weight_shape")
        own = {part: tensors[f"{module}.{part}"] for part in parts}
        own["weight_scale"] = own["weight_scale"].float()
        read = compressor.decompress(own, scheme)["weight"]
        np.testing.assert_array_equal(view.matrix(module), read.numpy(), err_msg=module)
        np.testing.assert_array_equal(view.matrix(module, 3, 7), read[3:7].numpy())


@pytest.mark.parametrize("name", BITS)
def test_swapped_codes_and_scales_are_found(tmp_path, name):
    model, out = made(tmp_path, name)
    tensors = load_file(out / "model.safetensors")
    for part in ("weight_packed", "weight_scale"):
        damaged = dict(tensors)
        key = f"model.layers.0.self_attn.q_proj.{part}"
        damaged[key] = tensors[key].flip(0 if part == "weight_scale" else 1).contiguous()
        if part == "weight_scale":
            damaged[key] *= 3
        save_file(damaged, out / "model.safetensors")

        with pytest.raises(CheckFailed, match=r"q_proj has a relative error"):
            check_checkpoint(out, model, layout(name))


def test_rows_that_no_group_divides_are_refused():
    model = model_of("LlamaForCausalLM", intermediate_size=1000)
    with pytest.raises(InputRefused, match="does not divide the 1000 inputs of down_proj"):
        of_format("w3a16").check_input(formats()["w3a16"], model)
    assert integers_config(3, 64, [])["ignore"] == ["lm_head"]
