import warnings

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from weightsmith.core.errors import InputRefused

from tests.fakes import configs
from tests.fakes.configs import shape_of

LLAMA_8B = {name: value for name, value in configs.LLAMA_8B.items() if name != "dtype"}
LLAMA_8B |= {"torch_dtype": "bfloat16"}  # as transformers 4 spells it


def test_reads_a_llama_config():
    shape = shape_of(LLAMA_8B)

    assert (shape.layers, shape.kv_heads, shape.head_dim, shape.v_head_dim) == (32, 8, 128, 128)
    assert (shape.max_positions, shape.vocab, shape.dtype) == (131072, 128256, "bfloat16")
    assert shape.sliding_layers == 0


def test_reads_the_nested_text_config_of_a_multimodal_model():
    inner = {key: value for key, value in LLAMA_8B.items() if key != "architectures"}

    shape = shape_of({"architectures": ["Gemma3"], "text_config": inner})

    assert (shape.architecture, shape.layers) == ("Gemma3", 32)


def test_heads_without_groups_are_their_own_and_head_dim_wins_over_the_quotient():
    shape = shape_of({**LLAMA_8B, "num_key_value_heads": None, "head_dim": 256})

    assert (shape.kv_heads, shape.head_dim) == (32, 256)


def test_feed_forward_networks_may_differ_in_width():
    """Gemma 3n's configuration lists a width for each layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.Gemma3nTextConfig(intermediate_size=[8192] * 34 + [16384]).to_dict()

    assert shape_of(config | {"architectures": ["Gemma3nForCausalLM"]}).intermediate == 16384


@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba", "Rwkv"])
def test_a_model_of_states_alone_is_refused_by_its_kind(kind):
    config = getattr(transformers, f"{kind}Config")().to_dict()

    with pytest.raises(InputRefused, match="states instead of attention"):
        shape_of(config | {"architectures": [f"{kind}ForCausalLM"]})


def test_counts_sliding_layers():
    kinds = ["sliding_attention", "full_attention"] * 16
    config = {**LLAMA_8B, "sliding_window": 1024, "layer_types": kinds}

    assert shape_of(config).sliding_layers == 16
    assert shape_of({**config, "use_sliding_window": False}).sliding_layers == 0


def test_latent_attention_has_its_ranks():
    ranks = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128}
    shape = shape_of({**LLAMA_8B, **ranks, "v_head_dim": 128})

    assert (shape.kv_lora_rank, shape.rope_head_dim, shape.head_dim) == (512, 64, 192)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 10**9}, "outside"),
        ({"num_attention_heads": None}, "has no num_attention_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 5}, "not a multiple"),
        ({"hidden_size": 4095}, "hidden_size 4095 is not a multiple"),
        ({"hidden_size": "4096"}, "not an integer"),
        ({"vocab_size": True}, "not an integer"),
        ({"architectures": []}, "no architectures"),
        ({"layer_types": ["full_attention"]}, "1 entries for 32 layers"),
        ({"max_position_embeddings": -5}, "max_position_embeddings is -5"),
    ],
)
def test_refuses_lying_numbers(change, says):
    with pytest.raises(InputRefused, match=says):
        shape_of({**LLAMA_8B, **change})


@given(
    st.dictionaries(
        st.sampled_from([*LLAMA_8B, "head_dim", "sliding_window", "layer_types", "text_config"]),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text()),
    )
)
def test_any_config_is_read_or_refused(change):
    try:
        shape = shape_of({**LLAMA_8B, **change})
    except InputRefused:
        return
    assert min(shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.vocab) > 0
