"""Small random models that see, of every architecture that is quantized here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.fakes.dense import add_tokenizer

_TEXT = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
_TOWER = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
_QWEN = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "out_hidden_size": 128,
}
_SECTIONS = {"rope_type": "default", "mrope_section": [4, 6, 6]}
_KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Gemma3ForConditionalGeneration": ("gemma3", {}, _TOWER),
    "Llama4ForConditionalGeneration": (
        "llama4",
        {"num_local_experts": 4, "intermediate_size_mlp": 256, "interleave_moe_layer_step": 2},
        {**_TOWER, "intermediate_size": 256, "vision_output_dim": 64, "projector_input_dim": 64,
         "projector_output_dim": 64},
    ),
    "Mistral3ForConditionalGeneration": (
        "mistral3", {"model_type": "mistral"}, {**_TOWER, "model_type": "pixtral", "head_dim": 32}
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        "qwen2_5_vl", {"rope_scaling": _SECTIONS}, {**_QWEN, "fullatt_block_indexes": [0]}
    ),
    "Qwen3VLForConditionalGeneration": (
        "qwen3_vl", {"rope_scaling": _SECTIONS},
        {**_QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
}  # fmt: skip
"""Architecture -> model type, and what its text and its tower have beside the others'."""


def make_seeing(folder: Path, architecture: str) -> Path:
    """Write a model in bfloat16 that has the tiny example's tokenizer; return its folder."""
    kind, text, tower = _KINDS[architecture]
    config = CONFIG_MAPPING[kind](text_config={**_TEXT, **text}, vision_config=tower)
    torch.manual_seed(0)
    network = getattr(transformers, architecture)._from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.06)
    network.save_pretrained(folder)
    add_tokenizer(folder)
    return folder
