"""Checkpoints and adapters of a few tensors, merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from weightsmith.merging.engine import MergeRequest, merge


def save(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """Write a checkpoint or, with a peft_type, an adapter of arbitrary tensors."""
    folder.mkdir()
    kind = "adapter" if "peft_type" in config else "model"
    name = "adapter_config.json" if kind == "adapter" else "config.json"
    (folder / name).write_text(json.dumps(config))
    file = "adapter_model" if kind == "adapter" else "model"
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / f"{file}.safetensors")
    return folder


def run(tmp_path: Path, base: Any, adapter: Any, config: dict[str, Any], **model: Any) -> Any:
    """Merge tensors with tensors; return the result's."""
    base_folder = save(tmp_path / "base", base, **model)
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 3} | config
    wrapped = {f"base_model.model.{key}": tensor for key, tensor in adapter.items()}
    adapter_folder = save(tmp_path / "adapter", wrapped, **lora)
    out = tmp_path / "out"
    merge(MergeRequest(base=base_folder, adapters=((adapter_folder, 1.0),), out=out))
    return load_file(out / "model.safetensors")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def lora(module: str, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def lora_embedding(module: str, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b}


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-7)


def delta(a: torch.Tensor, b: torch.Tensor, scaling: float = 1.5) -> torch.Tensor:
    return scaling * b.double().flatten(1) @ a.double().flatten(1)
