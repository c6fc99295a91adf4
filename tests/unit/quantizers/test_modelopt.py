"""ModelOpt's FP8: numbers by torch, names and configurations as ModelOpt 0.47 wrote them.

`EXPORTED` is what its export_hf_checkpoint made of a small Llama on a CPU. That vLLM's reader of
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
from weightsmith.quantizers.modelopt import ARCHITECTURES, LAYOUT, quantize
from weightsmith.quantizers.packed import view_of
from weightsmith.quantizers.packed_check import check_checkpoint
from weightsmith.quantizers.quality.measure import measure

from tests.fakes.awkward import make
from tests.unit.quantizers.conftest import make_any, model_of

ROWS = [json.loads(line) for line in GENERAL.read_text("utf-8").splitlines()[:2]]
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
EXPORTED = {
    "weight": ("float8_e4m3fn", 2), "weight_scale": ("float32", 0), "input_scale": ("float32", 0),
}  # fmt: skip
"""Part of a matrix -> its dtype and number of dimensions."""
IN_CONFIG = {
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
            "weights": {"dynamic": False, "num_bits": 8, "type": "float"},
            "targets": ["Linear"],
        }
    },
    "ignore": ["lm_head"],
    "quant_algo": "FP8",
    "quant_method": "modelopt",
}
BESIDE = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
"""`quantization` in hf_quant_config.json."""


@pytest.fixture
def model(tmp_path):
    return make(tmp_path / "model")


def written(model, out, keep=(), most=3.0):
    source = CheckpointTensors(model)
    inputs = {m.module: most * (1 + n) for n, m in enumerate(matrices(source, model))}
    quantize(model, out, keep, inputs)
    return inputs


def test_codes_and_scales_are_those_of_the_formula(model, out):
    """weight = round(w / s) with s = amax / 448, of all matrices that engines fuse."""
    inputs = written(model, out)

    plain, made = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    modules = sorted(name.removesuffix(".input_scale") for name in made if "input_scale" in name)
    assert modules == sorted(inputs)
    for module in modules:
        parent, _, name = module.rpartition(".")
        together = next((parts for parts in FUSED if name in parts), (name,))
        found = [f"{parent}.{one}" for one in together if f"{parent}.{one}" in inputs]
        amax = torch.stack([plain[f"{one}.weight"].float().abs().max() for one in found]).max()
        parts = {part: made[f"{module}.{part}"] for part in EXPORTED}
        kinds = {p: (str(t.dtype).removeprefix("torch."), t.dim()) for p, t in parts.items()}
        assert kinds == EXPORTED
        assert parts["weight_scale"] == amax / 448
        assert parts["input_scale"] == torch.tensor(max(inputs[one] for one in found)) / 448
        exact = (plain[f"{module}.weight"].float() / parts["weight_scale"]).clamp(-448, 448)
        assert torch.equal(parts["weight"].float(), exact.to(torch.float8_e4m3fn).float())
    kept = plain.keys() - {f"{module}.weight" for module in modules}
    assert kept == {name for name in made if "norm" in name or "embed" in name}


def test_both_configurations_are_as_modelopt_writes_them(model, out):
    written(model, out)

    told = json.loads((out / "config.json").read_text())["quantization_config"]
    beside = json.loads((out / "hf_quant_config.json").read_text())
    producer = told.pop("producer")
    assert told == IN_CONFIG
    assert beside == {"producer": producer, "quantization": BESIDE}
    assert producer["name"] == "modelopt"  # readers look for it
    assert read_facts(out).packing.kinds == {"modelopt-fp8"}


def test_what_stays_in_16_bits_is_told_in_both(model, out):
    written(model, out, keep=["down_proj"])

    told = json.loads((out / "config.json").read_text())["quantization_config"]
    beside = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert told["ignore"] == beside["exclude_modules"]
    assert any(name.endswith("mlp.down_proj") for name in told["ignore"])
    check_checkpoint(out, model, LAYOUT, ("down_proj",))


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_model_of_this_architecture_loses_little(tmp_path, architecture):
    model, out = make_any(tmp_path / "model", architecture), tmp_path / "out"
    out.mkdir()
    of_format("fp8-modelopt").check_input(formats()["fp8-modelopt"], read_facts(model))
    found = matrices(CheckpointTensors(model), model)

    quantize(model, out, [], input_maxima(model, [str(row["text"]) for row in ROWS], found))

    check_checkpoint(out, model, LAYOUT)
    loss = measure(model, view_of(out, model), ROWS[:1], 100, lambda *_: None)
    assert loss.kl_mean > 0
    assert 0 < loss.layer_error < 0.2


def test_other_architectures_are_refused_with_what_works():
    for architecture in sorted(WALKED - ARCHITECTURES)[:3]:
        with pytest.raises(InputRefused, match="unsupported architecture") as refused:
            of_format("fp8-modelopt").check_input(formats()["fp8-modelopt"], model_of(architecture))
        assert "16 bits" in refused.value.hint


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
    written(model, out)
    tensors = load_file(out / "model.safetensors")
    name = f"model.layers.0.{part}"
    if value is None:
        tensors[name] = tensors[name].view(torch.uint8).flip(0).view(torch.float8_e4m3fn)
    else:
        tensors[name] = torch.tensor(value)
    save_file(tensors, out / "model.safetensors")

    with pytest.raises(CheckFailed, match=why):
        check_checkpoint(out, model, LAYOUT)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(model, out, value):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 3] = value
    save_file(tensors, model / "model.safetensors")

    with pytest.raises(InputRefused, match="NaN or infinite"):
        written(model, out)
