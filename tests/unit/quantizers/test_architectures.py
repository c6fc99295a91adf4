"""Each cell of the table of architectures and formats without calibration is a test here.

What transformers and vLLM both know is quantized by the general rule, or refused beforehand.
"""

import json
import re
import shutil
from functools import cache, partial

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.quantization.utils import generate_gparam
from safetensors.torch import load_file, save_file
from weightsmith.core.errors import CheckFailed, InputRefused, UsageError
from weightsmith.models.facts import read_facts
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers import formats, of_format, quantizers
from weightsmith.quantizers.architectures import (
    DENSE,
    FURTHER_EXPERTS,
    GROUPED,
    JOINED,
    LLAMA4,
    LLAMAS,
    NAMED,
    ROUNDED,
    SCANNING,
    STACKED_MXFP4,
    WALKED,
    gguf_architectures,
    vllm_architectures,
)
from weightsmith.quantizers.calibration import GENERAL
from weightsmith.quantizers.checkpoints import MATRICES, check_kept, is_kept
from weightsmith.quantizers.layerwise.maxima import input_maxima
from weightsmith.quantizers.matrices import matrices
from weightsmith.quantizers.packed import PackedLayout, view_of
from weightsmith.quantizers.packed_check import check_checkpoint
from weightsmith.quantizers.quality.measure import measure
from weightsmith.quantizers.rounded import quantize
from weightsmith.quantizers.rounding import fused_scale
from weightsmith.quantizers.schemes import NVFP4, SCHEMES

from docs.known import listed
from tests import vllm_parts
from tests.fakes.predicting import add_predicting
from tests.fakes.seeing import turn_experts
from tests.unit.quantizers.conftest import make_any, model_of

ROWS = [json.loads(line) for line in GENERAL.read_text("utf-8").splitlines()[:2]]
BY_RULE = NAMED | FURTHER_EXPERTS
CELLS = [
    (name, scheme)
    for name in sorted(ROUNDED - STACKED_MXFP4)  # tested elsewhere
    for scheme in SCHEMES
    if not (scheme == "fp8-block" and name in LLAMA4 | SCANNING)
]
MOST = {
    "w8a8": 0.1, "fp8": 0.2, "fp8-block": 0.2, "mxfp8": 0.2, "nvfp4a16": 0.45, "mxfp4a16": 0.6,
    "mxfp4a8": 0.6, "nvfp4a16-4o6": 0.45,
}  # fmt: skip
"""Errors of layers; the largest are of models with experts, whose routers choose others."""
NOT_QUANTIZED = (
    "embed_tokens", "lm_head", "norm", ".bias", ".gate.", "router", "shared_expert_gate",
    "q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj", "vision", "visual", "multi_modal_projector",
    "e_score_correction_bias",
)  # fmt: skip
"""Parts of the names of tensors that must stay as they are."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")

    return cache(lambda architecture: make_any(root / architecture, architecture, hidden=256))


@pytest.mark.grid(19)  # no multiple of the number of schemes: each has its turn
@pytest.mark.parametrize(("architecture", "name"), CELLS)
def test_a_model_of_this_architecture_becomes_this_format(models, out, architecture, name):
    model, scheme = models(architecture), SCHEMES[name]
    of_format(name).check_input(formats()[name], read_facts(model))

    quantize(scheme, model, out, [])

    check_checkpoint(out, model, PackedLayout.of_scheme(scheme))
    view, source = view_of(out, model), CheckpointTensors(model)
    stacks = {n for n in source.names - view.tensors.names if len(source.info(n).shape) == 3}
    left = source.names - stacks - {f"{module}.weight" for module in view.modules}
    assert all(_same(view.tensors, source, tensor) for tensor in left)
    linear = {n.removesuffix(".weight") for n in source.names if len(source.info(n).shape) == 2}
    if architecture in BY_RULE:
        linear = {module for module in linear if module.endswith("_proj")}
    else:
        tables = ("embed_tokens", "weight", "vlm", "pos_embed", "lm_head", "_embedding")
        linear = {module for module in linear if not module.endswith(tables)}
        for tensor in source.names - left:
            assert not any(part in tensor for part in NOT_QUANTIZED), tensor
        for tensor in left:
            assert any(part in tensor for part in NOT_QUANTIZED), tensor
    # Engines must be told of every linear layer that stays as it is.
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert linear <= view.modules | set(ignored)
    # The last matrix of attention, and that of a feed-forward network.
    ends = {module.rpartition(".")[2] for module in view.modules}
    assert ends & {"o_proj", "out_proj"}
    assert ends & {"down_proj", "w2"}
    found = measure(model, view, ROWS[:1], 100, lambda *_: None)
    assert found.kl_mean > 0
    assert 0 < found.layer_error < MOST[name]


def _same(made, source, tensor):
    return made.info(tensor).dtype == source.info(tensor).dtype and np.array_equal(
        made.raw(tensor), source.raw(tensor)
    )


@pytest.mark.parametrize("architecture", vllm_architectures())
@pytest.mark.parametrize("name", ["fp8", "nvfp4a16"])
def test_each_is_quantized_or_refused_with_what_works(architecture, name):
    model, check = model_of(architecture), of_format(name).check_input
    if architecture in ROUNDED - STACKED_MXFP4:
        check(formats()[name], model)
        return
    why = f"(unsupported architecture|vLLM loads the experts of) {architecture}"
    with pytest.raises(InputRefused, match=why) as refused:
        check(formats()[name], model)
    assert refused.value.exit_code == 3
    assert "target vllm" in refused.value.hint
    assert ("GGUF" in refused.value.hint) == (architecture in gguf_architectures())


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        *((name, "reorders the rows of Q and K") for name in sorted(LLAMA4)),
        *((name, rf"splits {name}'s mamba\.in_proj") for name in sorted(SCANNING)),
    ],
)
def test_blocks_of_rows_that_vllm_reorders_or_splits_are_refused(architecture, why):
    with pytest.raises(InputRefused, match=why) as refused:
        of_format("fp8-block").check_input(formats()["fp8-block"], model_of(architecture))
    assert "choose fp8" in refused.value.hint


EXPERT = {"num_experts": 4, "moe_intermediate_size": 128}


@pytest.mark.parametrize(
    ("name", "more", "what"),
    [
        ("nvfp4a16", {"intermediate_size": 1000}, "16 inputs, and down_proj has 1000"),
        ("mxfp4a16", {"hidden_size": 528, "head_dim": 128}, "32 inputs, and q_proj has 528"),
        ("mxfp8", {"intermediate_size": 1008}, "32 inputs, and down_proj has 1008"),
        ("fp8-block", {"num_key_value_heads": 2, "head_dim": 32}, "k_proj, .* has 64"),
        ("fp8-block", {"intermediate_size": 1000}, "gate_proj, .* has 1000"),
        ("fp8-block", {**EXPERT, "moe_intermediate_size": 96}, "an expert's gate_proj, .* has 96"),
        ("mxfp4a16", {**EXPERT, "moe_intermediate_size": 80}, "an expert's down_proj has 80"),
        ("nvfp4a16", {**EXPERT, "intermediate_size": 1000}, ""),  # no layer has it
        ("fp8-block", {**EXPERT, "hidden_size": 500, "head_dim": 128}, ""),  # the last may be cut
    ],
)
def test_dimensions_that_tiles_do_not_divide_are_refused(name, more, what):
    model = model_of("Qwen3MoeForCausalLM" if "num_experts" in more else "LlamaForCausalLM", **more)
    check = of_format(name).check_input
    if not what:
        check(formats()[name], model)
        return
    with pytest.raises(InputRefused, match=what) as refused:
        check(formats()[name], model)
    assert "choose fp8" in refused.value.hint


@pytest.mark.parametrize(
    ("keep", "fits"),
    [
        (["gate_proj", "up_proj", "down_proj"], True),
        (["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj", "layers.0.mlp.down_proj"], True),
        (["o_proj"], True),
        (["shared_expert.down_proj"], True),
        (["down_proj"], False),
        (["experts.0.down_proj", "experts.0.gate_proj", "experts.0.up_proj"], False),
        (["3.down_proj", "3.gate_proj", "3.up_proj"], False),
    ],
)
def test_of_a_layer_s_experts_all_or_none_are_kept(keep, fits):
    check, experts = of_format("fp8").check_options, model_of("Qwen2MoeForCausalLM", **EXPERT)
    check(model_of("LlamaForCausalLM"), {"keep": keep})
    if fits:
        check(experts, {"keep": keep})
        return
    with pytest.raises(InputRefused, match="engines load either all or none"):
        check(experts, {"keep": keep})


@pytest.mark.parametrize(
    ("architecture", "end"),
    [
        ("LlamaForCausalLM", "layers.2.mlp.down_proj"),
        ("Qwen2MoeForCausalLM", "model.layers.17.self_attn.o_proj"),
        ("Phi3ForCausalLM", "gate_proj"),
    ],
)
@pytest.mark.parametrize("name", ["fp8", "awq", "gptq"])
def test_names_that_a_model_lacks_are_refused_before_the_merge(name, architecture, end):
    check, model = of_format(name).check_options, model_of(architecture)
    check(model, {"keep": ["layers.1.mlp.down_proj"], "group_size": 64})
    with pytest.raises(
        InputRefused, match=re.escape(f"keep: no matrix has a name that ends in '{end}'")
    ):
        check(model, {"keep": [end], "group_size": 64})


def test_the_worst_expert_is_named(models, tmp_path):
    model, scheme = models("Qwen3MoeForCausalLM"), SCHEMES["w8a8"]
    quantize(scheme, model, tmp_path, [])
    tensors = load_file(tmp_path / "model.safetensors")
    bad = "model.layers.1.mlp.experts.2"
    tensors[f"{bad}.down_proj.weight"][:2] = 0
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})

    with pytest.raises(CheckFailed, match=rf"{re.escape(bad)}.down_proj has a relative error"):
        check_checkpoint(tmp_path, model, PackedLayout.of_scheme(scheme))
    quantize(scheme, model, tmp_path, [])
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"{bad}.down_proj.weight"] &= -2  # without its lowest bit
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = check_checkpoint(tmp_path, model, PackedLayout.of_scheme(scheme))
    assert found["experts"] == 8
    assert found["worst_experts"][0]["name"] == bad
    assert found["worst_experts"][0]["error"] > found["worst_experts"][1]["error"]


def test_what_is_kept_of_stacked_experts_stays_stacked(models, tmp_path):
    model, scheme = models("GraniteMoeForCausalLM"), SCHEMES["nvfp4a16"]
    source, keep = CheckpointTensors(model), ["gate_proj", "up_proj", "down_proj"]

    quantize(scheme, model, tmp_path, keep)

    check_checkpoint(tmp_path, model, PackedLayout.of_scheme(scheme), tuple(keep))
    made = CheckpointTensors(tmp_path)
    for name in source.names:
        if "linear" in name:
            assert _same(made, source, name)
    # vLLM looks for the first expert (CompressedTensorsMoEMethod.get_moe_method).
    ignored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["ignore"]
    first = "model.layers.1.block_sparse_moe.experts.0"
    assert {f"{first}.{name}" for name in keep} <= set(ignored)


@pytest.mark.parametrize(
    ("architecture", "style"),
    [("DeepseekV3ForCausalLM", "numbered"), ("Qwen3NextForCausalLM", "mtp.")],
)
def test_layers_that_predict_further_tokens_stay_in_16_bits(
    models, tmp_path, out, architecture, style
):
    """Engines must be told so of each of their matrices, to read them as drafters."""
    model, scheme = tmp_path / "model", SCHEMES["fp8"]
    shutil.copytree(models(architecture), model)
    added = add_predicting(model, style)

    quantize(scheme, model, out, [])

    check_checkpoint(out, model, PackedLayout.of_scheme(scheme))
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in added.items())
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    matrices_of = {n for n, t in added.items() if t.dim() > 1 and "embed_tokens" not in n}
    assert {name.removesuffix(".weight") for name in matrices_of} <= set(ignored)


@pytest.mark.parametrize("name", ["fp8", "nvfp4a16"])
def test_experts_stored_either_way_give_the_same_file(models, tmp_path, name):
    """Published files of Qwen3-VL have stacked experts transposed, transformers' own do not."""
    architecture = "Qwen3VLMoeForConditionalGeneration"
    published, saved = models(architecture), tmp_path / "saved"
    shutil.copytree(published, saved)
    turn_experts(saved)
    files = []
    for number, model in enumerate((published, saved)):
        out = tmp_path / str(number)
        out.mkdir()
        quantize(SCHEMES[name], model, out, [])
        check_checkpoint(out, model, PackedLayout.of_scheme(SCHEMES[name]))
        files.append((out / "model.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.grid(15)
@pytest.mark.parametrize("architecture", sorted(WALKED))
def test_the_walk_finds_the_largest_inputs(models, tmp_path, architecture):
    model = models(architecture)
    of_format("nvfp4").check_input(NVFP4.format, read_facts(model))
    lines, source = [str(row["text"]) for row in ROWS], CheckpointTensors(model)
    right = by_transformers(model, lines)

    inputs = input_maxima(model, lines, matrices(source, model))
    quantize(NVFP4, model, tmp_path, [], inputs)

    check_checkpoint(tmp_path, model, PackedLayout.of_scheme(NVFP4))
    view = view_of(tmp_path, model)
    assert set(inputs) == set(view.modules)
    for matrix in matrices(source, model):
        weight = torch.from_numpy(matrix.rows(source, 0, matrix.outputs))
        most = inputs[matrix.module]
        assert most == pytest.approx(right[as_key(weight)], rel=1e-3)
        # All experts, and what engines fuse, have the same.
        (scale,) = view.tensors.f32(f"{matrix.module}.input_global_scale")
        right_scale = generate_gparam(torch.tensor(-most), torch.tensor(most))
        assert scale == fused_scale(most, NVFP4) == pytest.approx(float(right_scale), rel=1e-6)
    told = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert told["config_groups"]["group_0"]["input_activations"]["dynamic"] == "local"
    found = measure(model, view, ROWS[:1], 100, lambda *_: None)
    assert 0 < found.layer_error < MOST["nvfp4a16"]


def by_transformers(model, lines):
    """The largest inputs of each matrix of the whole model, by the bytes of its weight.

    All experts of a layer have the largest of any.
    """
    network = getattr(transformers, read_facts(model).architecture).from_pretrained(
        model, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    most: dict[object, float] = {}
    weights: dict[bytes, object] = {}

    def see(key, _, args):
        most[key] = max(most.get(key, 0.0), float(args[0].abs().max()))

    def see_experts(module, args):
        rows, chosen = (arg.reshape(-1, arg.shape[-1]) for arg in args[:2])
        for expert, both in enumerate(module.gate_up_proj):
            gate, up = both.chunk(2)
            mine = rows[(chosen == expert).any(1)]
            for weight in (gate, up):
                weights[as_key(weight)] = ("in", id(module))
            if len(mine):
                see(("in", id(module)), None, (mine,))
                inner = module.act_fn(mine @ gate.T) * (mine @ up.T)
                see(("inner", id(module)), None, (inner,))
            weights[as_key(module.down_proj[expert])] = ("inner", id(module))

    for module in network.modules():
        if type(module) is torch.nn.Linear:
            module.register_forward_pre_hook(partial(see, as_key(module.weight)))
        elif isinstance(getattr(module, "gate_up_proj", None), torch.nn.Parameter):
            module.register_forward_pre_hook(see_experts)
    for line in lines:
        ids = tokenizer(line, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            network(input_ids=ids[:, :512], use_cache=False)
    return most | {key: most[place] for key, place in weights.items()}


def as_key(weight):
    return weight.detach().bfloat16().contiguous().view(torch.int16).numpy().tobytes()


@pytest.mark.grid(15)
@pytest.mark.parametrize("architecture", sorted(NAMED | JOINED))
def test_what_a_model_lacks_cannot_be_kept(models, architecture):
    """Also not what engines fuse with it: `keep_option` wants all of those."""
    model = models(architecture)
    modules = [one.module for one in matrices(CheckpointTensors(model), model)]
    for name in MATRICES:
        if any(is_kept(module, [name]) for module in modules):
            continue
        with pytest.raises(InputRefused, match=f"ends in '{name}': {architecture} ") as refused:
            check_kept(read_facts(model), {"keep": [name]})
        assert refused.value.exit_code == 3
    ends = {"out_proj", "w2"} if "Lfm2" in architecture else {"o_proj", "down_proj"}
    check_kept(read_facts(model), {"keep": sorted(ends)})


@pytest.mark.vllm
def test_the_list_is_that_of_the_pinned_vllm():
    assert listed(vllm_parts.packages()) == vllm_architectures()


def test_quantizers_are_found_by_listing_the_folder():
    assert "gguf" in quantizers()
    assert all(name == quantizer.name for name, quantizer in quantizers().items())


def test_every_format_has_one_maker():
    names = [format_.name for q in quantizers().values() for format_ in q.formats]

    assert len(names) == len(set(names)) == len(formats())
    assert of_format("q4_k_m").name == "gguf"


def test_an_unknown_format_gets_near_misses_and_the_list():
    with pytest.raises(UsageError, match="unknown format") as caught:
        of_format("Q4_KM")

    assert "q4_k_m" in caught.value.hint
    assert "f16" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "known"),
    [
        *((name, ROUNDED) for name in SCHEMES),
        ("gptq", GROUPED),
        ("w3a16", GROUPED),
        ("nvfp4", WALKED),
        ("awq", GROUPED),
        ("gptq-gptqmodel", DENSE),
        ("awq-gptqmodel", DENSE - {"Gemma3ForCausalLM", "Cohere2ForCausalLM"}),
        ("awq-autoawq", LLAMAS),
        ("awq-compressed", LLAMAS),
        ("fp8-static", LLAMAS),
        ("awq-modelopt", LLAMAS),
        ("fp8-modelopt", LLAMAS),
        ("nvfp4-modelopt", LLAMAS),
    ],
)
def test_what_an_engine_does_not_know_is_refused_with_what_it_knows(name, known):
    for architecture in sorted(DENSE | {"Phi3ForCausalLM", "FalconForCausalLM"}):
        model, check = model_of(architecture), of_format(name).check_input
        if architecture in known:
            check(formats()[name], model)
            continue
        with pytest.raises(InputRefused, match="unsupported architecture") as caught:
            check(formats()[name], model)
        named = "LlamaForCausalLM" if len(known) <= 20 else "docs/reference/architectures.md"
        assert named in caught.value.message
