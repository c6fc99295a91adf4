"""A config.json that many tests plan for: Llama 3.1 8B's, as far as planners read it."""

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
