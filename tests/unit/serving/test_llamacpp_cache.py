from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.serving.llamacpp_plan import growth_bytes, kv_cache_bytes, kv_layer_bytes, padded
from weightsmith.serving.memory import GIB

from tests.fakes import configs
from tests.fakes.configs import GEMMA_4_HEADS, facts, gemma_4, shape_of

F16 = ("f16", "f16")

LLAMA_8B = shape_of(configs.LLAMA_8B)


def test_llama_8b_takes_128_kib_per_token():
    # 32 layers x 8 heads x (128 + 128) x 2 bytes = 131072; at 131072 tokens that is 16 GiB.
    per_layer = kv_layer_bytes(LLAMA_8B, "f16", "f16")

    assert per_layer * 32 == 131072
    assert kv_cache_bytes(LLAMA_8B, 131072, 1, F16, 512) == 16 * GIB


def test_packed_types_take_their_block_bytes():
    # q8_0: 34 bytes for 32 elements: 8 heads x 128/32 blocks x 34 = 1088 for keys.
    assert kv_layer_bytes(LLAMA_8B, "q8_0", "f16") == 1088 + 8 * 128 * 2
    assert kv_layer_bytes(LLAMA_8B, "q4_0", "q4_0") == 2 * 8 * 4 * 18

    with pytest.raises(UsageError, match="does not divide"):
        kv_layer_bytes(replace(LLAMA_8B, head_dim=80), "q8_0", "f16")
    with pytest.raises(UsageError, match="q3_0"):
        kv_layer_bytes(LLAMA_8B, "q3_0", "f16")


def test_latent_attention_keeps_one_row_and_no_values():
    # DeepSeek-V3: (512 + 64) x 2 bytes x 61 layers = 70272 bytes per token.
    shape = replace(LLAMA_8B, layers=61, kv_lora_rank=512, rope_head_dim=64)

    assert kv_layer_bytes(shape, "f16", "f16") * 61 == 70272


def test_sliding_layers_hold_window_and_micro_batch():
    kinds = (*["sliding_attention"] * 5, "full_attention")
    slides = {"layers": 6, "layer_types": kinds, "sliding_window": 1024}
    shape = replace(LLAMA_8B, architecture="Gemma3ForCausalLM", **slides)

    # One full layer of 8192 tokens, five of 1024 + 512, for two slots, 4096 bytes a token.
    assert kv_cache_bytes(shape, 8192, 2, F16, 512) == 2 * (8192 + 5 * 1536) * 4096
    # A model that llama.cpp does not slide is planned at full length.
    other = replace(shape, architecture="MistralForCausalLM")
    assert kv_cache_bytes(other, 8192, 2, F16, 512) == 2 * 6 * 8192 * 4096


@pytest.mark.parametrize("heads", GEMMA_4_HEADS.values(), ids=GEMMA_4_HEADS)
def test_the_full_layers_of_gemma_4_have_wider_heads(heads):
    shape = shape_of(gemma_4(**heads))
    full, sliding = 10 * 8192 * 2 * 4 * 512 * 2, 50 * 1536 * 2 * 16 * 256 * 2

    assert kv_cache_bytes(shape, 8192, 3, F16, 512) == 3 * (full + sliding)
    assert growth_bytes(shape, F16) == 10 * 2 * 4 * 512 * 2
    shared = shape_of(gemma_4(**heads, num_kv_shared_layers=30))  # they have no cache
    assert growth_bytes(shared, F16) == 5 * 2 * 4 * 512 * 2


def test_layers_of_one_kind_with_different_heads_are_refused():
    (_, resaved) = GEMMA_4_HEADS.values()
    found = facts(gemma_4(per_layer_config={**resaved["per_layer_config"], "05": {"head_dim": 1}}))

    with pytest.raises(InputRefused, match="different numbers or widths"):
        _ = found.shape


@given(st.integers(min_value=1, max_value=10**6))
def test_padding_is_the_next_multiple_of_256(tokens):
    assert padded(tokens) % 256 == 0
    assert 0 <= padded(tokens) - tokens < 256
