"""ModelOpt's FP8, NVFP4 and AWQ: numbers by torch, names and configurations as in ModelOpt 0.47.

That vLLM's reader of
this layout puts each weight where it belongs is tested in tests/real/test_vllm_loads.py.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from weightsmith.core.errors import CheckFailed, InputRefused, UsageError
from weightsmith.models.facts import read_facts
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers import formats, of_format
from weightsmith.quantizers.architectures import WALKED
from weightsmith.quantizers.calibration import GENERAL
from weightsmith.quantizers.layerwise import quantizing
from weightsmith.quantizers.layerwise.maxima import input_maxima
from weightsmith.quantizers.matrices import matrices
from weightsmith.quantizers.modelopt import ARCHITECTURES, LAYOUTS, quantize
from weightsmith.quantizers.packed import PackedLayout, PackedView, view_of
from weightsmith.quantizers.packed_check import check_checkpoint
from weightsmith.quantizers.quality.measure import measure
from weightsmith.quantizers.running import ProgramSettings
from weightsmith.serving import engines
from weightsmith.serving.compatibility import check_support

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


AWQ = formats()["awq-modelopt"]
CODES = torch.tensor([
    [-8, 6, 7, 5, 7, -2, -8, 1], [-8, -4, -1, 6, 7, -8, 6, -8], [-8, 4, 7, -7, 7, -1, -8, 3],
    [-8, 5, 3, -7, 7, 6, -4, -2], [-8, -6, 6, 1, 7, 2, 1, 1], [-8, -7, -6, -1, 7, 6, -3, 2],
])  # fmt: skip
SCALES = torch.tensor([[0.5, 0.25]]) * torch.tensor([[1], [2], [0.125], [1], [4], [1]])
PACKED = torch.tensor([
    [136, 198, 247, 101, 119, 142, 104, 129], [136, 84, 55, 153, 119, 111, 200, 227],
    [136, 154, 166, 241, 119, 98, 209, 33],
])  # fmt: skip
"""What pack_int4_in_uint8 of ModelOpt 0.47 returns for CODES times SCALES, in groups of four."""


def test_awqs_integers_have_modelopts_bytes_and_are_read_back(tmp_path):
    values = CODES * SCALES.repeat_interleave(4, 1)
    grid = quantizing.Grid(SCALES, torch.full_like(SCALES, 8))

    made = quantizing.packed_modelopt(grid, values)

    assert torch.equal(made["weight"], PACKED.to(torch.uint8))
    factors = torch.arange(8) / 4 + 0.5
    name = "model.layers.0.mlp.down_proj"
    named = {f"{name}.{part}": one for part, one in made.items()}
    save_file({**named, f"{name}.pre_quant_scale": factors}, tmp_path / "model.safetensors")
    told = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 4}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": told}))
    view = PackedView(tmp_path)
    for start, stop in ((0, None), (1, 4), (3, 6), (2, 3)):
        found = torch.from_numpy(view.matrix(name, start, stop))
        assert torch.equal(found, (values * factors)[start:stop])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_an_awq_checkpoint_is_as_modelopt_exports_it(tmp_path, out, architecture):
    model = make_any(tmp_path / "model", architecture, hidden=256)
    of_format(AWQ.name).check_input(AWQ, read_facts(model))
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({**row, "tokens": 1}) + "\n" for row in ROWS))

    quantizing.quantize(
        ProgramSettings(
            model=model, out=out, calibration=str(texts), method=AWQ.kind, group_size=64
        )
    )

    layout = PackedLayout(method=AWQ.kind, bits=4, group_size=64, symmetric=True)
    check_checkpoint(out, model, layout)
    plain, made = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    for module in sorted(n.removesuffix(".weight_scale") for n in made if "weight_scale" in n):
        outputs, inputs = plain[f"{module}.weight"].shape
        parts = {n.rpartition(".")[2]: t for n, t in made.items() if n.startswith(f"{module}.")}
        parts.pop("bias", None)
        if module.endswith(("o_proj", "down_proj")):  # the others are fused
            assert torch.equal(parts.pop("pre_quant_scale"), torch.ones(inputs).bfloat16())
        kinds = {part: (str(t.dtype), tuple(t.shape)) for part, t in parts.items()}
        assert kinds == {
            "weight": ("torch.uint8", (outputs // 2, inputs)),
            "weight_scale": ("torch.float32", (outputs, inputs // 64)),
        }
        # TensorRT-LLM casts scales to the model's type.
        assert torch.equal(parts["weight_scale"], parts["weight_scale"].bfloat16().float())
    beside = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert beside == {
        "quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": None, "group_size": 64,
        "has_zero_point": False, "pre_quant_scale": True, "exclude_modules": ["lm_head"],
    }  # fmt: skip
    assert read_facts(out).packing.kinds == {AWQ.kind}
    loss = measure(model, view_of(out, model), ROWS[:1], 100, lambda *_: None)
    assert loss.kl_mean > 0
    assert 0 < loss.layer_error < 0.35


def test_groups_without_a_kernel_are_refused():
    quantizer, model = of_format(AWQ.name), model_of("LlamaForCausalLM", intermediate_size=1056)
    with pytest.raises(InputRefused, match="groups of 64 or 128 weights"):
        quantizer.check_input(AWQ, model)
    with pytest.raises(UsageError, match="no kernel for groups of 32"):
        quantizer.options(AWQ, {"group_size": 32})
    assert quantizer.options(AWQ, {"group_size": 64})["group_size"] == 64


@pytest.mark.parametrize(
    ("device", "why"),
    [
        ("nvidia-a100-80gb", ""), ("nvidia-b300", ""),
        ("nvidia-rtx-5090", "no kernel for it on compute capability 12.0"),
        ("nvidia-gb10", "no kernel for it on compute capability 12.1"),
    ],
)  # fmt: skip
def test_awq_is_refused_on_gpus_without_a_kernel(device, why):
    if not why:
        check_support(engines()["trtllm"], AWQ, device)
        return
    with pytest.raises(InputRefused, match=why):
        check_support(engines()["trtllm"], AWQ, device)
