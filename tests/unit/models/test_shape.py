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


INNER = {key: value for key, value in LLAMA_8B.items() if key != "architectures"}
SLIDING = {"sliding_window": 1024, "layer_types": ["sliding_attention", "full_attention"] * 16}
LATENT = {
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}


@pytest.mark.parametrize(
    ("config", "read"),
    [
        (LLAMA_8B, {"layers": 32, "kv_heads": 8, "head_dim": 128, "v_head_dim": 128}),
        (LLAMA_8B, {"max_positions": 131072, "vocab": 128256, "dtype": "bfloat16"}),
        (LLAMA_8B, {"sliding_layers": 0}),
        ({"architectures": ["Gemma3"], "text_config": INNER}, {"architecture": "Gemma3"}),
        ({"architectures": ["Gemma3"], "text_config": INNER}, {"layers": 32}),
        (LLAMA_8B | {"num_key_value_heads": None, "head_dim": 256}, {"kv_heads": 32}),
        (LLAMA_8B | {"num_key_value_heads": None, "head_dim": 256}, {"head_dim": 256}),
        (LLAMA_8B | SLIDING, {"sliding_layers": 16}),
        (LLAMA_8B | SLIDING | {"use_sliding_window": False}, {"sliding_layers": 0}),
        (LLAMA_8B | LATENT, {"kv_lora_rank": 512, "rope_head_dim": 64, "head_dim": 192}),
    ],
)
def test_what_a_config_says(config, read):
    shape = shape_of(config)

    assert {name: getattr(shape, name) for name in read} == read


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
