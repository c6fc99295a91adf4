"""Models whose settings llama.cpp does not know are refused before any work."""

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.models.facts import ModelFacts
from weightsmith.quantizers import formats, of_format
from weightsmith.quantizers.gguf_settings import as_published

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
