"""Decoded weights, bit for bit, against the libraries that wrote them and formats' definitions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from weightsmith.core.errors import InputRefused
from weightsmith.merging.quantized.decode import decode, dynamic_code, round_trip
from weightsmith.merging.quantized.layout import QuantizedLayout, read_layout
from weightsmith.merging.stream import ARRAY_TYPES
from weightsmith.models.safetensors import TensorInfo, read_header
from weightsmith.models.tensors import array_type

Decode = Callable[..., tuple[QuantizedLayout, dict[str, np.ndarray]]]


@pytest.fixture
def decode_file(tmp_path: Path) -> Decode:
    """Save tensors, read their layout back, and decode every weight."""

    def run(
        tensors: Mapping[str, torch.Tensor], told: Mapping[str, Any], dtype: str = "bfloat16"
    ) -> tuple[QuantizedLayout, dict[str, np.ndarray]]:
        path = tmp_path / "model.safetensors"
        save_file(dict(tensors), path)
        data = path.read_bytes()
        infos = {info.name: info for info in read_header(path).tensors}

        def array(info: TensorInfo) -> np.ndarray:
            raw = np.frombuffer(data[info.start : info.end], array_type(info.dtype))
            return raw.reshape(info.shape)

        config = {"dtype": dtype, "quantization_config": told}
        layout = read_layout(config, infos, lambda info: data[info.start : info.end])
        decoded = {
            name: decode(weight, {part: array(info) for part, info in weight.parts.items()})
            for name, weight in layout.packed.items()
        }
        return layout, decoded

    return run


def bits(values: np.ndarray | torch.Tensor) -> np.ndarray:
    """Return 16- or 32-bit floats as integers, so that every bit is compared."""
    if isinstance(values, torch.Tensor):
        kind = torch.int16 if values.element_size() == 2 else torch.int32
        return values.contiguous().view(kind).numpy()
    return values.view(np.int16 if values.itemsize == 2 else np.int32)


GOLDEN = load_file(Path(__file__).parent / "data" / "golden.safetensors")
BITSANDBYTES = {"quant_method": "bitsandbytes"}
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def golden(prefix: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in GOLDEN.items() if name.startswith(prefix)}


def array(tensor: torch.Tensor) -> np.ndarray:
    return bits(tensor).view(ARRAY_TYPES[NAMES[tensor.dtype]])


@pytest.mark.parametrize("number", range(6))
def test_4bit_is_bitsandbytes_own(number: int, decode_file: Decode) -> None:
    name = f"bnb{number}.weight"
    layout, decoded = decode_file(golden(name), BITSANDBYTES)
    wanted = GOLDEN[f"decoded.{name}"]
    assert layout.packed[name].shape == tuple(wanted.shape)
    assert decoded[name].dtype == ARRAY_TYPES[NAMES[wanted.dtype]]
    assert np.array_equal(bits(decoded[name]), bits(wanted))


def test_int8_is_bitsandbytes_own(decode_file: Decode) -> None:
    _, decoded = decode_file(golden("int8"), BITSANDBYTES, "float16")
    assert np.array_equal(bits(decoded["int8.weight"]), bits(GOLDEN["decoded.int8.weight"]))


@pytest.mark.parametrize(("number", "double"), [(0, False), (1, True), (2, True), (3, False)])
def test_the_round_trip_is_bitsandbytes_own(number: int, double: bool) -> None:
    original = array(GOLDEN[f"original.bnb{number}.weight"])
    wanted = GOLDEN[f"decoded.bnb{number}.weight"]
    assert np.array_equal(bits(round_trip(original, double=double)), bits(wanted))


def test_the_round_trip_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    original = array(GOLDEN["original.bnb1.weight"])
    whole = round_trip(original)
    monkeypatch.setattr("weightsmith.merging.quantized.decode._CHUNK", 128)
    assert np.array_equal(bits(round_trip(original)), bits(whole))


def test_the_dynamic_code_is_bitsandbytes_own() -> None:
    stored = GOLDEN["bnb1.weight.nested_quant_map"].numpy()
    assert np.array_equal(dynamic_code(), stored)


@pytest.mark.parametrize("name", ["w4g", "w4a", "w3c", "w8c", "i8c", "f8c", "f8t", "f8b"])
def test_compressed_tensors(name: str, decode_file: Decode) -> None:
    told: dict[str, Any] = {"quant_method": "compressed-tensors"}
    if name == "f8b":
        told["config_groups"] = {"group_0": {"weights": {"block_structure": [16, 32]}}}
    _, decoded = decode_file(golden(f"{name}."), told)
    wanted = GOLDEN[f"decoded.{name}.weight"]
    got = decoded[f"{name}.weight"]
    # The library computes in the scale's bfloat16: small integers and a product, rounded once too.
    assert got.shape == tuple(wanted.shape)
    assert np.array_equal(bits(got), bits(wanted))


def pack(codes: np.ndarray, width: int) -> torch.Tensor:
    """Pack each row's codes into 32-bit words by Python's integers."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (width * place) for place, code in enumerate(row))
        words = -(-len(row) * width // 32)
        rows.append([(number >> (32 * word)) & 0xFFFFFFFF for word in range(words)])
    return torch.from_numpy(np.array(rows, np.uint32).view(np.int32))


@pytest.mark.parametrize("width", [3, 4])
def test_few_columns_have_the_bits_that_the_configuration_says(
    width: int, decode_file: Decode
) -> None:
    """24 columns take three words with 3 bits each, and with 4."""
    codes = np.random.default_rng(0).integers(0, 1 << width, (2, 24))
    tensors = {
        "m.weight_packed": pack(codes, width),
        "m.weight_scale": torch.ones(2, 1),
        "m.weight_shape": torch.tensor([2, 24]),
    }
    groups = {"group_0": {"weights": {"num_bits": width}}}
    told = {"quant_method": "compressed-tensors", "config_groups": groups}
    _, decoded = decode_file(tensors, told)
    assert np.array_equal(decoded["m.weight"].astype(int), codes - (1 << (width - 1)))


NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
MODELOPT = {
    "m.weight": torch.tensor([[0x21, 0x9F] + [0] * 14] * 2).byte(),
    "m.weight_scale": torch.tensor([[2.0, 1.0]] * 2).to(torch.float8_e4m3fn),
    "m.weight_scale_2": torch.tensor(0.5),
    "m.input_scale": torch.tensor(3.0),
}


def without(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {one: tensor for one, tensor in tensors.items() if one != name}


@pytest.mark.parametrize("told", [NVFP4, {}])
def test_nvfp4_of_modelopt(told: Mapping[str, Any], decode_file: Decode) -> None:
    """Also where only hf_quant_config.json says so, as its older versions wrote it."""
    layout, decoded = decode_file(MODELOPT, told)
    assert decoded["m.weight"][0, :5].astype(float).tolist() == [0.5, 1, -6, -0.5, 0]
    assert layout.dropped == {"m.input_scale"}


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq(width: int, form: str, act_order: bool, decode_file: Decode) -> None:
    random = np.random.default_rng(width)
    columns, rows, group = 64, 32, 16
    codes = random.integers(0, 1 << width, (rows, columns))
    zeros = random.integers(0, 1 << width, (columns // group, rows))
    scales = random.random((columns // group, rows)).astype(np.float16)
    groups = np.arange(columns) // group
    if act_order:
        random.shuffle(groups)
    kept = zeros if form == "gptq_v2" else (zeros - 1) % (1 << width)
    tensors = {
        "m.qweight": pack(codes, width).T.contiguous(),
        "m.qzeros": pack(kept, width),
        "m.scales": torch.from_numpy(scales),
    }
    if act_order:
        tensors["m.g_idx"] = torch.from_numpy(groups.astype(np.int32))
    told = {
        "quant_method": "gptq",
        "bits": width,
        "group_size": group,
        "desc_act": act_order,
        "checkpoint_format": form,
    }
    _, decoded = decode_file(tensors, told, "float16")
    wanted = scales.astype(np.float64)[groups].T * (codes - zeros[groups].T)
    assert np.array_equal(bits(decoded["m.weight"]), bits(wanted.astype(np.float16)))


def test_awq(decode_file: Decode) -> None:
    random = np.random.default_rng(1)
    columns, rows, group = 48, 32, 16
    codes = random.integers(0, 16, (columns, rows))
    zeros = random.integers(0, 16, (columns // group, rows))
    scales = random.random((columns // group, rows)).astype(np.float16)

    def shuffled(values: np.ndarray) -> torch.Tensor:
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        blocks = values.reshape(len(values), -1, 8)[:, :, order]
        return pack(blocks.reshape(len(values), -1), 4)

    tensors = {
        "m.qweight": shuffled(codes),
        "m.qzeros": shuffled(zeros),
        "m.scales": torch.from_numpy(scales),
    }
    told = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    _, decoded = decode_file(tensors, told, "float16")
    spread = scales.astype(np.float64).repeat(group, 0) * (codes - zeros.repeat(group, 0))
    assert np.array_equal(bits(decoded["m.weight"]), bits(spread.T.astype(np.float16)))


def test_awq_for_single_tokens(decode_file: Decode) -> None:
    """AutoAWQ's GEMV layout: along the inputs, in order, groups filled up to whole words."""
    random = np.random.default_rng(1)
    rows, columns, group = 8, 48, 16
    codes = random.integers(0, 16, (rows, columns))
    zeros, scales = np.zeros((rows, 16), int), np.zeros((rows, 16), np.float16)
    zeros[:, :3] = random.integers(0, 16, (rows, 3))
    scales[:, :3] = random.random((rows, 3))
    tensors = {
        "m.qweight": pack(codes, 4),
        "m.qzeros": pack(zeros, 4),
        "m.scales": torch.from_numpy(scales),
    }
    told = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemv"}
    _, decoded = decode_file(tensors, told, "float16")
    wanted = np.empty((rows, columns), np.float16)
    for i in range(rows):
        for j in range(columns):
            g = j // group
            wanted[i, j] = np.float16(float(scales[i, g]) * int(codes[i, j] - zeros[i, g]))
    assert np.array_equal(bits(decoded["m.weight"]), bits(wanted))


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
def test_fp8_in_blocks(name: str, decode_file: Decode) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(40, 72, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 5, generator=generator)
    told = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    tensors = {"m.weight": codes, f"m.{name}": scale, "m.input_scale": torch.ones(1)}
    layout, decoded = decode_file(tensors, told)
    spread = scale.repeat_interleave(16, 0)[:40].repeat_interleave(16, 1)[:, :72]
    wanted = (codes.float() * spread).to(torch.bfloat16)
    assert np.array_equal(bits(decoded["m.weight"]), bits(wanted))
    assert layout.dropped == {"m.input_scale"}
    assert layout.owners() == {"m.weight": "m.weight", f"m.{name}": "m.weight"}


def test_mxfp4_as_transformers_decodes_it(decode_file: Decode) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(2)
    blocks = torch.randint(0, 256, (3, 8, 2, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(110, 132, (3, 8, 2), generator=generator).to(torch.uint8)
    tensors = {"e.gate_up_proj_blocks": blocks, "e.gate_up_proj_scales": scales}
    layout, decoded = decode_file(tensors, {"quant_method": "mxfp4"})
    wanted = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert layout.packed["e.gate_up_proj"].shape == tuple(wanted.shape)
    assert np.array_equal(bits(decoded["e.gate_up_proj"]), bits(wanted))


@pytest.mark.parametrize("name", ["mxfp4a16", "mxfp8"])
def test_scales_that_are_exponents(name: str, decode_file: Decode) -> None:
    """What compressed-tensors' own compressor writes, and reads."""
    scheme = QuantizationScheme.model_validate(
        {**PRESET_SCHEMES[name.upper()], "targets": ["Linear"]}
    )
    layout = infer_module_format(torch.nn.Linear, scheme)
    compressor = BaseCompressor.get_value_from_registry(layout.value)
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(4))
    weight[2] *= 1000
    groups = weight.reshape(6, 2, 32)
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    made = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    told = {"quant_method": "compressed-tensors", "format": layout.value}

    _, decoded = decode_file({f"m.{part}": one for part, one in made.items()}, told, "float32")

    wanted = compressor.decompress(made, scheme)["weight"].float()
    assert np.array_equal(decoded["m.weight"], wanted.numpy())
    assert 0 < float((wanted - weight).norm() / weight.norm()) < 0.15


def test_nvfp4(decode_file: Decode) -> None:
    generator = torch.Generator().manual_seed(3)
    packed = torch.randint(0, 256, (6, 16), generator=generator).to(torch.uint8)
    scale = (torch.rand(6, 2, generator=generator) * 4).to(torch.float8_e4m3fn)
    tensors = {"m.weight_packed": packed, "m.weight_scale": scale}
    tensors["m.weight_global_scale"] = torch.tensor([8.0])
    tensors["m.input_global_scale"] = torch.tensor([3.0])
    _, decoded = decode_file(tensors, {"quant_method": "compressed-tensors"}, "float32")
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    for i in range(6):
        for j in range(32):
            code = (int(packed[i, j // 2]) >> (4 * (j % 2))) & 15
            value = table[code & 7] * (-1 if code & 8 else 1) * float(scale[i, j // 16]) / 8
            assert decoded["m.weight"][i, j] == pytest.approx(value, rel=1e-6)


WORDS = {"m.qweight": torch.zeros(2, 2, dtype=torch.int32)}
COMPRESSED = {"quant_method": "compressed-tensors"}
FP8 = torch.zeros(40, 2).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("tensors", "told", "what"),
    [
        ({"m.weight": torch.zeros(2, 2)}, {"quant_method": "aqlm"}, "'aqlm', which cannot"),
        ({"m.weight": torch.zeros(2, 2).char()}, {"quant_method": "gptq"}, r"m\.weight \(I8\)"),
        (WORDS, {"quant_method": "awq"}, "missing"),
        (WORDS, {"quant_method": "awq", "version": "marlin"}, "marlin"),
        (WORDS, {"quant_method": "gptq", "checkpoint_format": "marlin"}, "marlin"),
        ({"m.weight": FP8}, {"quant_method": "fp8"}, "no scale"),
        (
            # Three blocks over 40 rows may be 14, 15 or 16 high.
            {"m.weight": FP8, "m.weight_scale_inv": torch.ones(3, 1)},
            {"quant_method": "fp8"},
            r"m\.weight cannot be dequantized",
        ),
        (
            {"m.qweight": torch.zeros(2, 8).int(), "m.qzeros": torch.zeros(1, 3).int()}
            | {"m.scales": torch.zeros(1, 8).half()},
            {"quant_method": "gptq", "bits": 4, "group_size": 16},
            r"m\.weight cannot be dequantized",
        ),
        *(
            (made | {name: torch.tensor([[127, 255]]).byte()}, COMPRESSED, r"m\.weight .* 255")
            for name, made in (
                ("m.weight_scale", {"m.weight": torch.zeros(1, 64).to(torch.float8_e4m3fn)}),
                ("m.weight_scale", {"m.weight_packed": torch.zeros(1, 32).byte()}),
            )
        ),
        (
            {"m.weight_blocks": torch.zeros(1, 1, 2, 16).byte()}
            | {"m.weight_scales": torch.tensor([[[127, 255]]]).byte()},
            {"quant_method": "mxfp4"},
            r"m\.weight .* 255",
        ),
        (
            # MXFP6, whose 64 columns take 48 bytes.
            {"m.weight_packed": torch.zeros(1, 48).byte()}
            | {"m.weight_scale": torch.full((1, 2), 127).byte()},
            COMPRESSED,
            "has not 4 bits per weight",
        ),
        ({}, {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "ModelOpt's 'W4A16_AWQ'"),
        (MODELOPT | {"m.pre_quant_scale": torch.ones(32)}, NVFP4, "m has a pre_quant_scale"),
        (MODELOPT | {"m.weight_scale": torch.ones(2, 4)}, NVFP4, "unsupported packed dtype"),
        (without(MODELOPT, "m.weight_scale"), NVFP4, "m.weight_scale is missing"),
        (without(MODELOPT, "m.weight_scale_2"), NVFP4, "is not part of a known modelopt"),
    ],
)
def test_what_cannot_be_decoded_is_refused(
    tensors: dict[str, torch.Tensor], told: dict[str, Any], what: str, decode_file: Decode
) -> None:
    with pytest.raises(InputRefused, match=what) as caught:
        decode_file(tensors, told)
    assert caught.value.hint
