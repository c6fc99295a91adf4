"""What our own walk over the layers finds, against the whole model in transformers.

Importance, the largest keys and values; the largest inputs also in test_architectures.py.
"""

import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache
from weightsmith.core.errors import CheckFailed, InputRefused
from weightsmith.models.facts import ModelFacts, read_facts
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers import formats, gguf_importance, of_format
from weightsmith.quantizers.architectures import MEASURED
from weightsmith.quantizers.calibration import GENERAL
from weightsmith.quantizers.gguf_importance import (
    WITHOUT_WALK,
    experts_missed,
    measured_by,
    read_imatrix,
    read_importance,
)
from weightsmith.quantizers.layerwise import importance as walking
from weightsmith.quantizers.layerwise.importance import importance, write_importance
from weightsmith.quantizers.layerwise.maxima import cache_scales, input_maxima
from weightsmith.quantizers.matrices import matrices
from weightsmith.quantizers.packed import PackedLayout
from weightsmith.quantizers.packed_check import check_checkpoint
from weightsmith.quantizers.rounded import quantize
from weightsmith.quantizers.schemes import NVFP4

from tests.fakes.decoders import make_dense
from tests.unit.quantizers.conftest import make_any

LINES = [json.loads(line)["text"] for line in GENERAL.read_text("utf-8").splitlines()[:3]]
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def windows(model, window):
    """The tiny tokenizer begins no text with a token of its own."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer("\n".join(LINES), add_special_tokens=False)["input_ids"]
    return [torch.tensor([ids[n : n + window]]) for n in range(0, len(ids) - window + 1, window)]


def tokens_of(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    return sum(len(tokenizer(line, add_special_tokens=False)["input_ids"]) for line in LINES)


def by_transformers(model, chunks):
    """Means of squares in float64: of each linear layer, and of each expert's inputs."""
    network = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, experts_implementation="eager"
    )
    inputs: dict[str, list[torch.Tensor]] = {}

    def see(name, _, args):
        inputs.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))

    linear = torch.nn.functional.linear
    experts: dict[str, dict[int, list[torch.Tensor]]] = {}

    def spied(module, name, forward, *args, **kwargs):
        """Catch the products with one expert's matrix, which are views of the stack."""

        def product(x, weight, bias=None):
            for part, stack in (("up", module.gate_up_proj), ("down", module.down_proj)):
                step = stack.stride(0) * stack.element_size()
                number, rest = divmod(weight.data_ptr() - stack.data_ptr(), step)
                if not rest and 0 <= number < len(stack) and weight.shape == stack.shape[1:]:
                    found = experts.setdefault(f"{name}.{part}", {})
                    found.setdefault(number, []).append(x)
            return linear(x, weight, bias)

        torch.nn.functional.linear = product
        try:
            return forward(*args, **kwargs)
        finally:
            torch.nn.functional.linear = linear

    for name, module in network.named_modules():
        if type(module) is torch.nn.Linear:
            module.register_forward_pre_hook(partial(see, name))
        elif name.endswith(".experts"):
            module.forward = partial(spied, module, name, module.forward)
    with torch.inference_mode():
        for chunk in chunks:
            network(input_ids=chunk)
    found = {name: mean(rows)[None] for name, rows in inputs.items()}
    for name, of_each in experts.items():
        count = network.get_submodule(name.rpartition(".")[0]).num_experts
        width = of_each[min(of_each)][0].shape[-1]
        ones = np.ones(width)
        found[name] = np.stack([mean(of_each[n]) if n in of_each else ones for n in range(count)])
    return found


def mean(rows):
    return torch.cat(rows).double().square().mean(0).numpy()


def measured(tmp_path, model):
    found = importance(model, LINES, tokens_of(model))
    write_importance(tmp_path / "imatrix.gguf", found)
    return read_importance(tmp_path / "imatrix.gguf").values, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "parts"),
    [
        ("LlamaForCausalLM", {*NAMES} - {"attn_qkv"}),
        ("Gemma3ForCausalLM", {*NAMES} - {"attn_qkv"}),
        ("Phi3ForCausalLM", {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),  # joined matrices
    ],
)
def test_each_matrix_has_the_mean_squares_of_its_inputs(tmp_path, architecture, parts):
    model = make_any(tmp_path / "model", architecture)
    ours, found = measured(tmp_path, model)

    chunks = windows(model, found.window)
    right = by_transformers(model, chunks)
    assert {name.split(".")[2] for name in ours} == parts
    assert len(ours) == 2 * len(parts)
    names = {**NAMES, **({"ffn_up": "mlp.gate_up_proj"} if "attn_qkv" in parts else {})}
    assert found.chunks == len(chunks) >= 2
    for name, values in ours.items():
        _, layer, part, _ = name.split(".")
        close(values, right[f"model.layers.{layer}.{names[part]}"], name)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen2MoeForCausalLM"])
def test_each_expert_has_its_own(tmp_path, architecture):
    model = make_any(tmp_path / "model", architecture)
    ours, found = measured(tmp_path, model)

    right = by_transformers(model, windows(model, found.window))
    for name in ("ffn_gate_exps", "ffn_up_exps"):
        close(ours[f"blk.1.{name}.weight"], right["model.layers.1.mlp.experts.up"], name)
    close(ours["blk.1.ffn_down_exps.weight"], right["model.layers.1.mlp.experts.down"], "down")
    if architecture == "Qwen2MoeForCausalLM":
        for part in ("gate", "up", "down"):
            name = f"model.layers.1.mlp.shared_expert.{part}_proj"
            close(ours[f"blk.1.ffn_{part}_shexp.weight"], right[name], part)
    counts = {e.name: e.counts for e in read_imatrix(tmp_path / "imatrix.gguf")}
    assert sum(counts["blk.1.ffn_up_exps.weight"]) == 2 * found.chunks * found.window
    assert experts_missed(tmp_path / "imatrix.gguf") == []


def close(ours, right, name):
    np.testing.assert_allclose(ours, right, rtol=1e-4, atol=1e-7, err_msg=name)


@pytest.mark.slow
@pytest.mark.grid(9)
@pytest.mark.parametrize("architecture", sorted(MEASURED - WITHOUT_WALK))
def test_every_architecture_has_all_its_matrices(tmp_path, architecture):
    model = make_any(tmp_path / "model", architecture)
    ours, _ = measured(tmp_path, model)

    for layer in (0, 1):
        parts = {name.split(".")[2] for name in ours if name.startswith(f"blk.{layer}.")}
        assert {"attn_output", "attn_qkv" if "attn_qkv" in parts else "attn_q"} <= parts
        assert parts & {"ffn_down", "ffn_down_exps"}


@pytest.mark.slow
def test_more_text_than_fits_into_memory_is_walked_in_parts(tmp_path, monkeypatch):
    model = make_any(tmp_path / "model", "LlamaForCausalLM")
    whole = importance(model, LINES, tokens_of(model))
    monkeypatch.setattr(walking, "WALK_TOKENS", whole.window)
    steps: list[tuple[int, int]] = []

    parts = importance(model, LINES, tokens_of(model), lambda *step: steps.append(step))

    assert steps[-1] == (2 * whole.chunks, 2 * whole.chunks)
    for name, sums in whole.sums.items():
        np.testing.assert_allclose(parts.sums[name].squares, sums.squares, rtol=1e-4)
        np.testing.assert_array_equal(parts.sums[name].counts, sums.counts)


@pytest.mark.parametrize("architecture", [*sorted(WITHOUT_WALK), "GPT2LMHeadModel"])
def test_an_unknown_architecture_is_refused_before_any_work(tmp_path, architecture):
    quantizer, format_ = of_format("q4_k_m"), formats()["q4_k_m"]
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    model = read_facts(tmp_path)

    quantizer.check_options(model, quantizer.options(format_, {"imatrix": "auto"}))
    with pytest.raises(InputRefused, match=f"walk does not support {architecture}"):
        quantizer.check_options(model, quantizer.options(format_, {"imatrix": "walk"}))


@pytest.mark.parametrize(
    ("architecture", "size", "avx2", "expected"),
    [
        ("LlamaForCausalLM", 200_000_000, True, "walk"),
        ("LlamaForCausalLM", 199_999_999, True, "auto"),
        ("LlamaForCausalLM", 10**12, False, "auto"),
        ("DeepseekV3ForCausalLM", 10**12, True, "auto"),
        ("GPT2LMHeadModel", 10**12, True, "auto"),
    ],
)
def test_who_measures_depends_on_the_model_and_on_avx2(
    monkeypatch, architecture, size, avx2, expected
):
    monkeypatch.setattr(gguf_importance, "has_avx2", lambda: avx2)
    model = ModelFacts.of({"architectures": [architecture]})
    assert measured_by(model, size) == expected


def test_fused_matrices_of_different_scales_are_found(tmp_path, out):
    model = make_dense(tmp_path / "model", "LlamaForCausalLM")
    inputs = input_maxima(model, LINES, matrices(CheckpointTensors(model), model))
    quantize(NVFP4, model, out, [], inputs)
    tensors = load_file(out / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.input_global_scale"] *= 2
    save_file(tensors, out / "model.safetensors", {"format": "pt"})

    with pytest.raises(CheckFailed, match=r"different global scales \(input_global_scale\)"):
        check_checkpoint(out, model, PackedLayout.of_scheme(NVFP4))


def cached_by_transformers(model):
    """The largest keys and values that its own cache holds, text by text."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    most = [[0.0, 0.0] for _ in range(network.config.num_hidden_layers)]
    for line in LINES:
        ids = tokenizer(line, add_special_tokens=False, return_tensors="pt")["input_ids"]
        for start in range(0, ids.shape[1], 512):
            with torch.inference_mode():
                made = network(input_ids=ids[:, start : start + 512], use_cache=True)
            (cache,) = (one for one in made.values() if isinstance(one, Cache))
            for layer, pair in zip(cache.layers, most, strict=True):
                pair[0] = max(pair[0], float(layer.keys.abs().max()))
                pair[1] = max(pair[1], float(layer.values.abs().max()))
    return [(keys / 448, values / 448) for keys, values in most]


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM"]
)
def test_they_are_those_of_transformers_cache(tmp_path, architecture):
    model = make_dense(tmp_path / "model", architecture)
    found = cache_scales(model, LINES)

    right = cached_by_transformers(model)
    assert list(found) == [f"model.layers.{n}.self_attn" for n in range(len(right))]
    for mine, theirs in zip(found.values(), right, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
