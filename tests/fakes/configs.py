"""Configurations that many tests plan for, as far as planners read them."""

from weightsmith.checkpoints.facts import ModelFacts
from weightsmith.checkpoints.shape import ModelShape

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "dtype": "bfloat16",
}
LLAMA_8B_BYTES = 16_060_522_496
"""Its weights in 16 bits."""
SMOL = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "vocab_size": 49152,
}


def facts(config: dict) -> ModelFacts:
    """Return the facts of a config.json; a `tokenizer` in it is what tokenizer_config.json says."""
    tokenizer = config.get("tokenizer")
    return ModelFacts.of(config, tokenizer if isinstance(tokenizer, dict) else None)


def shape_of(config: dict) -> ModelShape:
    """Return the decoder's numbers of a config.json."""
    return facts(config).shape
