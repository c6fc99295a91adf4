"""A small model whose weights are hard to round, and damage to what is made of it."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import load_file, save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 256,
    "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 32,
}  # fmt: skip
SHAPES = {
    "self_attn.q_proj": (128, 128), "self_attn.k_proj": (128, 128), "self_attn.v_proj": (128, 128),
    "self_attn.o_proj": (136, 128), "mlp.gate_proj": (256, 128), "mlp.up_proj": (256, 128),
    "mlp.down_proj": (128, 256),
}  # fmt: skip
SIZES = {f"model.layers.0.{name}.weight": 2 * a * b for name, (a, b) in SHAPES.items()}
"""Bytes of each matrix in bfloat16."""


def awkward(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Return a matrix with tiles of zeros, outliers, tiny values, exact ties and both zeros."""
    made = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32) * 0.02
    made[0, :32] = 0
    made[1, :32] = -0.0
    made[2] *= 1e-6
    made[3, 5] = 3.5
    made[4, :16] = [
        6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -6, -0.25, -0.75, -1.25, -1.75, -5, 0, -0.0
    ]  # fmt: skip
    made[5] = made[5].astype(ml_dtypes.bfloat16)
    made[6, :] = 1e-30
    return made


def make(folder: Path) -> Path:
    """Write a checkpoint of one layer of such matrices."""
    folder.mkdir()
    weights = {"model.embed_tokens.weight": awkward(32, 128)}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        weights[f"model.layers.0.{name}.weight"] = awkward(*shape, seed) * (seed + 1)
    weights["model.layers.0.input_layernorm.weight"] = np.ones(128, np.float32)
    save_file(
        {name: torch.from_numpy(value).bfloat16() for name, value in weights.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def damage_half(folder: Path, part: str) -> None:
    """Put half of a tensor's bytes in another order, and change some bits."""
    tensors = load_file(folder / "model.safetensors")
    bad = tensors[f"model.layers.0.mlp.down_proj.{part}"].view(-1).view(torch.uint8)
    bad[: len(bad) // 2] = bad[: len(bad) // 2].flip(0) ^ 0x18
    save_file(tensors, folder / "model.safetensors")
