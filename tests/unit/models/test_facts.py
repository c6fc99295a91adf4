"""What a model's files say of it: read once, refused when the numbers are asked for."""

import json
import os
import warnings
from pathlib import Path

import pytest
import transformers
import weightsmith.models.facts as module
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from weightsmith.core.errors import InputRefused
from weightsmith.models.facts import ModelFacts, Packing, read_facts, text_part
from weightsmith.quantizers.schemes import SCHEMES

from tests.fakes.configs import LLAMA_8B, facts, shape_of

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
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"weights": {"type": "int", "num_bits": 8}}},
            },
            {"compressed-tensors"},
        ),
        (SCHEMES["fp8-block"].config([]), {"fp8"}),
        (SCHEMES["mxfp8"].config([]), {"mxfp8"}),
    ],
)
def test_packed_weights_may_be_served_as_what_they_are(value, kinds):
    found = Packing.of(value)

    assert found is not None
    assert found.kinds == kinds


def test_the_group_size_of_compressed_tensors_is_that_of_its_weights():
    weights = {"type": "int", "num_bits": 4, "group_size": 128}
    value = {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": weights}}}

    found = Packing.of(value)

    assert found is not None
    assert found.group_size == 128


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


FILE = Path(module.__file__).with_name("text_defaults.json")
NUMBERS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window",
)  # fmt: skip
NEEDED = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"}
GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
}
"""As published, its eyes left out."""


def told_by_transformers() -> dict[str, dict[str, int]]:
    """Return the numbers of every class that can be the text model of another."""
    inner = (getattr(one, "sub_configs", {}).get("text_config") for one in CONFIG_MAPPING.values())
    parts = {getattr(one, "model_type", "") for one in inner}
    found = {}
    for kind in sorted({*parts, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} & set(CONFIG_MAPPING)):
        try:
            told = CONFIG_MAPPING[kind]().to_dict()
            heads = 2 * (told.get("num_attention_heads") or 1)
            other = CONFIG_MAPPING[kind](num_attention_heads=heads).to_dict()
        except StrictDataclassError:  # a class whose own defaults it refuses
            continue
        # What follows from another number is worked out from that one, which may be said.
        free = [n for n in NUMBERS if n == "num_attention_heads" or told.get(n) == other.get(n)]
        numbers = {name: told[name] for name in free if type(told.get(name)) is int}
        if numbers.keys() >= NEEDED:
            found[kind] = numbers
    return found


@pytest.mark.slow
def test_the_defaults_are_those_of_transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = told_by_transformers()
    if os.environ.get("UPDATE_GOLDEN"):
        rows = [f"{json.dumps(kind)}: {json.dumps(told[kind])}" for kind in told]
        FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n", "utf-8")
    written = json.loads(FILE.read_text("utf-8"))
    assert written == told, f"transformers {transformers.__version__}: UPDATE_GOLDEN=1 writes it"


def test_gemma_3_4b_is_read_as_its_class_reads_it():
    truth = transformers.Gemma3Config(text_config=dict(GEMMA_3_4B["text_config"])).text_config
    shape = shape_of(GEMMA_3_4B)

    found = (shape.heads, shape.kv_heads, shape.head_dim, shape.vocab, shape.max_positions)
    assert found[:3] == (8, 4, 256)
    assert found == (
        truth.num_attention_heads, truth.num_key_value_heads, truth.head_dim, truth.vocab_size,
        truth.max_position_embeddings,
    )  # fmt: skip
    assert shape.sliding_window == 1024
    slides = sum(part.layers for part in shape.cache if part.kind == "sliding")
    assert slides == truth.layer_types.count("sliding_attention")


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("qwen3", {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8}),
        ("gemma", {"hidden_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 16}),
        ("mistral", {"hidden_size": 4096, "num_attention_heads": 32}),
        ("llama", {"hidden_size": 4096, "num_attention_heads": 32}),
        ("llama", {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": None}),
    ],
)
def test_heads_that_a_config_leaves_out_are_those_of_its_class(kind, config):
    truth = CONFIG_MAPPING[kind](**config)
    width = getattr(truth, "head_dim", None) or truth.hidden_size // truth.num_attention_heads
    named = {"architectures": ["X"], "model_type": kind, "vocab_size": 9, "num_hidden_layers": 1}

    shape = shape_of({**named, **config})

    assert (shape.kv_heads, shape.head_dim) == (truth.num_key_value_heads, width)


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {"text_config": None}])
def test_what_is_not_nested_is_left_as_it_is(config):
    assert text_part(config) is config


def test_what_is_said_counts():
    text = {"model_type": "llama", "num_key_value_heads": 8, "head_dim": None}
    assert text_part({"text_config": text}).items() >= text.items()
