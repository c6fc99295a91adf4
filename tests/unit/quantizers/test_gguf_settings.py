"""Models whose settings llama.cpp does not know are refused before any work."""

import re

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.models.facts import ModelFacts
from weightsmith.quantizers import formats, of_format
from weightsmith.quantizers.gguf_settings import as_published, other_scale

from tests.fakes.configs import config

SMALL = (2, 64, 4, 4)
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4}
REFUSED = {
    "alibi": config("FalconForCausalLM", *SMALL, intermediate_size=256, alibi=True),
    "parallel_attn: false": config(
        "FalconForCausalLM", *SMALL, intermediate_size=256, parallel_attn=False
    ),
    "mup_enabled": config("AfmoeForCausalLM", *SMALL, mup_enabled=False),
    "qk_layernorm": config("PhiForCausalLM", *SMALL, intermediate_size=256, qk_layernorm=True),
    "networks of 256, and this is 96": config("FalconForCausalLM", *SMALL, ffn_hidden_size=96),
    "networks of 256, and this is 128": config("GPT2LMHeadModel", *SMALL, n_inner=128),
    "1 heads of K and V, and this model has 4": config(
        "GPTBigCodeForCausalLM", *SMALL, intermediate_size=256, multi_query=False
    ),
    "4 heads of K and V, and this model has 2": config("OlmoeForCausalLM", 2, 64, 4, 2),
    "tokenizer that is Python code": config("HunYuanMoEV1ForCausalLM", *SMALL),
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_llama_cpp_does_not_know_is_refused(named):
    settings = {key: value for key, value in REFUSED[named].items() if value is not None}
    if "ffn_hidden_size" in settings or "n_inner" in settings:
        del settings["intermediate_size"]
    with pytest.raises(InputRefused, match=named) as caught:
        of_format("q4_k_m").check_input(formats()["q4_k_m"], ModelFacts.of(settings))
    assert "vllm" in caught.value.hint


@pytest.mark.parametrize(
    "settings",
    [
        config("FalconForCausalLM", *SMALL, intermediate_size=256, multi_query=True),
        config("AfmoeForCausalLM", *SMALL, mup_enabled=True),
        config("OlmoeForCausalLM", *SMALL),
        config("GPT2LMHeadModel", *SMALL, intermediate_size=256),
    ],
)
def test_what_it_knows_is_not(settings):
    of_format("q4_k_m").check_input(formats()["q4_k_m"], ModelFacts.of(settings))


def test_settings_that_a_model_has_stay():
    published = {"model_type": "gpt2", "n_ctx": 77, "n_positions": 128}
    assert as_published(published) == published
    assert as_published({**published, "n_ctx": None})["n_ctx"] == 128


def test_layers_that_are_not_there_are_not_counted():
    stated = {"model_type": "deepseek_v3", "num_nextn_predict_layers": 1}
    seen = {"model_type": "some", "text_config": {"mtp_num_hidden_layers": 1}}
    assert as_published(stated, predicts=True)["num_nextn_predict_layers"] == 1
    assert as_published(stated, predicts=False)["num_nextn_predict_layers"] == 0
    assert as_published(seen, predicts=False)["text_config"]["mtp_num_hidden_layers"] == 0


def test_a_nemotron_h_with_both_kinds_of_networks_is_refused():
    with pytest.raises(InputRefused, match="`moe` and `mlp`"):
        as_published({"model_type": "nemotron_h", "layers_block_type": ["mamba", "moe", "mlp"]})


GEMMA3 = {"head_dim": 256, "query_pre_attn_scalar": 256}
SCALED = [
    # As published: llama.cpp knows the 27B models by their layers.
    (config("Gemma2ForCausalLM", 26, 2304, 8, 4, **GEMMA3), ""),
    (config("Gemma2ForCausalLM", 46, 4608, 32, 16, head_dim=128, query_pre_attn_scalar=144), ""),
    (config("Gemma3ForCausalLM", 26, 1152, 4, 1, **GEMMA3), ""),
    (config("Gemma3ForCausalLM", 62, 5376, 32, 16, head_dim=128, query_pre_attn_scalar=168), ""),
    (config("Qwen3ForCausalLM", *SMALL, query_pre_attn_scalar=7), ""),
    # Not as published: another width of heads, number of layers, or scalar.
    (config("Gemma3ForCausalLM", 2, 64, 4, 1, head_dim=16), "16, not of 256"),
    (config("Gemma3TextModel", 62, 5376, 32, 16, head_dim=128), "128, not of 256"),
    (config("Gemma3ForCausalLM", 61, 5376, 32, 16, head_dim=128, query_pre_attn_scalar=168), "128"),
    (config("Gemma2ForCausalLM", 46, 4608, 32, 16, **GEMMA3), "144, not of 256"),
    (config("Gemma2ForCausalLM", *SMALL, head_dim=256, query_pre_attn_scalar=15.5), "256, .* 15.5"),
]


@pytest.mark.parametrize(("settings", "said"), SCALED)
def test_a_gemma_that_llama_cpp_scales_in_another_way(settings, said):
    found = other_scale(ModelFacts.of(settings))
    assert re.search(f"square root of {said}", found) if said else not found
