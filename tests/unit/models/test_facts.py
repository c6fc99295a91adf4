"""What a model's files say of it: read once, refused when the numbers are asked for."""

import json

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.models.facts import ModelFacts, Packing, read_facts

from tests.fakes.configs import LLAMA_8B, facts

DEEPSEEK = {
    **LLAMA_8B,
    "architectures": ["DeepseekV3ForCausalLM"],
    "n_routed_experts": 64,
    "first_k_dense_replace": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 2048,
}


def test_a_folder_is_read_with_two_keys_of_its_tokenizer(tmp_path):
    tokenizer = {"tokenizer_class": "TokenizersBackend", "model_max_length": 4096, "eos_token": 1}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B), "utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer), "utf-8")
    model = read_facts(tmp_path)

    assert model.architecture == "LlamaForCausalLM"
    assert (model.tokenizer_class, model.tokenizer_length) == ("TokenizersBackend", 4096)
    assert model.shape.kv_heads == 8
    assert model.weight_kinds == {"safetensors"}

    (tmp_path / "tokenizer_config.json").write_text("[", "utf-8")
    assert read_facts(tmp_path) == facts(LLAMA_8B), "one that cannot be read is left out"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"architectures": []}, "no architectures"),
    ],
)
def test_wrong_numbers_are_refused_when_they_are_asked_for(change, says):
    model = facts({**LLAMA_8B, **change})

    for part in ("shape", "matrices"):
        with pytest.raises(InputRefused, match=says):
            getattr(model, part)
    assert model.stated_dtype == "bfloat16"


def test_experts_are_counted_by_layer_and_odd_numbers_leave_the_shape_as_it_is():
    found = facts(DEEPSEEK).matrices
    assert (found.experts, found.sparse_layers, found.shared_experts) == (64, 29, 2)

    model = facts({**DEEPSEEK, "moe_intermediate_size": [2048, 1024]})
    assert model.shape.hidden == 4096
    with pytest.raises(InputRefused, match="moe_intermediate_size"):
        _ = model.matrices


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({}, None),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, False),
    ],
)
def test_the_text_models_part_counts_first(config, tied):
    assert ModelFacts.of(config).tied_embeddings is tied


@pytest.mark.parametrize(
    ("value", "kinds"),
    [
        ({"quant_method": "awq"}, {"awq"}),
        ({"quant_method": "mxfp4"}, {"mxfp4"}),
        ("packed somehow", set()),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": []}}, set()),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"weights": {"type": "int", "num_bits": 4}}},
            },
            {"awq", "gptq"},
        ),
    ],
)
def test_packed_weights_may_be_served_as_what_they_are(value, kinds):
    found = Packing.of(value)

    assert found is not None
    assert found.kinds == kinds


def test_a_packing_of_odd_values_is_read_all_the_same():
    odd = {"bits": "four", "group_size": None, "weight_block_size": 128, "quant_method": ["fp8"]}
    found = Packing.of(odd)

    assert found == Packing(
        method="['fp8']", bits=0, group_size=0, symmetric=True, reordered=False, block=(128,),
        kinds=frozenset(),
    )  # fmt: skip


def test_positions_are_those_of_layers_that_see_everything():
    rope = {"full_attention": {"rope_type": "yarn", "factor": 8.0}, "sliding_attention": {}}
    positions = facts({**LLAMA_8B, "rope_parameters": rope}).positions

    assert (positions.scaling, positions.factor, positions.lengths) == ("yarn", 8.0, (131072,))
    assert positions.transformers_5_only


@pytest.mark.parametrize(
    ("end", "interval", "sparse"), [(-1, 1, 31), (None, 1, 31), (27, 1, 27), (27, 2, 14)]
)
def test_experts_of_ernie_are_counted(end, interval, sparse):
    ernie = {
        **LLAMA_8B, "architectures": ["Ernie4_5_MoeForCausalLM"], "moe_num_experts": 64,
        "moe_num_shared_experts": 2, "moe_intermediate_size": 1536, "moe_layer_start_index": 1,
        "moe_layer_end_index": end, "moe_layer_interval": interval,
    }  # fmt: skip
    found = facts(ernie).matrices

    assert (found.experts, found.shared_experts, found.sparse_layers) == (64, 2, sparse)


@pytest.mark.parametrize("end", [[1], {"a": 1}, -2, "x", 1.5])
def test_a_last_layer_with_experts_that_is_no_number_is_refused(end):
    ernie = {**LLAMA_8B, "moe_num_experts": 64, "moe_layer_end_index": end}

    with pytest.raises(InputRefused, match="moe_layer_end_index"):
        _ = facts(ernie).matrices
