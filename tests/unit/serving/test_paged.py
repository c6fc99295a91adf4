"""The block rules of vLLM against the values that its own formula gives."""

import pytest
from weightsmith.serving.memory import GIB
from weightsmith.serving.paged_capacity import paged_cache

from tests.fakes.configs import GEMMA_4_HEADS, LLAMA_8B, QWEN3_NEXT, gemma_4, shape_of

QWEN3_8B = {**LLAMA_8B, "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 36}
GEMMA3_27B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {
        "num_hidden_layers": 62,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
        "vocab_size": 262208,
        "dtype": "bfloat16",
    },
}
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"],
    "num_hidden_layers": 24,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "vocab_size": 201088,
}
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "max_position_embeddings": 163840,
    "vocab_size": 129280,
}


def pool(config, *, element=2.0, **options):
    return paged_cache(
        shape_of(config),
        **{"block": 16, "element": element, "state_element": 2, **options},
    )


@pytest.mark.parametrize(
    ("config", "element", "tokens", "inflight", "blocks", "need"),
    [
        (LLAMA_8B, 2, 131072, 16384, 8192, 16.00),
        (LLAMA_8B, 2, 8192, 16384, 512, 1.00),
        (QWEN3_8B, 1, 32768, 16384, 2048, 2.25),
        (GEMMA3_27B, 2, 32768, 16384, 8582, 10.48),
        (GPT_OSS_20B, 2, 131072, 16384, 9225, 3.38),
    ],
)
def test_a_request_takes_what_vllm_says(config, element, tokens, inflight, blocks, need):
    cache = pool(config, element=element)

    assert cache.blocks(tokens, inflight) == blocks
    assert round(blocks * cache.bytes_per_block / GIB, 2) == need


@pytest.mark.parametrize(
    ("config", "element", "per_token"),
    [(LLAMA_8B, 2, 131072), (QWEN3_8B, 1, 73728), (DEEPSEEK_V3, 2, 70272)],
)
def test_bytes_per_token(config, element, per_token):
    cache = pool(config, element=element)

    assert cache.bytes_per_block == 16 * per_token


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
    config = {**LLAMA_8B, "attention_chunk_size": 8192, "no_rope_layers": [1, 1, 1, 0] * 8}
    cache = pool(config)

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
    assert [(g.kind, g.count, g.block) for g in cache.groups] == [
        ("full", 1, 32),
        ("sliding", 5, 16),
    ]
    assert cache.blocks(8192, 2048) == 256 + 5 * ((1023 + 2048 + 15) // 16 + 1)
    assert cache.growth == 10 * 8192


def test_without_the_hybrid_manager_every_layer_keeps_all_tokens():
    cache = pool(gemma_4(**GEMMA_4_HEADS["as published"]), hybrid=False)

    assert cache.blocks(8192, 2048) == 512
    assert cache.bytes_per_block == 16 * (10 * 8192 + 50 * 16384)


def test_expanded_latent_attention_keeps_every_head():
    """MiniCPM 3 has the numbers of latent attention, and vLLM caches its keys and values whole."""
    numbers = {"kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32}
    config = {**LLAMA_8B, **numbers, "v_head_dim": 64, "num_key_value_heads": 32}

    token = 32 * 32 * (96 + 96) * 2
    assert pool({**config, "architectures": ["MiniCPM3ForCausalLM"]}).bytes_per_block == 16 * token


def test_every_layer_of_falcon_h1_attends_and_keeps_a_state():
    state = {"mamba_n_heads": 24, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1}
    config = {**LLAMA_8B, **state, "architectures": ["FalconH1ForCausalLM"], "mamba_d_conv": 4}
    shape = shape_of(config)

    assert [(part.kind, part.layers) for part in shape.cache] == [("full", 32), ("state", 32)]
    (_, states) = shape.cache
    assert (states.convolved, states.recurrent) == ((1536 + 2 * 128) * 3, 24 * 64 * 128)


def test_short_convolutions_keep_their_last_inputs():
    config = {**LLAMA_8B, "architectures": ["Lfm2ForCausalLM"], "conv_L_cache": 3}
    config |= {"layer_types": ["conv", "conv", "conv", "full_attention"] * 8, "conv_dim": 2048}
    shape = shape_of(config)

    assert [(part.kind, part.layers) for part in shape.cache] == [("full", 8), ("state", 24)]
    assert shape.cache[1].convolved == 2 * 2048
    assert pool(config).bytes_per_block == 8 * 16 * 2 * 8 * 128 * 2
