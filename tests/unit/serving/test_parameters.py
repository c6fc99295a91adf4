"""The size of weights that are not there yet, against real checkpoints and transformers' models."""

import json

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.serving.parameters import parameters, weights_from_config

from tests.fakes.configs import facts
from tests.paths import ROOT

MODELS = ROOT / "tests" / "golden" / "models"


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
OLD = {"intermediate_size": 1024, "num_key_value_heads": 8}
"""Of families that have neither of the two keys."""
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
    "cohere": ("CohereForCausalLM", {}),
    "cohere2": ("Cohere2ForCausalLM", {}),
    "glm": ("GlmForCausalLM", {"head_dim": 32}),
    "glm4": ("Glm4ForCausalLM", {"head_dim": 32}),
    "olmo": ("OlmoForCausalLM", {}),
    "seed_oss": ("SeedOssForCausalLM", {"head_dim": 32}),
    "stablelm": ("StableLmForCausalLM", {}),
    "exaone4": ("Exaone4ForCausalLM", {}),
    "bloom": ("BloomForCausalLM", {**OLD}),
    "falcon": ("FalconForCausalLM", {**OLD}),
    "gpt2": ("GPT2LMHeadModel", {**OLD, "n_positions": 64}),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", {**OLD, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXForCausalLM", {**OLD}),
    "nemotron": ("NemotronForCausalLM", {}),
    "opt": (
        "OPTForCausalLM",
        {**OLD, "ffn_dim": 1024, "word_embed_proj_dim": 256, "max_position_embeddings": 64},
    ),
    "phi": ("PhiForCausalLM", {}),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    "arcee": ("ArceeForCausalLM", {}),
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


TEXT = {**SMALL, "num_hidden_layers": 12, "vocab_size": 30_000}
TOWER = {"hidden_size": 128, "intermediate_size": 300, "image_size": 56, "patch_size": 14}
DEEP = {**TOWER, "num_hidden_layers": 4, "num_attention_heads": 4}
QWEN = {"depth": 4, "num_heads": 4, "out_hidden_size": 256, "patch_size": 14}
SEEING = {
    "qwen2_vl": ("Qwen2VL", "", {**QWEN, "embed_dim": 128, "hidden_size": 256}),
    "qwen2_5_vl": ("Qwen2_5_VL", "", {**QWEN, "hidden_size": 128, "intermediate_size": 300}),
    "qwen3_vl": (
        "Qwen3VL",
        "",
        {**QWEN, "hidden_size": 128, "intermediate_size": 300, "num_position_embeddings": 16,
         "deepstack_visual_indexes": [1, 2]},
    ),
    "mistral3": ("Mistral3", "mistral", {**DEEP, "model_type": "pixtral", "head_dim": 32}),
    "llava": ("Llava", "llama", {**DEEP, "model_type": "clip_vision_model"}),
    "internvl": (
        "InternVL",
        "qwen2",
        {**DEEP, "model_type": "internvl_vision", "image_size": [56, 56], "patch_size": [14, 14]},
    ),
    "gemma3": ("Gemma3", "gemma3_text", {**DEEP, "model_type": "siglip_vision_model"}),
    "paligemma": ("PaliGemma", "gemma", {**DEEP, "model_type": "siglip_vision_model"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SEEING)
def test_transformers_builds_as_many_parameters_of_models_that_see(kind):
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    family, text, tower = SEEING[kind]
    words = {**TEXT, **({"model_type": text} if text else {})}
    given = AutoConfig.for_model(
        kind, text_config=words, vision_config=tower, tie_word_embeddings="emma" in text
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(given)
    built = sum(weight.numel() for weight in model.parameters())
    told = {**given.to_dict(), "architectures": [f"{family}ForConditionalGeneration"]}

    assert parameters(facts(told)).all == pytest.approx(built, rel=0.02)


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
