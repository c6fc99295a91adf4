"""Mixes for vLLM: compressed-tensors' own reader decompresses them to what we read.

Budgets, units that vLLM fuses, files of mixes, and what is refused.
"""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from weightsmith.core.errors import CheckFailed, InputRefused, UsageError
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers import compressed_mix, formats, of_format
from weightsmith.quantizers.calibration import GENERAL
from weightsmith.quantizers.compressed_mix import (
    KINDS,
    MixSettings,
    choose,
    tensor_of,
    types_of,
    unit_of,
)
from weightsmith.quantizers.gguf_mix import read_mix
from weightsmith.quantizers.layerwise.quantizing import Groups, integers, quantize
from weightsmith.quantizers.matrices import matrices
from weightsmith.quantizers.packed import view_of
from weightsmith.quantizers.quality.texts import as_lines
from weightsmith.quantizers.quantizer import QuantizeRequest
from weightsmith.quantizers.running import ProgramSettings
from weightsmith.worker.quantize_mixed import _write as write

from tests.fakes.awkward import awkward
from tests.fakes.configs import LLAMA_8B, facts
from tests.fakes.decoders import add_tokenizer, make_dense, make_sparse

ROWS = [json.loads(line) for line in GENERAL.read_text("utf-8").splitlines()[:2]]

SMALL = ("int4-32", "int4-32-zeros", "fp8")
UNITS = {
    "model.layers.0.self_attn.qkv_proj": "fp8",
    "model.layers.0.self_attn.o_proj": "int4-32",
    "model.layers.0.mlp.gate_up_proj": "int4-32-zeros",
    "model.layers.0.mlp.down_proj": "16bit",
}


SHAPES = {
    "self_attn.q_proj": (128, 128), "self_attn.k_proj": (64, 128), "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128), "mlp.gate_proj": (256, 128), "mlp.up_proj": (256, 128),
    "mlp.down_proj": (128, 256),
}  # fmt: skip


pytestmark = pytest.mark.slow  # the layers run


def make(folder, shapes):
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=shapes["mlp.up_proj"][0],
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        tie_word_embeddings=True,
    )  # fmt: skip
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for seed, (name, shape) in enumerate(shapes.items()):
        own = network.model.layers[0].get_submodule(name)
        own.weight.data = torch.from_numpy(awkward(*shape, seed)).bfloat16()
    network.save_pretrained(folder)
    add_tokenizer(folder)
    return folder


@pytest.fixture
def model(tmp_path):
    return make(tmp_path / "model", SHAPES)


def losses_of(model, harm=lambda name: 1.0):
    bits = {"int4-128": 4.125, "int4-32": 4.5, "int4-32-zeros": 4.625, "fp8": 8}
    names = {tensor_of(one) for one in matrices(CheckpointTensors(model), model)}
    return {name: {kind: harm(name) * 4 ** -bits[kind] for kind in bits} for name in names}


def made(model, out, wanted, losses=None):
    out.mkdir(exist_ok=True)
    told, texts = out / "losses.json", out / "texts.jsonl"
    told.write_text(json.dumps(losses or {}))
    texts.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    write(
        MixSettings(
            model=str(model),
            out=str(out),
            texts=str(texts),
            matrix="",
            losses=str(told),
            wanted=wanted,
            measured_on=str(model),
        )
    )
    told.unlink()
    texts.unlink()


def checked(model, out):
    request = QuantizeRequest(
        model=model,
        format=compressed_mix.MIX,
        output=out,
        name="demo",
        tools=out,
        python="",
        options={},
    )
    return of_format("mix-compressed").check(request)


def read_by_compressed_tensors(folder):
    """Return the matrices of a folder by its own config.json, decompressed by the library."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(config)
    tensors, found = load_file(folder / "model.safetensors"), {}
    for scheme in config.config_groups.values():
        assert infer_module_format(torch.nn.Linear, scheme) == scheme.format
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        for module in scheme.targets:
            own = {
                name.removeprefix(f"{module}."): value
                for name, value in tensors.items()
                if name.startswith(f"{module}.")
            }
            found[f"{module}.weight"] = compressor.decompress(own, scheme)["weight"]
    return found


def test_compressed_tensors_reads_what_we_read(model, out):
    made(model, out, {"mix": UNITS})

    facts = checked(model, out)
    assert facts["tensor_types"] == dict(sorted(UNITS.items()))
    assert facts["types"] == {"int4-32": 1, "int4-32-zeros": 2, "fp8": 3, "16bit": 1}
    assert "mix" not in facts
    view, read = view_of(out, model), read_by_compressed_tensors(out)
    assert len(read) == 6
    for name, value in read.items():
        ours = torch.from_numpy(view.tensor(name)).to(value.dtype)
        np.testing.assert_array_equal(ours.float().numpy(), value.float().numpy(), err_msg=name)
        np.testing.assert_array_equal(view.rows(name, 5, 21), view.tensor(name)[5:21])
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == ["lm_head", "model.layers.0.mlp.down_proj"]
    kept = load_file(out / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    before = load_file(model / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(kept, before)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3MoeForCausalLM"])
def test_integers_alone_are_those_of_gptq(tmp_path, architecture):
    make_any = make_sparse if "Moe" in architecture else make_dense
    model = make_any(tmp_path / "model", architecture)
    units = {unit_of(one): "int4-32" for one in matrices(CheckpointTensors(model), model)}
    made(model, tmp_path / "mix", {"mix": units})
    facts = checked(model, tmp_path / "mix")
    assert facts["calibration_tokens"] > 100
    texts = tmp_path / "texts.jsonl"
    texts.write_text(as_lines(model, ROWS))
    (tmp_path / "gptq").mkdir()
    told = ProgramSettings(
        model=model, out=tmp_path / "gptq", calibration=str(texts), method="gptq", group_size=32,
        packed=True,
    )  # fmt: skip
    quantize(told)

    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("mix", "gptq"))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_matrices_of_the_same_input_may_have_groups_of_different_sizes(tmp_path):
    """Attention and MLP of Cohere's layers get the output of one norm."""
    model = make_dense(tmp_path / "model", "Cohere2ForCausalLM", 128)
    attention = [one for one in matrices(CheckpointTensors(model), model) if "_attn" in one.module]
    others = [one for one in matrices(CheckpointTensors(model), model) if "mlp" in one.module]
    symmetric, others_own = Groups(32, symmetric=True), Groups(64, symmetric=False)
    groups = {**dict.fromkeys(attention, symmetric), **dict.fromkeys(others, others_own)}
    texts = [row["text"] for row in map(json.loads, as_lines(model, ROWS).splitlines())]

    works, facts = integers(model, tmp_path / "layers", texts, groups)

    shapes = {output.name: output.shape for work in works for output in work.outputs}
    assert facts["calibration_tokens"] > 100
    for matrix, group in groups.items():
        scales = shapes[f"{matrix.module}.weight_scale"]
        assert scales == (matrix.outputs, matrix.inputs // group.size)
        assert (f"{matrix.module}.weight_zero_point" in shapes) != group.symmetric


@pytest.mark.parametrize("bits", [9, 10, 13])
def test_a_budget_is_kept_and_what_harms_most_has_most(model, out, bits):
    made(model, out, {"bits": bits}, losses_of(model, lambda n: 1000 if "down" in n else 1))

    facts = checked(model, out)
    assert facts["bits_per_weight"] <= bits
    assert 0 < facts["mix"]["bound"] <= facts["mix"]["loss"]
    kinds = facts["tensor_types"]
    own = KINDS.index(kinds["model.layers.0.mlp.down_proj"])
    assert own >= max(map(KINDS.index, kinds.values()))


def test_what_stays_in_float32_is_counted_as_such(model, out):
    file, size = model / "model.safetensors", 480_000
    save_file({name: value.float() for name, value in load_file(file).items()}, file)
    made(model, out, {"size": size}, losses_of(model, lambda n: 1000 if "down" in n else 1))

    assert checked(model, out)["types"]["16bit"]
    assert size * 0.8 < (out / "model.safetensors").stat().st_size <= size


def test_groups_of_128_are_read_by_compressed_tensors(tmp_path, out):
    """Where eight GPUs would have whole groups of the inputs."""
    name, wide = "model.layers.0.mlp.{}_proj.weight", {"mlp.down_proj": (128, 1024)}
    wide |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (1024, 128))
    model = make(tmp_path / "model", {**SHAPES, **wide})
    made(model, out, {"bits": 5.9}, losses_of(model))

    facts = checked(model, out)
    assert facts["tensor_types"]["model.layers.0.mlp.down_proj"] == "int4-128"
    assert load_file(out / "model.safetensors")[name.format("down") + "_scale"].shape == (128, 8)
    read, view = read_by_compressed_tensors(out), view_of(out, model)
    ours = torch.from_numpy(view.tensor(name.format("down")))
    assert torch.equal(ours.bfloat16(), read[name.format("down")].bfloat16())


def test_a_size_is_that_of_the_files(model, out):
    size = 260_000
    made(model, out, {"size": size}, losses_of(model))

    assert size * 0.85 < (out / "model.safetensors").stat().st_size <= size


def test_the_same_input_gives_the_same_bytes(model, tmp_path):
    for name in ("one", "two"):
        made(model, tmp_path / name, {"bits": 9}, losses_of(model))
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))

    assert one == two


def test_the_experts_of_a_layer_have_one_type(tmp_path):
    model = make_sparse(tmp_path / "model", "Qwen2MoeForCausalLM")
    source = CheckpointTensors(model)
    found = matrices(source, model)
    mix = choose({"bits": 9}, source, model, losses_of(model))

    experts = {unit_of(one) for one in found if ".experts." in one.module}
    assert experts
    assert all(unit.endswith(".experts") for unit in experts)
    assert experts <= mix.types.keys()
    assert {unit_of(one) for one in found} == mix.types.keys()
    zeros = {**dict.fromkeys(mix.types, "int4-32"), min(experts): "int4-32-zeros"}
    with pytest.raises(InputRefused, match="cannot have the type int4-32-zeros"):
        choose({"mix": zeros}, source, model, {})


def test_a_matrix_without_losses_has_fp8(model, out):
    some = {name: each for name, each in losses_of(model).items() if "attn_k" not in name}
    mix = choose({"bits": 9}, CheckpointTensors(model), model, some)

    assert mix.types["model.layers.0.self_attn.qkv_proj"] == "fp8"


@pytest.mark.parametrize(
    ("inputs", "outputs", "kinds"),
    [
        (4096, 4096, ("int4-128", *SMALL)),
        (11008, 4096, SMALL),  # seven groups of 128 on each of eight GPUs, nearly
        (576, 192, SMALL),
        (100, 64, ("fp8",)),
        (64, 100, ("fp8",)),
    ],
)
def test_kernels_take_whole_groups(inputs, outputs, kinds):
    assert types_of(inputs, outputs) == kinds


@pytest.mark.parametrize(
    ("sizes", "bits"),
    [
        ({}, 4.125),
        (
            {
                "hidden_size": 576,
                "intermediate_size": 1536,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
            },
            4.5,
        ),
        (
            {
                "hidden_size": 100,
                "intermediate_size": 300,
                "num_attention_heads": 5,
                "num_key_value_heads": 5,
            },
            8.0,
        ),
    ],
)
def test_the_plan_knows_the_smallest_type_of_a_models_rows(sizes, bits):
    model = facts({**LLAMA_8B, "head_dim": None, **sizes})

    assert compressed_mix.fewest_bits(model) == bits


def test_what_is_too_small_names_what_works(model):
    source, losses = CheckpointTensors(model), losses_of(model)
    for wanted, what in (({"bits": 4.2}, "quantize.bits to "), ({"size": 10}, "quantize.size to ")):
        with pytest.raises(InputRefused, match="no mix is that small") as refused:
            choose(wanted, source, model, losses)
        near = refused.value.hint.split(what)[1].split(",")[0]
        works = {"bits": float(near)} if "bits" in wanted else {"size": int(near[:-2]) * 10**6}
        assert (
            choose(works, source, model, losses).types
            if "bits" in works
            else works["size"] == 10**6
        )
    with pytest.raises(InputRefused, match="room for all weights in 16 bits"):
        choose({"bits": 16}, source, model, losses)


def test_a_mix_that_quantizes_nothing_is_refused(model):
    with pytest.raises(InputRefused, match="leaves every matrix in 16 bits"):
        choose({"mix": dict.fromkeys(UNITS, "16bit")}, CheckpointTensors(model), model, {})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model.layers.7.mlp.down_proj": "fp8"}, "model.layers.7.mlp.down_proj is not in"),
        ({"model.layers.0.mlp.down_proj": None}, "model.layers.0.mlp.down_proj has no type"),
        ({"model.layers.0.mlp.down_proj": "int4-128"}, "cannot have the type int4-128"),
    ],
)
def test_the_mix_of_another_model_is_refused(model, change, why):
    given = {name: kind for name, kind in {**UNITS, **change}.items() if kind}

    with pytest.raises(InputRefused, match=why):
        choose({"mix": given}, CheckpointTensors(model), model, {})


def test_a_mix_of_llamacpp_is_refused(tmp_path):
    (tmp_path / "mix.json").write_text(json.dumps({"tensor_types": {"blk.0.attn_q": "q4_k"}}))

    with pytest.raises(InputRefused, match="vLLM's mix has no type 'q4_k'"):
        read_mix(tmp_path / "mix.json", KINDS)
    with pytest.raises(InputRefused, match="No such file") as caught:
        read_mix(tmp_path / "none.json", KINDS)
    assert "model.layers.0.self_attn.q_proj" in caught.value.hint


def test_the_check_holds_types_against_what_was_chosen(model, out):
    made(model, out, {"mix": UNITS})
    told = out / ".calibrated.json"
    mix = json.loads(told.read_text())
    told.write_text(json.dumps({**mix, "types": {**UNITS, "model.layers.0.mlp.down_proj": "fp8"}}))

    with pytest.raises(CheckFailed, match="has not the layouts that were chosen"):
        checked(model, out)


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale"])
def test_damaged_integers_are_found(model, out, part):
    made(model, out, {"mix": {**UNITS, "model.layers.0.mlp.down_proj": "int4-32"}})
    tensors = load_file(out / "model.safetensors")
    name = f"model.layers.0.mlp.down_proj.{part}"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, out / "model.safetensors")

    with pytest.raises(CheckFailed, match="has a relative error"):
        checked(model, out)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, "the format mix needs a budget"),
        ({"bits": 4.1}, r"4\.1 is not between 4\.125"),
        ({"bits": 5, "size": 10**9}, "cannot be combined"),
        ({"bits": 5, "keep": ["o_proj"]}, "keep is not supported by a mix"),
    ],
)
def test_options_that_make_no_mix_are_refused(settings, why):
    with pytest.raises(UsageError, match=why):
        of_format("mix-compressed").options(formats()["mix-compressed"], settings)


def test_settings_are_read_as_they_were_written():
    told = MixSettings(
        model="m", out="o", texts="", matrix="", losses="", wanted={"bits": 5}, measured_on="m"
    )
    assert MixSettings(**json.loads(json.dumps(asdict(told)))) == told
