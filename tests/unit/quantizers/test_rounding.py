"""Formats without calibration: compressed-tensors itself makes and reads the same numbers."""

import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from weightsmith.core.errors import CheckFailed
from weightsmith.core.kernels import library
from weightsmith.quantizers.packed import PackedLayout, view_of
from weightsmith.quantizers.packed_check import check_checkpoint
from weightsmith.quantizers.rounded import quantize as write
from weightsmith.quantizers.rounding import fused_scale, round_rows
from weightsmith.quantizers.schemes import SCHEMES

from tests.fakes.awkward import awkward, damage_half, make


def theirs(weight, scheme):
    """Return codes, scales, global scale and arguments by compressed-tensors in float32."""
    config = QuantizationConfig.model_validate(scheme.config([]))
    args = config.config_groups["group_0"].weights
    x = torch.from_numpy(weight)
    height, width = scheme.tile[0], scheme.tile[1] or weight.shape[1]
    padded = torch.nn.functional.pad(x, (0, -weight.shape[1] % width, 0, -weight.shape[0] % height))
    tiles = padded.reshape(padded.shape[0] // height, height, padded.shape[1] // width, width)
    shared = generate_gparam(x.amin(), x.amax()) if scheme.fused_scale else None
    scale, _ = calculate_qparams(tiles.amin((1, 3)), tiles.amax((1, 3)), args, shared)
    codes = quantize(x, scale, None, args, global_scale=shared)
    return codes, scale, shared, args


@pytest.mark.parametrize("name", [n for n in SCHEMES if n != "w8a8"])  # which has no -128 here
@pytest.mark.parametrize("shape", [(128, 128), (200, 160), (7, 96)])
def test_codes_and_scales_are_those_of_compressed_tensors(name, shape):
    scheme, weight = SCHEMES[name], awkward(*shape)
    codes, scales, shared, _ = theirs(weight, scheme)

    most = float(np.abs(weight).max())
    ours_shared = fused_scale(most, scheme) if scheme.fused_scale else None
    ours, ours_scales = round_rows(weight, scheme, ours_shared)

    if scheme.packed:
        np.testing.assert_array_equal(ours, pack_fp4_to_uint8(codes).numpy())
    else:
        np.testing.assert_array_equal(ours.astype(np.float32), codes.numpy())
    if shared is not None:
        assert float(shared) == ours_shared
    stored = ours_scales.astype(np.float32)
    if scheme.scales == "U8":
        stored = np.ldexp(np.float32(1), ours_scales.astype(np.int32) - 127)
    elif scheme.scales == "F32":  # a tile of zeros has another scale there
        empty = np.isclose(scales.numpy(), np.finfo(np.float32).eps, rtol=0, atol=1e-12)
        stored = np.where(empty & (stored == 1), np.finfo(np.float32).eps, stored)
    np.testing.assert_array_equal(stored, scales.numpy())


def test_float8_is_rounded_like_ml_dtypes_at_every_tie():
    values = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ties = (values[1:] + values[:-1]) / 2
    near = [np.nextafter(ties, np.float32(end)) for end in (0, 1e9)]
    every = np.concatenate([values, ties, *near, [1e-12, 448]]).astype(np.float32)
    every = np.concatenate([every, -every])[None]
    every = np.pad(every, ((0, 0), (0, -every.shape[1] % 16)))

    codes, scales = round_rows(every, SCHEMES["fp8"])

    assert scales == 1
    np.testing.assert_array_equal(
        codes.view(np.uint8), every.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    )


@pytest.fixture
def model(tmp_path):
    return make(tmp_path / "model")


def read_by_compressed_tensors(folder):
    """Return the matrices of a folder, by its own config.json, in float32."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(config)
    scheme = config.config_groups["group_0"]
    assert infer_module_format(torch.nn.Linear, scheme) == config.format
    compressor: Any = BaseCompressor.get_value_from_registry(config.format)
    tensors = load_file(folder / "model.safetensors")
    made = {}
    for name in (n.removesuffix("_scale") for n in tensors if n.endswith(".weight_scale")):
        scale, packed = tensors[f"{name}_scale"], tensors.get(f"{name}_packed")
        codes = tensors[name].float() if packed is None else None
        if packed is not None:
            codes = unpack_fp4_from_uint8(
                packed, *packed.shape[:1], packed.shape[1] * 2, torch.float32
            )
            scale = compressor._decompress_scale(scale, torch.float32)
        made[name] = dequantize(
            codes, scale.float(), args=scheme.weights, dtype=torch.float32,
            global_scale=tensors.get(f"{name}_global_scale"),
        )  # fmt: skip
    return made


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_reads_what_we_read(model, out, name):
    write(SCHEMES[name], model, out, ["o_proj"])

    found = check_checkpoint(out, model, PackedLayout.of_scheme(SCHEMES[name]), ("o_proj",))
    assert found["quantized"] == 6
    view, read = view_of(out, model), read_by_compressed_tensors(out)
    assert len(read) == 6
    for matrix, value in read.items():
        np.testing.assert_array_equal(view.tensor(matrix), value.numpy(), err_msg=matrix)
        np.testing.assert_array_equal(view.rows(matrix, 5, 21), value[5:21].numpy(), err_msg=matrix)
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignored == ["lm_head", "model.layers.0.self_attn.o_proj"]


def test_fused_matrices_share_their_global_scale(model, out):
    write(SCHEMES["nvfp4a16"], model, out, [])
    tensors = load_file(out / "model.safetensors")

    scales = {
        name.split(".")[-2]: float(value)
        for name, value in tensors.items()
        if name.endswith("global_scale")
    }

    assert scales["q_proj"] == scales["k_proj"] == scales["v_proj"] != scales["o_proj"]
    assert scales["gate_proj"] == scales["up_proj"]
    before = load_file(model / "model.safetensors")
    parts = [before[f"model.layers.0.self_attn.{n}_proj.weight"].abs().max() for n in "qkv"]
    assert scales["q_proj"] == np.float32(2688) / np.float32(max(map(float, parts)))

    tensors["model.layers.0.mlp.up_proj.weight_global_scale"] *= 1.01
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(CheckFailed, match="different global scales"):
        check_checkpoint(out, model, PackedLayout.of_scheme(SCHEMES["nvfp4a16"]), ())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("damage", ["weight_scale", "weight"])
def test_damaged_codes_and_scales_are_found(model, out, name, damage):
    scheme = SCHEMES[name]
    write(scheme, model, out, [])
    damage_half(out, "weight_packed" if damage == "weight" and scheme.packed else damage)

    with pytest.raises(CheckFailed):
        check_checkpoint(out, model, PackedLayout.of_scheme(scheme), ())


@pytest.mark.builders
@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("name", SCHEMES)
def test_with_and_without_kernels_the_file_and_its_check_are_the_same(
    model, tmp_path, name, monkeypatch
):
    scheme, layout = SCHEMES[name], PackedLayout.of_scheme(SCHEMES[name])
    facts = []
    for way in ("C", "numpy"):
        (tmp_path / way).mkdir()
        write(scheme, model, tmp_path / way, [])
        facts.append(check_checkpoint(tmp_path / way, model, layout, ()))
        monkeypatch.setattr(library, "found", lambda: None)
    ours, other = ((tmp_path / way / "model.safetensors").read_bytes() for way in ("C", "numpy"))
    assert ours == other
    assert facts[0] == facts[1]

    monkeypatch.undo()
    damage_half(tmp_path / "C", "weight_packed" if scheme.packed else "weight")
    with pytest.raises(CheckFailed, match="down_proj"):
        check_checkpoint(tmp_path / "C", model, layout, ())
