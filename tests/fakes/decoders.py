"""Small random decoders of every architecture that is quantized here, dense and with experts."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.paths import TINY

_DENSE = {
    name: kind
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    if CONFIG_MAPPING_NAMES[kind].removesuffix("Config").removesuffix("Text")
    == str(name).removesuffix("ForCausalLM")
}
"""Architecture -> model type, where the configuration is that class's own."""


_COUNTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 32,
}  # fmt: skip
_SPARSE: dict[str, tuple[str, dict[str, Any]]] = {
    "DeepseekV2ForCausalLM": ("deepseek_v2", {**_ROUTED, **_LATENT, "topk_method": "greedy"}),
    "DeepseekV3ForCausalLM": ("deepseek_v3", {**_ROUTED, **_LATENT, "head_dim": 16}),
    "Glm4MoeForCausalLM": ("glm4_moe", _ROUTED),
    "GptOssForCausalLM": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "GraniteMoeForCausalLM": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Llama4ForCausalLM": (
        "llama4_text",
        {"num_local_experts": 4, "intermediate_size_mlp": 256, "interleave_moe_layer_step": 2},
    ),
    "MiniMaxM2ForCausalLM": ("minimax_m2", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "MixtralForCausalLM": ("mixtral", {"num_local_experts": 4}),
    "OlmoeForCausalLM": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2MoeForCausalLM": (
        "qwen2_moe",
        {**_COUNTED, "shared_expert_intermediate_size": 128, "mlp_only_layers": [0]},
    ),
    "Qwen3MoeForCausalLM": ("qwen3_moe", _COUNTED),
}
"""Architecture -> model type, and what its configuration has beside a dense decoder's."""


def make_dense(folder: Path, architecture: str, hidden: int = 64) -> Path:
    """Write a model in bfloat16 that has the tiny example's tokenizer; return its folder."""
    sizes = {"intermediate_size": 2 * hidden, "num_key_value_heads": 2}
    return _make(folder, _DENSE[architecture], hidden, sizes)


def make_sparse(folder: Path, architecture: str, hidden: int = 128) -> Path:
    kind, more = _SPARSE[architecture]
    return _make(folder, kind, hidden, {"intermediate_size": 256, "num_key_value_heads": 4, **more})


def _make(folder: Path, kind: str, hidden: int, more: dict[str, Any]) -> Path:
    config = CONFIG_MAPPING[kind](**{
        "vocab_size": 512, "hidden_size": hidden, "num_hidden_layers": 2,
        "num_attention_heads": 4, "head_dim": hidden // 4, "max_position_embeddings": 512,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, **more,
    })  # fmt: skip
    torch.manual_seed(0)
    return save_random(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), folder)


def save_random(network: Any, folder: Path) -> Path:
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.06)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    network.save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def add_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / "base" / name, folder)
