"""AWQ and GPTQ layer by layer: every architecture, experts, what is kept, and going on.

Four-bit integers: grids, layouts, rounding that makes up for its errors, AWQ searches.
"""

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from weightsmith.building.targets import all_targets
from weightsmith.core.errors import InputRefused
from weightsmith.forward.layers import Layers
from weightsmith.models.facts import read_facts
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers import formats, of_format
from weightsmith.quantizers.architectures import GROUPED, SCANNING
from weightsmith.quantizers.autoawq import best_clip, patch_searches
from weightsmith.quantizers.calibration import GENERAL
from weightsmith.quantizers.layerwise import quantizing
from weightsmith.quantizers.layerwise.observing import Observer
from weightsmith.quantizers.layerwise.quantizing import (
    best_grid,
    compensated,
    packed_awq,
    packed_gptq,
    scale_layer,
    unexplained,
)
from weightsmith.quantizers.packed import PackedLayout, PackedView, view_of
from weightsmith.quantizers.packed_check import check_checkpoint
from weightsmith.quantizers.quality.measure import measure
from weightsmith.quantizers.running import ProgramSettings

from tests.fakes.configs import LLAMA_8B, facts
from tests.fakes.decoders import make_dense
from tests.unit.quantizers.conftest import make_any

ROWS = [json.loads(line) for line in GENERAL.read_text("utf-8").splitlines()[:3]]
CELLS = [(name, method) for name in sorted(GROUPED) for method in ("awq", "gptq")]
MOST = 0.35
GROUPS = quantizing.Groups(32, symmetric=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")

    return cache(lambda architecture: make_any(root / architecture, architecture))


def settings(model, out, method, keep=(), **more):
    """Of `awq` and `gptq`; models without experts get compressed-tensors' layout."""
    out.mkdir(exist_ok=True)
    texts = out.with_suffix(".jsonl")
    texts.write_text("".join(json.dumps({**row, "tokens": 1}) + "\n" for row in ROWS[1:]))
    packed = not read_facts(model).matrices.experts
    told = {"method": method, "group_size": 32, "keep": keep, "packed": packed, **more}
    return ProgramSettings(model=model, out=out, calibration=str(texts), **told)


def layout(method, model=None):
    own = model is not None and read_facts(model).matrices.experts
    named = method if own else "pack-quantized"
    return PackedLayout(method=named, bits=4, group_size=32, symmetric=method == "gptq")


@pytest.mark.grid(25)
@pytest.mark.parametrize(("architecture", "method"), CELLS)
def test_a_model_of_this_architecture_becomes_this_format(models, tmp_path, architecture, method):
    model, out = models(architecture), tmp_path / "out"
    of_format(method).check_input(formats()[method], read_facts(model))

    quantizing.quantize(settings(model, out, method))

    check_checkpoint(out, model, layout(method, model))
    found = measure(model, view_of(out, model), ROWS[:1], 100, lambda *_: None)
    assert found.kl_mean > 0
    assert 0 < found.layer_error < MOST
    assert not (out / ".engine").exists()
    # Engines must be told of every linear layer that stays as it is.
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    source, made = CheckpointTensors(model), CheckpointTensors(out)
    linear = {
        name
        for name in source.names & made.names
        if name.endswith("_proj.weight") and len(source.info(name).shape) == 2
    }
    told = config.get("modules_to_not_convert") or config.get("ignore") or ()
    assert linear <= {f"{name}.weight" for name in told}


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        *((scanning, method) for scanning in sorted(SCANNING) for method in ("awq", "gptq")),
        *(("PaliGemmaForConditionalGeneration", method) for method in ("awq", "gptq", "nvfp4")),
    ],
)
def test_what_the_walk_cannot_do_is_refused(architecture, method):
    model = facts({**LLAMA_8B, "architectures": [architecture]})

    with pytest.raises(InputRefused, match=f"unsupported architecture {architecture}"):
        of_format(method).check_input(formats()[method], model)


@pytest.mark.parametrize(
    ("architecture", "scaled"),
    [
        ("LlamaForCausalLM", {"input_layernorm", "post_attention_layernorm", "mlp.up_proj"}),
        ("Gemma2ForCausalLM", {"input_layernorm", "pre_feedforward_layernorm", "mlp.up_proj"}),
        ("Cohere2ForCausalLM", {"input_layernorm", "mlp.up_proj"}),  # one norm for both
        ("Olmo2ForCausalLM", {"mlp.up_proj"}),  # norms behind the matrices
        # The router gets the other norm's output, too.
        ("Qwen3MoeForCausalLM", {"input_layernorm", "self_attn.v_proj"}),
    ],
)
def test_scaling_changes_no_output(models, monkeypatch, architecture, scaled):
    draw = torch.Generator().manual_seed(2)
    monkeypatch.setattr(
        quantizing,
        "best_factors",
        lambda weights, *_: torch.rand(weights[0].shape[1], generator=draw) * 4 + 0.3,
    )
    ids = torch.randint(5, 500, (2, 40), generator=torch.Generator().manual_seed(1)).tolist()
    layers = Layers(models(architecture), ids)
    with layers.loaded(0) as layer:
        names = [name for name, module in layer.named_modules() if type(module) is torch.nn.Linear]
        observer = Observer(layer, names)
        with observer.watching(layers.batches[0].valid):
            before = layers.run(0, 0)
        modules = {id(module): name for name, module in layer.named_modules()}
        changed = {
            modules[id(one)]
            for one in scale_layer(observer.groups, GROUPS, lambda _: torch.bfloat16)
        }
        after = layers.run(0, 0)

    assert changed == scaled
    assert float((after - before).norm()) < 1e-4 * float(before.norm())


def test_an_expert_that_sees_little_is_named_and_sees_all(models, tmp_path, monkeypatch):
    model, out = models("Qwen3MoeForCausalLM"), tmp_path / "out"
    seen = []
    own = quantizing.Moments.of
    monkeypatch.setattr(
        quantizing.Moments, "of", lambda rows: (seen.append(len(rows)), own(rows))[1]
    )
    monkeypatch.setattr(quantizing, "MIN_TOKENS", 10**6)

    quantizing.quantize(settings(model, out, "awq"))

    told = json.loads((out / ".calibrated.json").read_text())
    assert len(told["experts_with_few_tokens"]) == 8  # four in each of two layers
    assert re.fullmatch(r"layer 0\.0 \(\d+\)", told["experts_with_few_tokens"][0])
    assert "experts saw fewer than 1000000 calibration tokens" in told["warnings"][0]
    assert set(seen) == {told["calibration_tokens"]}


def test_what_is_kept_keeps_its_bytes(models, tmp_path):
    model, out = models("LlamaForCausalLM"), tmp_path / "out"
    keep = ("down_proj", "layers.1.self_attn.o_proj")

    quantizing.quantize(settings(model, out, "awq", keep))

    check_checkpoint(out, model, layout("awq"), keep)
    made, source = CheckpointTensors(out), CheckpointTensors(model)
    kept = {n for n in source.names if "down_proj" in n or "layers.1.self_attn.o_proj" in n}
    assert all(made.raw(n).tobytes() == source.raw(n).tobytes() for n in kept)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head", *sorted(n.removesuffix(".weight") for n in kept)]
    every = tuple(name.removesuffix(".weight") for name in source.names if "_proj" in name)
    with pytest.raises(InputRefused, match="nothing would be quantized"):
        quantizing.quantize(settings(model, out, "gptq", every))


@pytest.mark.slow
@pytest.mark.grid(4)
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_killed_walk_goes_on_at_its_layer(models, tmp_path, monkeypatch, method):
    model = models("Qwen3MoeForCausalLM")
    quantizing.quantize(settings(model, tmp_path / "whole", method))
    wanted, run = settings(model, tmp_path / "out", method), killed_at(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        quantizing.quantize(wanted)
    quantizing.quantize(wanted)

    assert run == [0, 1, 1]
    for name in ("model.safetensors", "config.json", ".calibrated.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def killed_at(count, monkeypatch):
    """Interrupt the walk at its n-th layer; return the layers' numbers as they run."""
    run, own = [], quantizing._layer

    def layer(walk, number, *more):
        run.append(number)
        if len(run) == count:
            raise KeyboardInterrupt
        return own(walk, number, *more)

    monkeypatch.setattr(quantizing, "_layer", layer)
    return run


def test_other_texts_begin_again(models, tmp_path, monkeypatch):
    wanted = settings(models("LlamaForCausalLM"), tmp_path / "out", "gptq")
    run = killed_at(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        quantizing.quantize(wanted)
    texts = Path(wanted.calibration)
    texts.write_text(texts.read_text() + json.dumps({**ROWS[0], "tokens": 1}) + "\n")
    quantizing.quantize(wanted)

    assert run == [0, 1, 0, 1]


def changed(model, change):
    """A small Llama whose tensors are changed."""
    make_dense(model, "LlamaForCausalLM")
    tensors = {
        name: change(name, tensor)
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scaled_norms_keep_the_checkpoints_type(tmp_path, dtype):
    model, out = changed(tmp_path / "model", lambda _, one: one.to(dtype)), tmp_path / "out"

    quantizing.quantize(settings(model, out, "awq"))

    check_checkpoint(out, model, layout("awq"))
    norm = load_file(out / "model.safetensors")["model.layers.0.input_layernorm.weight"]
    assert norm.dtype == dtype
    assert bool(norm.isfinite().all())


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
def test_beside_adapters_every_matrix_keeps_its_inputs_and_outputs(models, tmp_path, architecture):
    """An adapter of a matrix whose input was divided would get what it was not trained on."""
    model = models(architecture)
    source, worst = CheckpointTensors(model), {}
    for scaled in (False, True):
        out = tmp_path / f"{scaled}"
        quantizing.quantize(settings(model, out, "awq", scaled=scaled))
        view = view_of(out, model)
        pairs = {name: (source.f32(name), view.tensor(name)) for name in view.names}
        worst[scaled] = max(
            float(np.linalg.norm(made - own) / np.linalg.norm(own)) for own, made in pairs.values()
        )
        norms = [np.array_equal(*pair) for name, pair in pairs.items() if "norm" in name]
        assert all(norms) is not scaled

    assert worst[False] < 0.25 < worst[True]  # 4 bits, and factors


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_matrix_of_zeros_stays_one(tmp_path, method):
    model, out = tmp_path / "model", tmp_path / "out"
    changed(model, lambda name, one: one * 0 if "o_proj" in name or "up_proj" in name else one)

    quantizing.quantize(settings(model, out, method))

    check_checkpoint(out, model, layout(method))
    view = view_of(out, model)
    assert not view.tensor("model.layers.1.self_attn.o_proj.weight").any()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("layers.1.mlp.up_proj.weight", r"layers\.1\.mlp\.up_proj\.weight has NaN or infinite"),
        ("layers.1.input_layernorm.weight", r"1\.input_layernorm\.weight has NaN or infinite"),
        ("embed_tokens.weight", r"layers\.0 makes NaN or infinite values"),
    ],
)
def test_what_is_not_finite_is_refused(tmp_path, part, message):
    def damaged(name, one):
        if name.endswith(part):
            one.view(-1)[:] = torch.inf
        return one

    model = changed(tmp_path / "model", damaged)

    with pytest.raises(InputRefused, match=message):
        quantizing.quantize(settings(model, tmp_path / "out", "gptq"))


def test_a_token_without_a_row_is_refused(tmp_path):
    model = changed(tmp_path / "model", lambda name, one: one[:200] if len(one) >= 500 else one)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))

    with pytest.raises(InputRefused, match="embedding has only 200 rows"):
        quantizing.quantize(settings(model, tmp_path / "out", "gptq"))


GROUP = 32


def drawn(seed, outputs=48, inputs=96):
    """A weight, and inputs that depend on each other and differ in power."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=draw) * 0.05
    mixed = torch.randn(200, 24, generator=draw) @ torch.randn(24, inputs, generator=draw)
    power = torch.rand(inputs, generator=draw) ** 3 * 4 + 0.1
    return weight, (mixed + torch.randn(200, inputs, generator=draw)) * power


def one_by_one(weight, gram, grid):
    """GPTQ as section 3 of arXiv 2210.17323 derives it: after each input, the inverse anew."""
    inputs = weight.shape[1]
    size = inputs // grid.scale.shape[1]
    scale, zero = grid.scale.double().numpy(), grid.zero.double().numpy()
    hessian = gram + 0.05 * gram.diagonal().mean() * np.eye(inputs)
    left, made = weight.copy(), np.empty_like(weight)
    order = np.argsort(-gram.diagonal(), kind="stable").tolist()
    while order:
        at, group = order[0], order[0] // size
        inverse = np.linalg.inv(hessian[np.ix_(order, order)])
        codes = np.rint(left[:, at] / scale[:, group]) + zero[:, group]
        made[:, at] = (np.clip(codes, 0, 15) - zero[:, group]) * scale[:, group]
        error = (left[:, at] - made[:, at]) / inverse[0, 0]
        left[:, order] -= error[:, None] * inverse[0]
        order.pop(0)
    return made


@pytest.mark.parametrize("symmetric", [False, True])
def test_errors_are_spread_as_the_paper_says(symmetric):
    weight, inputs = drawn(1)
    gram = inputs.T @ inputs
    grid = best_grid(weight, gram, GROUP, symmetric=symmetric)

    made = compensated(weight, gram, grid)

    right = one_by_one(weight.double().numpy(), gram.double().numpy(), grid)
    # A value that lies between two codes may go either way.
    assert (np.abs(made.numpy() - right) > 1e-4).mean() < 0.01
    by_itself = float((inputs @ (grid.rounded(weight) - weight).T).norm())
    assert float((inputs @ (made - weight).T).norm()) < 0.7 * by_itself


def test_what_later_inputs_do_not_explain_is_what_a_regression_leaves():
    draw = np.random.default_rng(0)
    mixing = draw.standard_normal((24, 24)) * 0.4 + np.eye(24)
    inputs = draw.standard_normal((200, 24)) @ mixing
    gram = inputs.T @ inputs
    # The damping is rows of its own.
    power = np.sqrt(0.05 * np.diag(gram).mean())
    rows = np.vstack([inputs, power * np.eye(24)])
    order = np.argsort(-np.diag(gram))

    found = unexplained(torch.from_numpy(gram)).numpy()

    for place, one in enumerate(order):
        later = rows[:, order[place + 1 :]]
        factors = np.linalg.lstsq(later, rows[:, one], rcond=None)[0]
        left = ((rows[:, one] - later @ factors) ** 2).sum()
        assert found[one] == pytest.approx(left, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_compressed_tensors_reads_what_we_read(tmp_path, method, dtype):
    """Its own library dequantizes each matrix to the bits that our reader finds."""
    model, out = changed(tmp_path / "model", lambda _, one: one.to(dtype)), tmp_path / "out"

    quantizing.quantize(settings(model, out, method, ("o_proj",)))

    config = json.loads((out / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    assert infer_module_format(torch.nn.Linear, scheme) == config["format"]
    tensors, view = load_file(out / "model.safetensors"), view_of(out, model)
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    names = compressor.compression_param_names(scheme)
    assert len(view.modules) == 12
    for module in view.modules:
        parts = {name: tensors[f"{module}.{name}"] for name in names}
        wide = {**parts, "weight_scale": parts["weight_scale"].float()}
        read = compressor.decompress(wide, scheme)["weight"]
        np.testing.assert_array_equal(view.matrix(module), read.numpy(), err_msg=module)
        again = {**wide, "weight": read}
        if method == "awq":
            shape = (len(read), wide["weight_scale"].shape[1])
            zeros = unpack_from_int32(parts["weight_zero_point"], 4, shape, packed_dim=0)
            again["weight_zero_point"] = zeros
        made = compressor.compress(again, scheme)
        for name in ("weight_packed", "weight_shape", "weight_zero_point"):
            assert (name in parts) == (name in made)
            assert name not in parts or torch.equal(made[name], parts[name]), name


def test_what_vllm_converts_autoawqs_layout_to_is_what_we_write(models, tmp_path):
    """compressed-tensors' own converter makes each tensor of `awq` from those of `awq-gemm`."""
    model, made = models("Qwen2ForCausalLM"), {}
    for name in ("awq", "awq-gemm"):
        out = tmp_path / name
        quantizing.quantize(settings(model, out, "awq", packed=name == "awq"))
        made[name] = load_file(out / "model.safetensors")

    config = json.loads((out / "config.json").read_text())["quantization_config"]
    converted = AutoAWQConverter.from_autoawq_config(config).process(dict(made["awq-gemm"]))

    assert converted.keys() == made["awq"].keys()
    for name, tensor in made["awq"].items():
        other = converted[name]
        same = tensor.dtype == other.dtype or name.endswith("weight_scale")  # there in float16
        assert same
        assert torch.equal(tensor.float(), other.float()), name


def test_the_formats_layouts_are_those_that_their_targets_load():
    """TGI and SGLang get the layouts of the methods' own tools, under the names they had."""
    found = {
        name: (target.format.name, target.format.layout)
        for name, target in all_targets().items()
        if target.format.name.removesuffix("-gemm").removesuffix("-v1") in {"awq", "gptq"}
    }

    packed = {f"vllm-{method}": (method, "pack-quantized") for method in ("awq", "gptq")}
    stand_ins = {"awq": ("awq-gemm", ""), "gptq": ("gptq-v1", "")}
    own = {f"{e}-{m}": one for e in ("sglang", "tgi") for m, one in stand_ins.items()}
    assert found == packed | own | {f"vllm-{one[0]}": one for one in stand_ins.values()}


@pytest.mark.parametrize(("method", "pack"), [("awq", packed_awq), ("gptq", packed_gptq)])
def test_what_is_packed_is_read_back(tmp_path, method, pack):
    weight, inputs = drawn(2)
    grid = best_grid(weight, inputs.T @ inputs, GROUP, symmetric=method == "gptq")
    values = grid.rounded(weight)
    tensors = {f"model.layers.0.mlp.up_proj.{n}": t for n, t in pack(grid, values).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quant_method": method, "bits": 4, "group_size": GROUP, "sym": method == "gptq"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))

    view = PackedView(tmp_path)

    assert np.array_equal(view.matrix("model.layers.0.mlp.up_proj"), values.numpy())


def test_scales_are_numbers_of_both_16_bit_floats():
    weight, _ = drawn(3)
    weight[0] = 0
    weight[1] = 1e-9
    for symmetric in (False, True):
        scale = best_grid(weight, None, GROUP, symmetric=symmetric).scale
        assert torch.equal(scale, scale.half().float())
        assert torch.equal(scale, scale.bfloat16().float())
        assert bool((scale > 0).all())


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_chosen_range_is_the_best_of_those_tried(symmetric):
    weight, inputs = drawn(4)
    weight = weight**3 * 100  # a few large ones, that clipping helps
    whole = best_grid(weight, None, GROUP, symmetric=symmetric)
    best = best_grid(weight, inputs.T @ inputs, GROUP, symmetric=symmetric)

    def errors(grid):
        moved = (grid.rounded(weight) - weight).double().numpy().reshape(len(weight), -1, GROUP)
        x = inputs.double().numpy().reshape(len(inputs), -1, GROUP)
        return (np.einsum("tgi,ogi->tog", x, moved) ** 2).sum(0)

    assert (errors(best) <= errors(whole) * (1 + 1e-4)).all()
    assert (errors(best) < errors(whole)).mean() > 0.2


class Four:
    """Rounds to 16 levels between a group's least and largest weight."""

    def __init__(self, group_size):
        self.group_size = group_size

    def pseudo_quantize_tensor(self, w):
        rows = w.reshape(-1, self.group_size)
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        scale = (high - low).clamp(min=1e-5) / 15
        zero = (-torch.round(low / scale)).clamp(0, 15)
        rounded = (torch.clamp(torch.round(rows / scale) + zero, 0, 15) - zero) * scale
        return rounded.reshape(w.shape), scale, zero


def errors(weight, inputs, group_size, limit):
    """Mean squared error of each group's part of each output, in float64: [out, groups]."""
    out, width = weight.shape
    w = weight.reshape(out, -1, group_size)
    clipped = w.clamp(-limit, limit).reshape(out, width)
    q = Four(group_size).pseudo_quantize_tensor(clipped)[0].reshape(w.shape)
    x = inputs.reshape(-1, width // group_size, group_size)
    moved = np.einsum("tgi,ogi->tog", x.double().numpy(), (q - w).double().numpy())
    return (moved**2).mean(0)


@pytest.mark.parametrize("group_size", [32, 64])
def test_the_chosen_limit_is_the_best_of_those_tried(group_size):
    draw = torch.Generator().manual_seed(5)
    weight = torch.randn(48, 128, generator=draw) ** 3  # a few large ones, that clipping helps
    inputs = torch.randn(3, 40, 128, generator=draw)
    found = best_clip(group_size, Four(group_size).pseudo_quantize_tensor, weight, inputs)

    largest = weight.reshape(48, -1, group_size).abs().amax(-1, keepdim=True)
    tried = [errors(weight, inputs, group_size, largest * (1 - step / 20)) for step in range(10)]
    chosen = errors(weight, inputs, group_size, found)
    assert found.shape == (48, 128 // group_size, 1)
    assert (chosen <= np.min(tried, 0) * (1 + 1e-4)).all()
    assert 0.2 < (found < largest).float().mean() < 1


def test_inputs_are_sampled_evenly_where_there_are_many():
    draw = torch.Generator().manual_seed(6)
    weight, inputs = torch.randn(8, 64, generator=draw), torch.randn(2048, 64, generator=draw)

    rounded = Four(32).pseudo_quantize_tensor
    assert torch.equal(
        best_clip(32, rounded, weight, inputs), best_clip(32, rounded, weight, inputs[::4].clone())
    )


def test_searching_scales_leaves_the_weights_as_they_were():
    class Search:
        """Tries scales as AutoAWQ does: it keeps what `cpu()` gives, and multiplies in place."""

        @torch.no_grad()
        def _compute_best_scale(self, x, w_mean, x_mean, module, linears):
            kept = {name: value.cpu() for name, value in module.state_dict().items()}
            for ratio in (3, 5):
                linears[0].weight.mul_(ratio)
                linears[0].weight.data = linears[0].weight.data / ratio + 1
                module.load_state_dict(kept)
            return x

    layer = torch.nn.Sequential(torch.nn.Linear(4, 4))
    before = layer[0].weight.detach().clone()
    patch_searches(Search)

    assert Search()._compute_best_scale(7, None, None, layer, [layer[0]]) == 7
    assert torch.equal(layer[0].weight, before)
    assert "state_dict" not in vars(layer)
