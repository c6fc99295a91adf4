"""Formats without calibration: compressed-tensors itself makes and reads the same numbers.

What the writer reads and refuses, and interrupts. The check has a rule of its own: a wrong one of
the writer's does not pass.
"""

import json
import re
import tracemalloc
from collections import Counter
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
from safetensors.torch import load, load_file, save_file
from weightsmith.core.errors import CheckFailed, EnvironmentFailure, InputRefused
from weightsmith.core.kernels import library
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers import matrices, rounded, writing
from weightsmith.quantizers.packed import PackedLayout, view_of
from weightsmith.quantizers.packed_check import check_checkpoint
from weightsmith.quantizers.rounded import quantize as write
from weightsmith.quantizers.rounding import fused_scale, round_rows
from weightsmith.quantizers.schemes import SCHEMES

from tests.fakes.awkward import SIZES, awkward, damage_half, make
from tests.fakes.decoders import make_sparse


# w8a8 has no -128 here.
@pytest.mark.parametrize("name", [n for n, one in SCHEMES.items() if n != "w8a8" and not one.tops])
@pytest.mark.parametrize("shape", [(128, 128), (200, 160), (7, 96)])
def test_codes_and_scales_are_those_of_compressed_tensors(name, shape):
    scheme, weight = SCHEMES[name], awkward(*shape)
    config = QuantizationConfig.model_validate(scheme.config([]))
    args, x = config.config_groups["group_0"].weights, torch.from_numpy(weight)
    height, width = scheme.tile[0], scheme.tile[1] or weight.shape[1]
    padded = torch.nn.functional.pad(x, (0, -weight.shape[1] % width, 0, -weight.shape[0] % height))
    tiles = padded.reshape(padded.shape[0] // height, height, padded.shape[1] // width, width)
    shared = generate_gparam(x.amin(), x.amax()) if scheme.fused_scale else None
    scales, _ = calculate_qparams(tiles.amin((1, 3)), tiles.amax((1, 3)), args, shared)
    codes = quantize(x, scales, None, args, global_scale=shared)

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


@pytest.mark.parametrize("shape", [(128, 128), (7, 96)])
def test_of_four_and_six_the_one_that_loses_less_is_chosen(shape):
    """compressed-tensors rounds with both scales; each group has the bytes of the better one."""
    scheme, weight = SCHEMES["nvfp4a16-4o6"], awkward(*shape)
    weight[3, :32] = 0.02 * np.arange(1, 33) / 32  # near the largest, where 6 loses
    config = QuantizationConfig.model_validate(scheme.config([]))
    args, x = config.config_groups["group_0"].weights, torch.from_numpy(weight)
    shared = generate_gparam(x.amin(), x.amax())
    groups = x.reshape(shape[0], -1, 16)
    made = []
    for factor in (1.0, 1.5):
        ends = groups.amin(-1) * factor, groups.amax(-1) * factor
        scales, _ = calculate_qparams(*ends, args, shared)
        scales = scales.clamp(max=448)
        codes = quantize(x, scales, None, args, global_scale=shared)
        read = dequantize(codes, scales, args=args, global_scale=shared, dtype=torch.float32)
        error = (read - x).double().square().reshape(groups.shape).sum(-1).numpy()
        made.append((pack_fp4_to_uint8(codes).numpy(), scales.numpy(), error))

    most = fused_scale(float(np.abs(weight).max()), scheme)
    ours, ours_scales = round_rows(weight, scheme, most)

    four = made[1][2] < made[0][2]
    sure = ~np.isclose(made[0][2], made[1][2], rtol=1e-4, atol=0) | (made[0][2] == made[1][2])
    assert 0.2 < four.mean() < 0.8
    assert sure.mean() > 0.9
    each = np.repeat(four, 8, 1), np.repeat(sure, 8, 1)
    wanted = np.where(each[0], made[1][0], made[0][0])
    np.testing.assert_array_equal(ours[each[1]], wanted[each[1]])
    scales = np.where(four, made[1][1], made[0][1])
    np.testing.assert_array_equal(ours_scales.astype(np.float32)[sure], scales[sure])


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
        elif scale.dtype == torch.uint8:
            scale = compressor._decompress_scale(scale)
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


@pytest.fixture
def whole(model, tmp_path):
    """The model in nvfp4a16, written in one go."""
    (tmp_path / "whole").mkdir()
    write(SCHEMES["nvfp4a16"], model, tmp_path / "whole", [])
    return (tmp_path / "whole" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("room", "times"), [(1 << 20, 1), (100_000, 2), (0, 2)])
def test_rows_are_read_once_where_they_fit_into_memory(model, out, whole, monkeypatch, room, times):
    """A scale that matrices share needs all of their rows before the first one is rounded."""
    monkeypatch.setattr(rounded, "KEPT_ROWS", room)
    monkeypatch.setattr(rounded, "_BLOCK", 1 << 12)
    read = counting(monkeypatch)
    write(SCHEMES["nvfp4a16"], model, out, [])

    assert max(read[name] / size for name, size in SIZES.items()) <= times
    assert (sum(read[name] for name in SIZES) > sum(SIZES.values())) == (times == 2)
    assert (out / "model.safetensors").read_bytes() == whole


def counting(monkeypatch):
    """Count the bytes of each tensor that are read from now on."""
    read: Counter[str] = Counter()
    raw = CheckpointTensors.raw

    def counted(self, name, *where):
        found = raw(self, name, *where)
        read[name] += found.size
        return found

    monkeypatch.setattr(CheckpointTensors, "raw", counted)
    return read


@pytest.mark.parametrize("missing", ["none", "k_proj"])
def test_rows_are_read_once_where_the_largest_weights_are_recorded(
    model, out, whole, monkeypatch, missing
):
    known = {name: most for name, most in recorded(model).items() if missing not in name}
    monkeypatch.setattr(rounded, "KEPT_ROWS", 0)
    monkeypatch.setattr(rounded, "_BLOCK", 1 << 12)
    read = counting(monkeypatch)
    write(SCHEMES["nvfp4a16"], model, out, [], recorded=known)

    for name, size in SIZES.items():
        assert read[name] == (1 if name in known else 2) * size, name
    assert (out / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_a_weight_that_was_recorded_wrongly_is_an_error(model, out, factor):
    """Too small a scale would cut weights off, too large a one would waste codes."""
    known = recorded(model)
    known["model.layers.0.self_attn.v_proj.weight"] *= factor

    with pytest.raises(EnvironmentFailure, match=r"largest weight of .*v_proj"):
        write(SCHEMES["nvfp4a16"], model, out, [], recorded=known)
    assert not list(out.glob("*.safetensors"))


def recorded(model):
    """Return the largest magnitude of each matrix, as a merge records it."""
    tensors = load_file(model / "model.safetensors")
    return {name: float(tensors[name].abs().max()) for name in SIZES}


@pytest.mark.slow
def test_a_large_embedding_is_compared_in_little_memory(model, out):
    """The job's limit does not grow with the model."""
    name, size = "model.embed_tokens.weight", 1 << 26
    tensors = load_file(model / "model.safetensors")
    width = tensors[name].shape[1]
    tensors[name] = torch.ones((size // 2 // width, width), dtype=torch.bfloat16)
    save_file(tensors, model / "model.safetensors")
    scheme = SCHEMES["fp8"]
    write(scheme, model, out, [])

    tracemalloc.start()
    try:
        check_checkpoint(out, model, PackedLayout.of_scheme(scheme), ())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < size // 2
    tensors = load_file(out / "model.safetensors")
    tensors[name][-1, -1] = 2
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(CheckFailed, match="unexpectedly changed"):
        check_checkpoint(out, model, PackedLayout.of_scheme(scheme), ())


@pytest.mark.parametrize(("room", "threads"), [(1 << 20, 2), (100_000, 5), (0, 16)])
def test_several_threads_write_the_same_file(model, out, whole, monkeypatch, room, threads):
    """Matrices that share a scale are one thread's, or two would read their rows for it."""
    monkeypatch.setattr(rounded, "KEPT_ROWS", room)
    monkeypatch.setattr(rounded, "_BLOCK", 1 << 12)
    read = counting(monkeypatch)
    write(SCHEMES["nvfp4a16"], model, out, [], threads=threads)

    assert (out / "model.safetensors").read_bytes() == whole
    assert max(read[name] / size for name, size in SIZES.items()) <= (1 if room > 1 << 17 else 2)


def test_an_error_of_one_thread_ends_all(model, out):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 3] = np.nan
    save_file(tensors, model / "model.safetensors")

    with pytest.raises(InputRefused, match=r"down_proj.* has NaN or infinite weights"):
        write(SCHEMES["fp8"], model, out, [], threads=3)
    assert not list(out.glob("*.safetensors"))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shard_bytes", [1 << 14, 1 << 16])
def test_shards_hold_the_same_tensors_and_a_killed_run_goes_on(
    model, out, whole, monkeypatch, shard_bytes, threads
):
    scheme = SCHEMES["nvfp4a16"]
    monkeypatch.setattr(writing, "SHARD_BYTES", shard_bytes)
    calls = []

    def failing(*given):
        calls.append(given)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return round_rows(*given)

    monkeypatch.setattr(rounded, "round_rows", failing)
    with pytest.raises(KeyboardInterrupt):
        write(scheme, model, out, [], threads=threads)
    finished = {path: path.stat().st_mtime_ns for path in out.glob("model-*")}
    assert finished
    assert not (out / "model.safetensors.index.json").exists()

    write(scheme, model, out, [], threads=threads)

    assert all(path.stat().st_mtime_ns == when for path, when in finished.items())
    assert sorted(path.name for path in out.iterdir() if path.name.startswith(".")) == []
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load(whole)
    assert index.keys() == tensors.keys()
    for shard in set(index.values()):
        for name, value in load_file(out / shard).items():
            assert index[name] == shard
            assert torch.equal(value.view(torch.uint8), tensors[name].view(torch.uint8))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", SCHEMES)
def test_weights_that_are_not_finite_are_refused(model, out, name, value):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 3] = value
    save_file(tensors, model / "model.safetensors")

    with pytest.raises(InputRefused, match=r"down_proj.* has NaN or infinite weights"):
        write(SCHEMES[name], model, out, [])


def test_a_name_in_keep_that_matches_nothing_is_refused(model, tmp_path):
    with pytest.raises(InputRefused, match=r"no matrix has a name that ends in 'layers\.7\.mlp"):
        write(SCHEMES["fp8"], model, tmp_path, ["layers.7.mlp.down_proj"])


FP8 = SCHEMES["fp8"]


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return make_sparse(tmp_path_factory.mktemp("models"), "Qwen2MoeForCausalLM")


@pytest.mark.parametrize(
    ("names", "odd"),
    [
        (r"[qkv]_proj|\w+_proj(?<!o_proj)", r"0\.self_attn\.o_proj\.weight stays in 16 bits"),
        (r"\w+_proj|gate", r"1\.mlp\.gate\.weight is quantized"),
        (r"\w+_proj|shared_expert_gate", r"1\.mlp\.shared_expert_gate\.weight is quantized"),
    ],
)
def test_a_wrong_rule_of_the_writer_is_found(experts, tmp_path, monkeypatch, names, odd):
    write(FP8, experts, tmp_path, [])
    check_checkpoint(tmp_path, experts, PackedLayout.of_scheme(FP8))

    rule = re.compile(rf"(?P<parent>.+)\.(?P<name>{names})\.weight")
    monkeypatch.setattr(matrices, "_PLAIN", rule)
    write(FP8, experts, tmp_path, [])

    with pytest.raises(CheckFailed, match=rf"model\.layers\.{odd}, against what is known"):
        check_checkpoint(tmp_path, experts, PackedLayout.of_scheme(FP8))


def test_a_wrong_rule_for_stacks_is_found(tmp_path, out, monkeypatch):
    experts = make_sparse(tmp_path / "experts", "GraniteMoeForCausalLM")
    rule = matrices._STACKED.pattern.replace(r"|output_linear\.weight", "")
    assert rule != matrices._STACKED.pattern
    monkeypatch.setattr(matrices, "_STACKED", re.compile(rule))
    write(FP8, experts, out, [])

    with pytest.raises(CheckFailed, match=r"output_linear\.weight stays in 16 bits"):
        check_checkpoint(out, experts, PackedLayout.of_scheme(FP8))
