"""Checkpoints of several parts leave out what is the default of their text model's class."""

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
from weightsmith.models.facts import text_part

from tests.fakes.configs import shape_of

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


@pytest.mark.parametrize("config", [{"model_type": "gemma3_text"}, {"text_config": None}])
def test_what_is_not_nested_is_left_as_it_is(config):
    assert text_part(config) is config


def test_what_is_said_counts():
    text = {"model_type": "llama", "num_key_value_heads": 8, "head_dim": None}
    assert text_part({"text_config": text}).items() >= text.items()
