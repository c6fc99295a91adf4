"""Quantized checkpoints of our own making are read back, and broken ones are caught.

Also what may stay in 16 bits, and what engines are told of it.
"""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from weightsmith.core.errors import CheckFailed, InputRefused, UsageError
from weightsmith.core.values import FP8
from weightsmith.models.facts import read_facts
from weightsmith.quantizers.architectures import LLAMAS
from weightsmith.quantizers.checkpoints import (
    MATRICES,
    check_grouped,
    finish,
    group_size,
    grouped_config,
    is_kept,
    keep_option,
    kept_modules,
    negative_patterns,
)
from weightsmith.quantizers.packed import PackedLayout, PackedView
from weightsmith.quantizers.packed_check import check_checkpoint
from weightsmith.quantizers.rounding import round_rows
from weightsmith.quantizers.schemes import SCHEMES
from weightsmith.steps.sizes import disk_peak

from tests.fakes.configs import facts
from tests.fakes.packing import (
    CONFIG,
    GPTQ_CONFIG,
    GROUP,
    HIDDEN,
    SHAPES,
    four_bits,
    save_awq,
    save_gptq,
)
from tests.paths import ROOT

AWQ_LAYOUT = PackedLayout(method="awq", bits=4, group_size=GROUP, symmetric=False)
GPTQ_LAYOUT = PackedLayout(method="gptq", bits=4, group_size=GROUP, symmetric=True)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    weights = {"model.embed_tokens.weight": torch.randn(50, HIDDEN, generator=generator)}
    for layer in range(2):
        for name, shape in SHAPES.items():
            weights[f"model.layers.{layer}.{name}.weight"] = torch.randn(shape, generator=generator)
        weights[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(HIDDEN)
    save_file({k: v.to(torch.bfloat16) for k, v in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(params=["awq", "gptq"])
def made(request, model, tmp_path, out):
    awq = request.param == "awq"
    (save_awq if awq else save_gptq)(model, tmp_path / "raw")
    finish(model, tmp_path / "raw", out, grouped_config("awq", GROUP) if awq else GPTQ_CONFIG)
    return out, AWQ_LAYOUT if awq else GPTQ_LAYOUT


def test_a_sound_checkpoint_is_read_back_near_its_original(made, model):
    folder, layout = made
    found = check_checkpoint(folder, model, layout)
    assert found["quantized"] == 8
    assert 4.5 < found["bits_per_quantized_weight"] < 5.2
    assert 0.05 < found["weight_error"] < 0.15
    view = PackedView(folder)
    for name, weight in load_file(model / "model.safetensors").items():
        if "_proj" in name:
            q, zeros, scales = four_bits(weight, symmetric=layout.symmetric)
            expected = (q - zeros.repeat(GROUP, 0)) * scales.repeat(GROUP, 0)
            np.testing.assert_allclose(view.tensor(name), expected.T, rtol=1e-6)
        else:
            assert (torch.from_numpy(view.tensor(name)) == weight.float()).all()


@pytest.mark.parametrize(("start", "stop"), [(0, 8), (3, 29), (17, 18)])
def test_rows_are_those_of_the_whole_matrix(made, start, stop):
    view = PackedView(made[0])

    for name in view.names:
        rows = view.rows(name, start, stop)
        np.testing.assert_array_equal(rows, view.tensor(name)[start:stop])


def test_rows_of_a_matrix_whose_zero_points_are_packed_along_its_rows(tmp_path):
    random = np.random.default_rng(0)
    words = random.integers(0, 1 << 31, (24 + 3, 4)).astype(np.int32)
    save_file(
        {
            "a.weight_packed": torch.from_numpy(words[:24]),
            "a.weight_zero_point": torch.from_numpy(words[24:, :2].copy()),
            "a.weight_scale": torch.from_numpy(random.random((24, 2), np.float32)),
            "a.weight_shape": torch.tensor([24, 32]),
        },
        tmp_path / "model.safetensors",
    )
    weights = {"num_bits": 4, "group_size": 16, "symmetric": False}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": weights}},
    }
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    view = PackedView(tmp_path)

    whole = view.tensor("a.weight")
    for start, stop in ((0, 24), (3, 21), (16, 17)):
        np.testing.assert_array_equal(view.rows("a.weight", start, stop), whole[start:stop])
    first = (words[0, 0] & 15) - (words[24, 0] & 15)
    scale = load_file(tmp_path / "model.safetensors")["a.weight_scale"][0, 0]
    assert whole[0, 0] == pytest.approx(float(first * scale))


def test_what_is_not_quantized_keeps_its_type_and_the_tokenizer_its_bytes(made, model):
    folder, _ = made
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert (folder / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in CONFIG} == CONFIG
    files = {path.name for path in folder.iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json"}


def broken(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


FIRST = "model.layers.0.mlp.up_proj"
QUERY = "model.layers.0.self_attn.q_proj"


def reorder(tensors, name):
    tensors[name] = tensors[name].flip(0).contiguous()


def enlarge_groups(tensors):
    for end in (".scales", ".qzeros"):
        tensors[FIRST + end] = tensors[FIRST + end][:1].contiguous()


OFF = "relative error|outputs are scaled"
NORM, EMBEDDING = "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t[QUERY + ".scales"].mul_(torch.linspace(0.05, 4, HIDDEN).half()), OFF),
        (lambda t: t[FIRST + ".qweight"].zero_(), OFF),
        (lambda t: reorder(t, FIRST + ".qweight"), OFF),
        (lambda t: t[FIRST + ".scales"][0].fill_(float("nan")), "scales that are not"),
        (lambda t: t[FIRST + ".scales"][0].fill_(-1.0), "scales that are not"),
        (enlarge_groups, "groups"),
        (lambda t: t[NORM].fill_(float("inf")), "NaN or infinite"),
        (lambda t: t[EMBEDDING].mul_(2), "was unexpectedly changed"),
    ],
)
def test_a_broken_quantization_is_caught(made, model, what, change):
    folder, layout = made
    broken(folder, change)
    with pytest.raises(CheckFailed, match=what):
        check_checkpoint(folder, model, layout)


def put_back(folder, model, factor=1.0):
    """Store FIRST in 16 bits again, with each input scaled by up to `factor`."""
    original = load_file(model / "model.safetensors")[FIRST + ".weight"]
    scale = torch.linspace(1, factor, HIDDEN)

    def change(tensors):
        for end in (".qweight", ".qzeros", ".scales"):
            tensors.pop(FIRST + end, None)
        tensors[FIRST + ".weight"] = (original.float() * scale).to(torch.bfloat16)

    broken(folder, change)


def test_what_is_kept_is_the_checkpoint_s(made, model):
    (folder, layout), kept = made, ("layers.0.mlp.up_proj",)
    changed = r"up_proj\.weight was unexpectedly changed"
    with pytest.raises(CheckFailed, match="is unexpectedly quantized"):
        check_checkpoint(folder, model, layout, kept)
    put_back(folder, model)
    assert check_checkpoint(folder, model, layout, kept)["quantized"] == 7
    with pytest.raises(CheckFailed, match="is not quantized"):
        check_checkpoint(folder, model, layout)
    other = PackedLayout(method="awq", bits=4, group_size=128, symmetric=False)
    with pytest.raises(CheckFailed, match="has layout"):
        check_checkpoint(folder, model, other)

    broken(folder, lambda tensors: reorder(tensors, FIRST + ".weight"))
    with pytest.raises(CheckFailed, match=changed):
        check_checkpoint(folder, model, layout, kept)
    put_back(folder, model, factor=3)
    if layout.method == "awq":  # it alone may scale inputs
        assert check_checkpoint(folder, model, layout, kept)["quantized"] == 7
        return
    with pytest.raises(CheckFailed, match=changed):
        check_checkpoint(folder, model, layout, kept)


def test_scales_moved_between_layers_are_no_fault(model, tmp_path, out):
    """AWQ multiplies inputs of one matrix and outputs of the one before it."""
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    weights = load_file(moved / "model.safetensors")
    scale = torch.linspace(0.25, 4, HIDDEN)
    for name in weights:
        if name.endswith("up_proj.weight"):
            weights[name] = (weights[name].float() * scale).to(torch.bfloat16)
    save_file(weights, moved / "model.safetensors")
    raw = tmp_path / "raw"
    save_awq(moved, raw)
    finish(model, raw, out, grouped_config("awq", GROUP))
    assert check_checkpoint(out, model, AWQ_LAYOUT)["weight_error"] < 0.25


def test_rounding_to_eight_bits_is_torch_s_own():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    weight[3] = 0
    codes, scale = round_rows(weight.numpy(), SCHEMES["w8a8"])
    expected = weight.abs().amax(1, keepdim=True) / 127
    expected[3] = 1
    assert (torch.from_numpy(scale) == expected).all()
    assert (torch.from_numpy(codes) == (weight / expected).round().to(torch.int8)).all()


def test_a_quantized_matrix_under_its_own_name_keeps_its_type(model, tmp_path, out):
    raw = tmp_path / "raw"
    raw.mkdir()
    made = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if "_proj" in name:
            scale = weight.float().abs().max() / 448
            made[name] = (weight.float() / scale).to(torch.float8_e4m3fn)
            made[name + "_scale"] = scale.reshape(1)
        else:
            made[name] = weight.float()
    save_file(made, raw / "model.safetensors")
    finish(model, raw, out, SCHEMES["fp8"].config([]))
    layout = PackedLayout(method="float-quantized", bits=8, group_size=0, symmetric=True)
    assert check_checkpoint(out, model, layout)["bits_per_quantized_weight"] < 8.1


def test_the_group_size_is_the_largest_that_divides_every_row_of_a_model_that_fits():
    changes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
    smollm2 = facts({**CONFIG, **changes})
    assert group_size(smollm2, "auto") == 64
    assert group_size(smollm2, 32) == 32
    with pytest.raises(InputRefused, match="size 128 does not divide the 576 inputs of q_proj"):
        group_size(smollm2, 128)
    with pytest.raises(InputRefused, match="does not divide"):
        group_size(facts({**CONFIG, "intermediate_size": 100}), "auto")
    with pytest.raises(InputRefused, match="already quantized"):
        check_grouped(facts({**CONFIG, "quantization_config": {"quant_method": "gptq"}}), LLAMAS)
    with pytest.raises(InputRefused, match="no architectures"):
        check_grouped(facts({**CONFIG, "architectures": []}), LLAMAS)


def test_the_planned_disk_is_what_rounding_takes(tmp_path, out):
    tiny, settings = ROOT / "examples" / "tiny" / "base", tmp_path / "settings.json"
    told = {"method": "fp8", "model": str(tiny), "out": str(out), "keep": []}
    settings.write_text(json.dumps(told), "utf-8")
    module = "weightsmith.worker.quantize_rounded"
    subprocess.run([sys.executable, "-m", module, str(settings)], check=True)
    taken = sum(file.stat().st_size for file in out.iterdir())
    size = sum(file.stat().st_size for file in tiny.iterdir())
    planned = disk_peak(size, FP8, read_facts(tiny), {})
    assert taken <= planned < 1.05 * taken


ATTENTION = ("q_proj", "k_proj", "v_proj")


def test_names_are_sorted_and_lm_head_is_kept_anyhow():
    assert keep_option({"keep": ("o_proj", "down_proj", "lm_head")}) == ["down_proj", "o_proj"]
    assert keep_option({}) == []
    assert keep_option({"keep": ATTENTION}) == sorted(ATTENTION)


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        (("proj",), "'proj' is not the suffix"),
        (("mlp",), "not the suffix"),
        (("xdown_proj",), "not the suffix"),
        (("q_proj",), "q_proj is listed without k_proj, v_proj"),
        (("layers.1.mlp.up_proj", "gate_proj"), "without"),
        (MATRICES, "nothing would be quantized"),
    ],
)
def test_what_cannot_be_kept_is_refused(keep, says):
    with pytest.raises(UsageError, match=says):
        keep_option({"keep": keep})


def test_ends_match_at_dots_alone():
    assert is_kept("model.layers.1.mlp.down_proj", ["layers.1.mlp.down_proj"])
    assert not is_kept("model.layers.11.mlp.down_proj", ["1.mlp.down_proj"])
    assert not is_kept("model.layers.0.mlp.xdown_proj", ["down_proj"])
    assert not is_kept("model.layers.0.mlp.down_proj", [])


def test_kept_modules_are_those_of_the_checkpoint(tmp_path):
    names = [f"model.layers.{i}.{m}.weight" for i in (0, 1) for m in ("mlp.down_proj", "x.o_proj")]
    tensors = {n: torch.zeros(1) for n in (*names, "down_proj.weight")}
    save_file(tensors, tmp_path / "model.safetensors")

    kept = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert kept_modules(tmp_path, ["down_proj"]) == kept


def test_engines_are_configured_for_what_they_put_together():
    """As vLLM asks: `re.match` of each expression against the name of the fused matrix."""
    patterns = [p.removeprefix("-:") for p in negative_patterns(["down_proj", *sorted(ATTENTION)])]

    def left_out(module):
        return any(re.match(pattern, module) for pattern in patterns)

    assert left_out("model.layers.3.self_attn.qkv_proj")
    assert left_out("model.layers.3.self_attn.q_proj")
    assert left_out("model.layers.3.mlp.down_proj")
    assert not left_out("model.layers.3.mlp.gate_up_proj")
    assert not left_out("model.layers.3.mlp.down_proj.lora_A")
    one = negative_patterns(["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"])
    assert any(re.match(p[2:], "model.layers.0.mlp.gate_up_proj") for p in one)
    assert not any(re.match(p[2:], "model.layers.10.mlp.gate_up_proj") for p in one)
