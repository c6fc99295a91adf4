"""Bytes of a token and of a state in models of 100 billion weights and more, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from weightsmith.serving.llamacpp_plan import attention_layers, kv_cache_bytes, kv_layer_bytes
from weightsmith.serving.paged_capacity import paged_cache

from tests.fakes.configs import QWEN3_NEXT, shape_of


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


LATENT = {
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
}  # fmt: skip
NEMOTRON = [
    {"attention": {"n_heads_in_group": 8, "no_op": False}},
    {"attention": {"n_heads_in_group": None, "no_op": True}},
    {"attention": {"n_heads_in_group": None, "replace_with_linear": True}},
    {"attention": {"n_heads_in_group": 8}},
]
FEWER = {"attention": {"n_heads_in_group": 16}}
MAMBA = {
    "hybrid_override_pattern": "M-M*-", "mamba_num_heads": 256, "mamba_head_dim": 64,
    "ssm_state_size": 256, "n_groups": 8, "conv_kernel": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "per_token"),
    [
        (config("LlamaForCausalLM", 80, 8192, 64, 8), 80 * 2 * 8 * 128 * 2),
        (config("Qwen3MoeForCausalLM", 94, 4096, 64, 4, head_dim=128), 94 * 2 * 4 * 128 * 2),
        (config("DeepseekV3ForCausalLM", 61, 7168, 128, 128, **LATENT), 61 * (512 + 64) * 2),
        (config("DeepseekV3ForCausalLM", 61, 7168, 64, 64, **LATENT), 61 * (512 + 64) * 2),
        (config("Glm4MoeForCausalLM", 92, 5120, 96, 8, head_dim=128), 92 * 2 * 8 * 128 * 2),
        (config("MistralForCausalLM", 88, 12288, 96, 8, head_dim=128), 88 * 2 * 8 * 128 * 2),
        (config("MiniMaxM2ForCausalLM", 62, 3072, 48, 8, head_dim=128, attn_type_list=[1] * 62),
         62 * 2 * 8 * 128 * 2),
        (config("DeciLMForCausalLM", 4, 8192, 64, None, block_configs=NEMOTRON),
         2 * 2 * 8 * 128 * 2),
        (config("DeciLMForCausalLM", 5, 8192, 64, None, block_configs=[FEWER, *NEMOTRON]),
         3 * 2 * 8 * 128 * 2),
    ],
    ids=["llama", "qwen", "deepseek", "kimi", "glm", "mistral", "minimax-m2", "nemotron-nas",
         "layers with fewer heads"],
)  # fmt: skip
def test_a_token_in_vllm(given: dict[str, Any], per_token: int) -> None:
    cache = paged_cache(shape_of(given), block=16, element=2, state_element=2)

    assert cache.bytes_per_block == 16 * per_token


@pytest.mark.parametrize(
    ("given", "full", "sliding", "state"),
    [
        (config("Gemma3ForCausalLM", 62, 5376, 32, 16, head_dim=128, sliding_window=1024),
         10, 52, 0),
        (QWEN3_NEXT,
         12, 0, 36 * ((2 * 2048 + 4096) * 3 + 32 * 128 * 128)),
        (config("NemotronHForCausalLM", 5, 8192, 64, 8, **MAMBA),
         1, 0, 2 * ((16384 + 2 * 8 * 256) * 3 + 16384 * 256)),
        (config("MiniMaxText01ForCausalLM", 80, 6144, 64, 8, head_dim=128,
                attn_type_list=([0] * 7 + [1]) * 10),
         10, 0, 70 * 64 * 128 * 128),
        (config("Lfm2ForCausalLM", 4, 2048, 32, 8, layer_types=["conv", "full_attention"] * 2),
         4, 0, 0),
    ],
    ids=["gemma without layer_types", "qwen3-next", "nemotron-h", "minimax-01", "unknown states"],
)  # fmt: skip
def test_a_request_in_llama_cpp(given: dict[str, Any], full: int, sliding: int, state: int) -> None:
    """Of 8,192 tokens in each of two slots; a state is in float32, however short the request."""
    model = shape_of(given)
    token = kv_layer_bytes(model, "f16", "f16")

    assert attention_layers(model) == full + sliding
    assert kv_cache_bytes(model, 8192, 2, ("f16", "f16"), 512) == 2 * (
        (full * 8192 + sliding * 1536) * token + 4 * state
    )
