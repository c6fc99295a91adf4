"""What transformers and vLLM both know: quantized by the general rule, or refused beforehand."""

import json
from functools import cache, partial

import numpy as np
import pytest
import torch
import transformers
from weightsmith.core.errors import InputRefused
from weightsmith.models.facts import read_facts
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers import formats, of_format
from weightsmith.quantizers.architectures import (
    FURTHER_EXPERTS,
    JOINED,
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
from weightsmith.quantizers.schemes import NVFP4, SCHEMES

from docs.known import listed
from tests import vllm_parts
from tests.fakes.configs import facts
from tests.fakes.known import make_known

ROWS = [json.loads(line) for line in GENERAL.read_text("utf-8").splitlines()[:2]]
MOST = {"w8a8": 0.1, "fp8": 0.2, "fp8-block": 0.2, "nvfp4a16": 0.45, "mxfp4a16": 0.6}
"""Errors of layers, as in test_architectures.py."""

BY_RULE = sorted(NAMED | FURTHER_EXPERTS)
CELLS = [(a, s) for a in BY_RULE for s in SCHEMES if a not in SCANNING or s != "fp8-block"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return cache(lambda architecture: make_known(root / architecture, architecture))


@pytest.mark.parametrize("architecture", vllm_architectures())
@pytest.mark.parametrize("name", ["fp8", "nvfp4a16"])
def test_each_is_quantized_or_refused_with_what_works(architecture, name):
    model = facts({
        "architectures": [architecture], "hidden_size": 512, "intermediate_size": 1024,
        "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100,
    })  # fmt: skip
    check = of_format(name).check_input
    if architecture in ROUNDED - STACKED_MXFP4:
        check(formats()[name], model)
        return
    why = f"(unsupported architecture|vLLM loads the experts of) {architecture}"
    with pytest.raises(InputRefused, match=why) as refused:
        check(formats()[name], model)
    assert refused.value.exit_code == 3
    assert "target vllm" in refused.value.hint
    assert ("GGUF" in refused.value.hint) == (architecture in gguf_architectures())


@pytest.mark.grid(15)
@pytest.mark.parametrize(("architecture", "name"), CELLS)
def test_the_general_rule_fits(models, tmp_path, architecture, name):
    model, scheme = models(architecture), SCHEMES[name]
    of_format(name).check_input(formats()[name], read_facts(model))

    quantize(scheme, model, tmp_path, [])

    check_checkpoint(tmp_path, model, PackedLayout.of_scheme(scheme))
    view, source = view_of(tmp_path, model), CheckpointTensors(model)
    stacks = {n for n in source.names - view.tensors.names if len(source.info(n).shape) == 3}
    for tensor in source.names - stacks - {f"{module}.weight" for module in view.modules}:
        assert np.array_equal(view.tensors.raw(tensor), source.raw(tensor)), tensor
    # Engines must be told of every linear layer that stays as it is.
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    linear = {
        name.removesuffix(".weight")
        for name in source.names
        if name.endswith("_proj.weight") and len(source.info(name).shape) == 2
    }
    assert linear <= view.modules | set(config["ignore"])
    # The last matrix of attention, and that of a feed-forward network.
    ends = {module.rpartition(".")[2] for module in view.modules}
    assert ends & {"o_proj", "out_proj"}
    assert ends & {"down_proj", "w2"}
    found = measure(model, view, ROWS[:1], 100, lambda *_: None)
    assert found.kl_mean > 0
    assert 0 < found.layer_error < MOST[name]


@pytest.mark.grid(15)
@pytest.mark.parametrize("architecture", sorted(WALKED.intersection(BY_RULE)))
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
        assert inputs[matrix.module] == pytest.approx(right[as_key(weight)], rel=1e-3)
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


@pytest.mark.parametrize("architecture", sorted(SCANNING))
def test_blocks_that_vllm_would_split_are_refused(models, architecture):
    model = read_facts(models(architecture))
    with pytest.raises(InputRefused, match=rf"splits {architecture}'s mamba\.in_proj") as refused:
        of_format("fp8-block").check_input(formats()["fp8-block"], model)
    assert "choose fp8" in refused.value.hint


@pytest.mark.vllm
def test_the_list_is_that_of_the_pinned_vllm():
    assert listed(vllm_parts.packages()) == vllm_architectures()
