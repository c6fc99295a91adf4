"""Layers that predict further tokens, under the names that published checkpoints have.

deepseek-ai/DeepSeek-V3 (`model.layers.61.*`), zai-org/GLM-4.5 (the same), Qwen/Qwen3-Next
(`mtp.*`) and XiaomiMiMo/MiMo-7B (`model.mtp_layers.*`), as vLLM's models/*_mtp.py read them.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BLOCK = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
NUMBERED = ("eh_proj", "enorm", "hnorm", "embed_tokens", "shared_head.norm", "shared_head.head")
NAMED = {
    "mtp.": ("fc", "norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"),
    "model.mtp_layers.0.": ("input_proj", "token_layernorm", "hidden_layernorm"),
}
COUNTS = {"mtp.": {}, "model.mtp_layers.0.": {"num_nextn_predict_layers": 1}}


def names(style: str, layers: int) -> list[str]:
    """The tensors' names: style `numbered`, `mtp.` or `model.mtp_layers.0.`."""
    if style == "numbered":
        modules = [f"model.layers.{layers}.{part}" for part in (*NUMBERED, *BLOCK)]
    else:
        inner = "mtp.layers.0." if style == "mtp." else style
        modules = [f"{style}{part}" for part in NAMED[style]] + [f"{inner}{p}" for p in BLOCK]
    return [f"{module}.weight" for module in modules]


def tensors(style: str, layers: int, width: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random tensors under these names; a norm is a vector."""
    source = torch.Generator().manual_seed(9)
    return {
        name: torch.randn(*([width] if "norm" in name else [width, width]), generator=source).to(
            dtype
        )
        for name in names(style, layers)
    }


def add_predicting(folder: Path, style: str) -> dict[str, torch.Tensor]:
    """Add them to a checkpoint of one file; return what was added."""
    path, file = folder / "config.json", folder / "model.safetensors"
    config, have = json.loads(path.read_text()), load_file(file)
    added = tensors(style, config["num_hidden_layers"], config["hidden_size"], torch.bfloat16)
    count = {"num_nextn_predict_layers": 1} if style == "numbered" else COUNTS[style]
    path.write_text(json.dumps(config | count))
    save_file({**have, **added}, file, {"format": "pt"})
    return added
