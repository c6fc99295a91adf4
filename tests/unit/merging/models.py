"""Tiny models of real architectures."""

from __future__ import annotations

from typing import Any

SIZES = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
NARROW = {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2}
PLAIN = {"hidden_size": 32, "intermediate_size": 48}
EXPERTS = {"num_experts_per_tok": 2}
GPT = {"vocab_size": 96, "n_layer": 2, "n_head": 4, "n_embd": 32}


def model_class(kind: str) -> Any:
    """Return the class that loads a model of a kind."""
    import transformers

    words = ("bert", "distilbert", "albert", "electra", "deberta", "modernbert")
    task = dict.fromkeys(("t5", "bart"), "Seq2SeqLM") | dict.fromkeys(words, "MaskedLM")
    task |= dict.fromkeys(("vit", "cnn"), "ImageClassification")
    return getattr(transformers, f"AutoModelFor{task.get(kind, 'CausalLM')}")


def build(kind: str, **options: Any) -> Any:
    """Return a model with random weights."""
    return model_class(kind).from_config(config_of(kind, **options))


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES | NARROW),
    "qwen2": ("Qwen2Config", SIZES | NARROW),
    "qwen3": ("Qwen3Config", SIZES | NARROW | {"head_dim": 8}),
    "gemma2": ("Gemma2Config", SIZES | NARROW | {"head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", SIZES | NARROW | {"head_dim": 8}),
    "phi3": ("Phi3Config", SIZES | NARROW | {"pad_token_id": 0}),
    "gpt2": ("GPT2Config", GPT),
    "falcon": ("FalconConfig", SIZES | {"hidden_size": 32}),
    "t5": (
        "T5Config",
        {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
    "bert": ("BertConfig", SIZES | PLAIN),
    "distilbert": (
        "DistilBertConfig",
        {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    ),
    "albert": ("AlbertConfig", SIZES | PLAIN | {"embedding_size": 16}),
    "electra": ("ElectraConfig", SIZES | PLAIN | {"embedding_size": 16}),
    "deberta": ("DebertaV2Config", SIZES | PLAIN),
    "modernbert": (
        "ModernBertConfig",
        SIZES
        | PLAIN
        | dict.fromkeys(("pad_token_id", "bos_token_id", "cls_token_id"), 0)
        | dict.fromkeys(("eos_token_id", "sep_token_id"), 1),
    ),
    "bert_generation": ("BertGenerationConfig", SIZES | PLAIN | {"is_decoder": True}),
    "biogpt": ("BioGptConfig", SIZES | PLAIN),
    "openai": ("OpenAIGPTConfig", GPT),
    "ctrl": ("CTRLConfig", GPT | {"n_positions": 32, "dff": 48}),
    "mamba": ("MambaConfig", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}),
    "mamba2": (
        "Mamba2Config",
        {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
        | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    ),
    "bart": (
        "BartConfig",
        {"vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
        | {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48},
    ),
    "vit": (
        "ViTConfig",
        PLAIN
        | {"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4},
    ),
    "cnn": (
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        SIZES | NARROW | EXPERTS | {"moe_intermediate_size": 24, "num_experts": 4, "head_dim": 8},
    ),
    "mixtral": ("MixtralConfig", SIZES | NARROW | {"num_local_experts": 4}),
    "aria": (
        "AriaTextConfig",
        SIZES | NARROW | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    ),
    "granitemoe": ("GraniteMoeConfig", SIZES | NARROW | EXPERTS | {"num_local_experts": 4}),
    "jetmoe": (
        "JetMoeConfig",
        {"vocab_size": 96, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 24}
        | {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4},
    ),
    "hy_v3": (
        "HYV3Config",
        SIZES | NARROW | EXPERTS | {"moe_intermediate_size": 24, "num_experts": 4, "head_dim": 8},
    ),
    "nemotron_h": (
        "NemotronHConfig",
        SIZES
        | NARROW
        | EXPERTS
        | {"layers_block_type": ["mamba", "moe", "attention", "mlp"], "head_dim": 8}
        | {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1}
        | {"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 24}
        | {"moe_shared_expert_intermediate_size": 24},
    ),
    "hrm_text": (
        "HrmTextConfig",
        SIZES
        | PLAIN
        | {"num_key_value_heads": 4, "head_dim": 8}
        | {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    ),
    "sarvam_moe": (
        "SarvamMoEConfig",
        SIZES
        | NARROW
        | EXPERTS
        | {"head_dim": 8, "moe_intermediate_size": 24, "n_routed_experts": 4},
    ),
    "gpt_oss": ("GptOssConfig", SIZES | NARROW | EXPERTS | {"num_local_experts": 4, "head_dim": 8}),
}


def config_of(kind: str, **options: Any) -> Any:
    """Return a kind's configuration, as small as it goes."""
    import transformers

    name, sizes = CONFIGS[kind]
    return getattr(transformers, name)(**sizes | options)
