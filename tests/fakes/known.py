"""Small random models of any architecture, from transformers' own configuration classes."""

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.fakes.decoders import save_random

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
