"""Small random models of the architectures that become packed checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TOKENIZER = Path(__file__).parents[2] / "examples" / "tiny" / "base"
KINDS = {
    name: kind
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    if CONFIG_MAPPING_NAMES[kind].removesuffix("Config").removesuffix("Text")
    == str(name).removesuffix("ForCausalLM")
}
"""Architecture -> model type, where the configuration is that class's own."""


def make_dense(folder: Path, architecture: str, hidden: int = 64) -> Path:
    """Write a model in bfloat16 that has the tiny example's tokenizer; return its folder."""
    config = CONFIG_MAPPING[KINDS[architecture]](
        vocab_size=512, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=hidden // 4,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return save_random(network, folder)


def save_random(network: Any, folder: Path) -> Path:
    """Write a network with random parameters and the tiny example's tokenizer."""
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
    """Give a model the tiny example's tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, folder)
