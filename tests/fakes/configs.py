"""Configurations that many tests plan for, as far as planners read them."""

from typing import Any

from weightsmith.models.facts import ModelFacts
from weightsmith.models.shape import ModelShape


def config(name: str, layers: int, hidden: int, heads: int, kv: Any, **more: Any) -> dict[str, Any]:
    return {
        "architectures": [name],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": 128_256,
        "intermediate_size": 8192,
        "max_position_embeddings": 131_072,
        "dtype": "bfloat16",
        **more,
    }


LLAMA_8B = config("LlamaForCausalLM", 32, 4096, 32, 8, model_type="llama", intermediate_size=14336)
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
QWEN3_NEXT = {
    "architectures": ["Qwen3NextForCausalLM"],
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "dtype": "bfloat16",
}


GEMMA_4 = {
    "model_type": "gemma4_text",
    "num_hidden_layers": 60,
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "max_position_embeddings": 262144,
    "sliding_window": 1024,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 10,
    "vocab_size": 262144,
    "dtype": "bfloat16",
}
"""Its text model, without the heads of its full layers."""
GEMMA_4_HEADS = {
    "as published": {"global_head_dim": 512, "num_global_key_value_heads": 4},
    "as transformers 5 writes it": {
        "per_layer_config": {
            f"{layer:02d}": {"head_dim": 512, "num_key_value_heads": 4} for layer in range(5, 60, 6)
        }
    },
}


def gemma_4(**text) -> dict:
    """Return the config.json of a model that sees, with more in its text model."""
    names = ["Gemma4ForConditionalGeneration"]
    return {"architectures": names, "model_type": "gemma4", "text_config": {**GEMMA_4, **text}}


def facts(config: dict) -> ModelFacts:
    """Return the facts of a config.json; a `tokenizer` in it is what tokenizer_config.json says."""
    tokenizer = config.get("tokenizer")
    return ModelFacts.of(config, tokenizer if isinstance(tokenizer, dict) else None)


def shape_of(config: dict) -> ModelShape:
    return facts(config).shape
