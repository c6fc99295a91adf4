"""Small random models: decoders, dense and with experts, and any that transformers knows."""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
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


_SMALL = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "global_head_dim": 32,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "moe_intermediate_size": 128,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1,
    "mamba_d_state": 16, "linear_num_key_heads": 4, "linear_num_value_heads": 4,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32, "vocab_size_per_layer_input": 512,
    "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0,
}  # fmt: skip
_TOWER = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "image_size": 28, "patch_size": 14, "depth": 1,
    "num_heads": 2, "out_hidden_size": 128,
}  # fmt: skip
_ALSO_UNSET = ("head_dim", "intermediate_size", "num_key_value_heads")
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_BOTH = {"layer_types": ["linear_attention", "full_attention"]}
_OWN: dict[str, dict[str, Any]] = {
    "AfmoeForCausalLM": {
        "n_group": 1,
        "route_norm": True,
        "score_func": "sigmoid",
        "topk_group": 1,
    },
    "Glm4MoeLiteForCausalLM": {"first_k_dense_replace": 1},
    "GraniteMoeHybridForCausalLM": {"mamba_d_head": 64, "layer_types": ["mamba", "attention"]},
    "HYV3ForCausalLM": {
        "expert_hidden_dim": 128,
        "first_k_dense_replace": 1,
        "qk_norm": True,
        "route_norm": True,
    },
    "Lfm2ForCausalLM": {
        "block_auto_adjust_ff_dim": False,
        "block_dim": 128,
        "conv_dim": 128,
        "layer_types": ["conv", "full_attention"],
    },
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "MellumForCausalLM": {"num_mtp_layers": 0},
    "Qwen2VLForConditionalGeneration": {"rope_parameters": {**_ROPE, "mrope_section": [4, 6, 6]}},
    "Qwen3_5ForConditionalGeneration": _BOTH,
    "Qwen3_5MoeForConditionalGeneration": _BOTH,
    "Qwen3_5ForCausalLM": _BOTH,
    "Qwen3_5MoeForCausalLM": _BOTH,
    "Qwen3NextForCausalLM": _BOTH,
}
"""Architecture -> what else its configuration needs, of its text if it has one apart.

Some of it is for vLLM alone: published files have it, and transformers' classes do not.
"""


def make_known(folder: Path, architecture: str) -> Path:
    """Write a model in bfloat16 that has the tiny example's tokenizer; return its folder."""
    network = getattr(transformers, architecture)
    kind, more = network.config_class, _OWN.get(architecture, {})
    default = kind()
    parts: dict[str, Any] = {}
    for name in getattr(kind, "sub_configs", {}):
        if (part := getattr(default, name, None)) is not None:
            small = _small(type(part), _SMALL if name == "text_config" else _TOWER)
            small |= more if name == "text_config" else {}
            parts[name] = {**small, "model_type": part.model_type}
    own = _small(kind, _SMALL)
    if "text_config" in parts:
        own = {name: value for name, value in own.items() if name.endswith("token_id")}
        more = {}
    torch.manual_seed(0)
    made = network._from_config(kind(**{**own, **more}, **parts), dtype=torch.bfloat16)
    return save_random(made, folder)


def _small(kind: type[Any], sizes: dict[str, int]) -> dict[str, int]:
    """Return the dimensions that a class has, and that are numbers by default."""
    return {
        name: sizes[name]
        for name, value in kind().to_dict().items()
        if name in sizes
        and not isinstance(value, bool)
        and (isinstance(value, int) or (value is None and name in _ALSO_UNSET))
    }
