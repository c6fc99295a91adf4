"""ModelOpt's FP8 and NVFP4: numbers by torch, names and configurations as ModelOpt 0.47 has them.

That vLLM's reader of
this layout puts each weight where it belongs is tested in tests/real/test_vllm_loads.py.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from weightsmith.core.errors import CheckFailed, InputRefused
from weightsmith.models.facts import read_facts
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers import formats, of_format
from weightsmith.quantizers.architectures import WALKED
from weightsmith.quantizers.calibration import GENERAL
from weightsmith.quantizers.layerwise.maxima import input_maxima
from weightsmith.quantizers.matrices import matrices
from weightsmith.quantizers.modelopt import ARCHITECTURES, LAYOUTS, quantize
from weightsmith.quantizers.packed import view_of
from weightsmith.quantizers.packed_check import check_checkpoint
from weightsmith.quantizers.quality.measure import measure

from tests.fakes.awkward import make
from tests.unit.quantizers.conftest import make_any, model_of

ROWS = [json.loads(line) for line in GENERAL.read_text("utf-8").splitlines()[:2]]
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
EXPORTED = {
    "fp8-modelopt": {
        "weight": ("float8_e4m3fn", 2), "weight_scale": ("float32", 0),
        "input_scale": ("float32", 0),
    },
    "nvfp4-modelopt": {
        "weight": ("uint8", 2), "weight_scale": ("float8_e4m3fn", 2),
        "weight_scale_2": ("float32", 0), "input_scale": ("float32", 0),
    },
}  # fmt: skip
"""Part of a matrix -> its dtype and number of dimensions."""
EIGHT = {"dynamic": False, "num_bits": 8, "type": "float"}
FOUR = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
TOLD = {
    "fp8-modelopt": (EIGHT, {"quant_algo": "FP8"}),
    "nvfp4-modelopt": (FOUR, {"quant_algo": "NVFP4", "group_size": 16}),
}
"""What config.json says of weights and inputs, and hf_quant_config.json of all."""
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@pytest.fixture
def model(tmp_path):
    return make(tmp_path / "model")


def written(name, model, out, keep=()):
    source = CheckpointTensors(model)
    inputs = {m.module: 3.0 * (1 + n) for n, m in enumerate(matrices(source, model))}
    quantize(formats()[name], model, out, keep, inputs)
    return inputs


def nearest(values):
    """Codes of float4_e2m1, two in a byte: the nearest value, of two the one with an even code."""
    far = (values.abs()[..., None].double() - E2M1).abs()
    best = far.amin(-1, keepdim=True)
    each = torch.arange(8) + 8 * (torch.arange(8) % 2)  # even codes first
    codes = torch.where(far == best, each, 99).amin(-1) % 8 + 8 * (values < 0)
    return (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)


@pytest.mark.parametrize("form", EXPORTED)
def test_codes_and_scales_are_those_of_the_formula(model, out, form):
    """Of all matrices that engines fuse, s = amax / 448, or amax / (6 * 448)."""
    inputs = written(form, model, out)
    largest = 448 if form == "fp8-modelopt" else 6 * 448

    plain, made = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    modules = sorted(name.removesuffix(".input_scale") for name in made if "input_scale" in name)
    assert modules == sorted(inputs)
    for module in modules:
        parent, _, name = module.rpartition(".")
        together = next((parts for parts in FUSED if name in parts), (name,))
        found = [f"{parent}.{one}" for one in together if f"{parent}.{one}" in inputs]
        amax = torch.stack([plain[f"{one}.weight"].float().abs().max() for one in found]).max()
        parts = {part: made[f"{module}.{part}"] for part in EXPORTED[form]}
        kinds = {p: (str(t.dtype).removeprefix("torch."), t.dim()) for p, t in parts.items()}
        assert kinds == EXPORTED[form]
        assert parts["input_scale"] == torch.tensor(max(inputs[one] for one in found)) / largest
        weight = plain[f"{module}.weight"].float()
        if form == "fp8-modelopt":
            assert parts["weight_scale"] == amax / largest
            codes = (weight / parts["weight_scale"]).clamp(-448, 448).to(torch.float8_e4m3fn)
            assert torch.equal(parts["weight"].float(), codes.float())
            continue
        assert parts["weight_scale_2"] == amax / largest
        groups = weight.reshape(len(weight), -1, 16)
        scales = groups.abs().amax(-1) / (6 * parts["weight_scale_2"])
        scales = torch.where(scales == 0, 1.0, scales).clamp(2**-9, 448).to(torch.float8_e4m3fn)
        assert torch.equal(parts["weight_scale"].float(), scales.float())
        values = groups / (scales.float() * parts["weight_scale_2"])[..., None]
        assert torch.equal(parts["weight"], nearest(values.reshape(weight.shape)))
    kept = plain.keys() - {f"{module}.weight" for module in modules}
    assert kept == {name for name in made if "norm" in name or "embed" in name}


@pytest.mark.parametrize("form", TOLD)
def test_both_configurations_are_as_modelopt_writes_them(model, out, form):
    written(form, model, out)
    type_, about = TOLD[form]

    told = json.loads((out / "config.json").read_text())["quantization_config"]
    beside = json.loads((out / "hf_quant_config.json").read_text())
    producer = told.pop("producer")
    group = {"input_activations": type_, "weights": type_, "targets": ["Linear"]}
    assert told == {
        "config_groups": {"group_0": group}, "ignore": ["lm_head"],
        "quant_algo": about["quant_algo"], "quant_method": "modelopt",
    }  # fmt: skip
    rest = {"kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    assert beside == {"producer": producer, "quantization": about | rest}
    assert producer["name"] == "modelopt"  # readers look for it
    assert read_facts(out).packing.kinds == {formats()[form].kind}


def test_what_stays_in_16_bits_is_told_in_both(model, out):
    written("fp8-modelopt", model, out, keep=["down_proj"])

    told = json.loads((out / "config.json").read_text())["quantization_config"]
    beside = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert told["ignore"] == beside["exclude_modules"]
    assert any(name.endswith("mlp.down_proj") for name in told["ignore"])
    check_checkpoint(out, model, LAYOUTS["fp8-modelopt"], ("down_proj",))


@pytest.mark.parametrize(
    ("architecture", "form", "most"),
    [
        *((one, "fp8-modelopt", 0.2) for one in sorted(ARCHITECTURES)),
        *((one, "nvfp4-modelopt", 0.45) for one in ("LlamaForCausalLM", "Qwen3MoeForCausalLM")),
    ],
)
def test_a_model_of_this_architecture_loses_little(tmp_path, architecture, form, most):
    model, out = make_any(tmp_path / "model", architecture), tmp_path / "out"
    out.mkdir()
    of_format(form).check_input(formats()[form], read_facts(model))
    found = matrices(CheckpointTensors(model), model)
    inputs = input_maxima(model, [str(row["text"]) for row in ROWS], found)

    quantize(formats()[form], model, out, [], inputs)

    check_checkpoint(out, model, LAYOUTS[form])
    loss = measure(model, view_of(out, model), ROWS[:1], 100, lambda *_: None)
    assert loss.kl_mean > 0
    assert 0 < loss.layer_error < most


def test_other_architectures_are_refused_with_what_works():
    for architecture in sorted(WALKED - ARCHITECTURES)[:3]:
        with pytest.raises(InputRefused, match="unsupported architecture") as refused:
            of_format("fp8-modelopt").check_input(formats()["fp8-modelopt"], model_of(architecture))
        assert "16 bits" in refused.value.hint


def test_rows_that_groups_do_not_divide_are_refused():
    model = model_of("LlamaForCausalLM", intermediate_size=1000)
    with pytest.raises(InputRefused, match=r"^nvfp4-modelopt .* and down_proj has 1000"):
        of_format("nvfp4-modelopt").check_input(formats()["nvfp4-modelopt"], model)


@pytest.mark.parametrize(
    ("part", "value", "why"),
    [
        ("self_attn.k_proj.weight_scale", 0.5, "relative error"),
        ("self_attn.k_proj.input_scale", 0.5, "different global scales"),
        ("mlp.down_proj.input_scale", 0.0, "no finite, positive input scale"),
        ("mlp.down_proj.weight_scale", float("nan"), "not finite and positive"),
        ("mlp.up_proj.weight", None, "relative error"),
    ],
)
def test_what_is_damaged_does_not_pass(model, out, part, value, why):
    written("fp8-modelopt", model, out)
    tensors = load_file(out / "model.safetensors")
    name = f"model.layers.0.{part}"
    if value is None:
        tensors[name] = tensors[name].view(torch.uint8).flip(0).view(torch.float8_e4m3fn)
    else:
        tensors[name] = torch.tensor(value)
    save_file(tensors, out / "model.safetensors")

    with pytest.raises(CheckFailed, match=why):
        check_checkpoint(out, model, LAYOUTS["fp8-modelopt"])


@pytest.mark.parametrize(
    ("part", "value", "why"),
    [
        ("self_attn.k_proj.weight_scale_2", 1e-3, "relative error"),
        ("self_attn.k_proj.input_scale", 0.5, "different global scales"),
        ("mlp.up_proj.weight", None, "relative error"),
        ("mlp.up_proj.weight_scale", None, "relative error"),
    ],
)
def test_what_is_damaged_in_four_bits_does_not_pass(model, out, part, value, why):
    written("nvfp4-modelopt", model, out)
    tensors = load_file(out / "model.safetensors")
    name = f"model.layers.0.{part}"
    flipped = tensors[name].view(torch.uint8).flip(0).view(tensors[name].dtype) if not value else 0
    tensors[name] = flipped if value is None else torch.tensor(value)
    save_file(tensors, out / "model.safetensors")

    with pytest.raises(CheckFailed, match=why):
        check_checkpoint(out, model, LAYOUTS["nvfp4-modelopt"])


@pytest.mark.parametrize("form", EXPORTED)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(model, out, form, value):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 3] = value
    save_file(tensors, model / "model.safetensors")

    with pytest.raises(InputRefused, match="NaN or infinite"):
        written(form, model, out)
