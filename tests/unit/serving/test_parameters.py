"""The size of weights that are not there yet, against real checkpoints and transformers' models."""

import json
from pathlib import Path

import pytest
from weightsmith.errors import InputRefused
from weightsmith.serving.parameters import parameters, weights_from_config

from tests.fakes.configs import facts

MODELS = Path(__file__).parents[2] / "golden" / "models"


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.json")), ids=lambda path: path.stem)
def test_published_checkpoints_weigh_what_is_worked_out(path):
    """`weight_bytes` there is what the checkpoint's own index says."""
    told = json.loads(path.read_text("utf-8"))

    assert weights_from_config(facts(told["config"])) == pytest.approx(
        told["weight_bytes"], rel=0.002
    )


SMALL = {
    "num_hidden_layers": 3,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "dtype": "bfloat16",
    "pad_token_id": 0,
}
MOE = {"num_experts": 6, "moe_intermediate_size": 96}
LATENT = {"kv_lora_rank": 64, "q_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32}
FAMILIES = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {"head_dim": 64}),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {**MOE, "shared_expert_intermediate_size": 128, "decoder_sparse_step": 2},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 64}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**MOE, "head_dim": 32, "mlp_only_layers": [1]}),
    "gemma2": ("Gemma2ForCausalLM", {"head_dim": 32}),
    "gemma3_text": ("Gemma3ForCausalLM", {"head_dim": 32}),
    "phi3": ("Phi3ForCausalLM", {}),
    "granite": ("GraniteForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "smollm3": ("SmolLM3ForCausalLM", {}),
    "gpt_oss": ("GptOssForCausalLM", {"num_local_experts": 4, "head_dim": 32}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 2, "head_dim": 32,
         "moe_intermediate_size": 96, "moe_layer_start_index": 1, "moe_layer_end_index": -1},
    ),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        {"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 96,
         "first_k_dense_replace": 1, "head_dim": 32},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {**LATENT, "v_head_dim": 32, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2,
         "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 96,
         "first_k_dense_replace": 1, "num_key_value_heads": 8},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_transformers_builds_as_many_parameters(kind):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture, own = FAMILIES[kind]
    given = AutoConfig.for_model(kind, **{**SMALL, **own})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(given)
    built = sum(weight.numel() for weight in model.parameters())
    # Layers of multi-token prediction are in files, and transformers builds none.
    told = {**given.to_dict(), "architectures": [architecture], "num_nextn_predict_layers": 0}

    # Norms and biases, which are left out, are a larger part of so small a model.
    assert parameters(facts(told)).all == pytest.approx(built, rel=0.012)
    assert parameters(facts(told)).all <= built


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": ["JambaForCausalLM"]}, "cannot be worked out"),
        ({"architectures": ["MixtralForCausalLM"]}, "does not say how many"),
        ({"quantization_config": {"quant_method": "hqq"}}, "size of hqq weights"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3}}, "size of gptq weights"),
        ({"num_experts": -4}, "not a non-negative integer"),
        ({"vision_config": {"hidden_size": "wide"}}, "not a non-negative integer"),
    ],
)
def test_what_cannot_be_worked_out_is_refused(change, says):
    config = {**SMALL, "architectures": ["LlamaForCausalLM"], **change}

    with pytest.raises(InputRefused, match=says):
        weights_from_config(facts(config))
