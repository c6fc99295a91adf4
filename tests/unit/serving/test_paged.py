"""vLLM's block rules against its own formula; tokens and states by hand."""

from typing import Any

import pytest
from weightsmith.serving.llamacpp_plan import attention_layers, kv_cache_bytes, kv_layer_bytes
from weightsmith.serving.memory import GIB
from weightsmith.serving.paged_capacity import paged_cache

from tests.fakes.configs import GEMMA_4_HEADS, LLAMA_8B, QWEN3_NEXT, config, gemma_4, shape_of

QWEN3_8B = {**LLAMA_8B, "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 36}
GEMMA3_27B = config(
    "Gemma3ForConditionalGeneration", 62, 5376, 32, 16,
    head_dim=128, sliding_window=1024, sliding_window_pattern=6,
)  # fmt: skip
GPT_OSS_20B = config(
    "GptOssForCausalLM", 24, 2880, 64, 8,
    head_dim=64, sliding_window=128, layer_types=["sliding_attention", "full_attention"] * 12,
)  # fmt: skip
LATENT = {
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
}  # fmt: skip
DEEPSEEK_V3 = config("DeepseekV3ForCausalLM", 61, 7168, 128, 128, **LATENT)


def pool(of, **options):
    return paged_cache(shape_of(of), **{"block": 16, "element": 2.0, "state_element": 2, **options})


@pytest.mark.parametrize(
    ("of", "element", "tokens", "inflight", "blocks", "need"),
    [
        (LLAMA_8B, 2, 131072, 16384, 8192, 16.00),
        (LLAMA_8B, 2, 8192, 16384, 512, 1.00),
        (QWEN3_8B, 1, 32768, 16384, 2048, 2.25),
        (GEMMA3_27B, 2, 32768, 16384, 8582, 10.48),
        (GPT_OSS_20B, 2, 131072, 16384, 9225, 3.38),
    ],
)
def test_a_request_takes_what_vllm_says(of, element, tokens, inflight, blocks, need):
    cache = pool(of, element=element)

    assert cache.blocks(tokens, inflight) == blocks
    assert round(blocks * cache.bytes_per_block / GIB, 2) == need


def test_fifteen_gib_hold_fifteen_requests_by_vllms_figure_and_one_less_for_sure():
    cache = pool(LLAMA_8B)

    assert cache.number(15 * GIB) / cache.blocks(8192, 16384) == 15.0
    # The null block is reserved, so the fifteenth request would lack one.
    assert (cache.number(15 * GIB) - 1) // cache.blocks(8192, 16384) == 14


def test_hybrid_groups_are_of_the_smaller_kinds_size():
    gemma = pool(GEMMA3_27B)

    assert [(group.kind, group.count) for group in gemma.groups] == [("full", 1), ("sliding", 6)]
    assert gemma.bytes_per_block == 10 * 16 * 16 * 256 * 2


def test_kinds_of_nearly_equal_number_share_one_size():
    kinds = ["full_attention"] * 10 + ["sliding_attention"] * 14
    cache = pool({**GPT_OSS_20B, "layer_types": kinds})

    assert [group.count for group in cache.groups] == [1, 1]
    assert cache.bytes_per_block == 14 * 16 * 2 * 8 * 64 * 2


def test_without_the_hybrid_manager_every_layer_keeps_all():
    cache = pool(GPT_OSS_20B, hybrid=False)
    assert cache.blocks(131072, 16384) == 8192
    assert cache.bytes_per_block == 24 * 16 * 8 * 128 * 2
    wider = pool(gemma_4(**GEMMA_4_HEADS["as published"]), hybrid=False)
    assert wider.blocks(8192, 2048) == 512
    assert wider.bytes_per_block == 16 * (10 * 8192 + 50 * 16384)


@pytest.mark.parametrize(("shards", "heads"), [(1, 8), (2, 4), (8, 1), (16, 1)])
def test_key_value_heads_are_divided_and_then_repeated(shards, heads):
    cache = pool(LLAMA_8B, tensor_parallel=shards)

    assert cache.bytes_per_block == 32 * 16 * heads * 256 * 2


def test_latent_attention_is_not_divided():
    assert pool(DEEPSEEK_V3, tensor_parallel=8) == pool(DEEPSEEK_V3)
    sparse = pool(DEEPSEEK_V3, element=1, sparse=True)
    assert sparse.bytes_per_block == 61 * 16 * 656


def test_stages_hold_their_part_of_the_layers():
    assert pool(LLAMA_8B, pipeline_parallel=3).bytes_per_block == 11 * 16 * 8 * 256 * 2


def test_chunked_layers_keep_a_chunk():
    cache = pool({**LLAMA_8B, "attention_chunk_size": 8192, "no_rope_layers": [1, 1, 1, 0] * 8})

    # 8 full and 24 chunked layers: groups of 8, 1 + 3; (8192 + 8192) / 16 = 1024 blocks each.
    assert cache.blocks(131072, 8192) == 8192 + 3 * 1024


def test_states_make_attention_blocks_as_large_as_they_are():
    cache = pool(QWEN3_NEXT)

    # A state: convolution (2 x 2048 + 4096) x 3 and 32 x 128 x 128 numbers of 2 bytes, 1097728;
    # a token: 2 heads x 512 x 2 = 2048 bytes; 536 tokens would do, blocks go in steps of 16.
    assert cache.block == 544
    assert [(g.kind, g.count) for g in cache.groups] == [("full", 1), ("state", 3)]
    assert cache.blocks(5440, 0) == 10 + 3 * 2
    assert pool(QWEN3_NEXT, prefix_caching=False).blocks(5440, 0) == 10 + 3


@pytest.mark.parametrize("heads", GEMMA_4_HEADS.values(), ids=GEMMA_4_HEADS)
def test_layers_with_smaller_tokens_have_longer_blocks(heads):
    """A token of Gemma 4's full layers is half as large as one of its sliding ones."""
    cache = pool(gemma_4(**heads))

    # A page: 16 tokens x 16 heads x (256 + 256) x 2 bytes, or 32 tokens x 4 x (512 + 512) x 2.
    assert cache.bytes_per_block == 10 * 262144
    found = [(group.kind, group.count, group.block) for group in cache.groups]
    assert found == [("full", 1, 32), ("sliding", 5, 16)]
    assert cache.blocks(8192, 2048) == 256 + 5 * ((1023 + 2048 + 15) // 16 + 1)
    assert cache.growth == 10 * 8192


def test_expanded_latent_attention_keeps_every_head():
    """MiniCPM 3 has the numbers of latent attention, and vLLM caches its keys and values whole."""
    numbers = {"kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32}
    expanded = config("MiniCPM3ForCausalLM", 32, 4096, 32, 32, **numbers, v_head_dim=64)

    assert pool(expanded).bytes_per_block == 16 * 32 * 32 * (96 + 96) * 2


def test_every_layer_of_falcon_h1_attends_and_keeps_a_state():
    state = {"mamba_n_heads": 24, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1}
    shape = shape_of(config("FalconH1ForCausalLM", 32, 4096, 32, 8, **state, mamba_d_conv=4))

    assert [(part.kind, part.layers) for part in shape.cache] == [("full", 32), ("state", 32)]
    (_, states) = shape.cache
    assert (states.convolved, states.recurrent) == ((1536 + 2 * 128) * 3, 24 * 64 * 128)


def test_short_convolutions_keep_their_last_inputs():
    layers = {"layer_types": ["conv", "conv", "conv", "full_attention"] * 8, "conv_dim": 2048}
    lfm = config("Lfm2ForCausalLM", 32, 4096, 32, 8, **layers, conv_L_cache=3)
    shape = shape_of(lfm)

    assert [(part.kind, part.layers) for part in shape.cache] == [("full", 8), ("state", 24)]
    assert shape.cache[1].convolved == 2 * 2048
    assert pool(lfm).bytes_per_block == 8 * 16 * 2 * 8 * 128 * 2


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
        (DEEPSEEK_V3, 61 * (512 + 64) * 2),
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
    assert pool(given).bytes_per_block == 16 * per_token


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
