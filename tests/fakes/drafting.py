"""A model and a draft of it that guesses right."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def deepened(draft: Path, folder: Path) -> None:
    """Write the same model with one more layer, which adds nothing: its draft guesses right."""
    shutil.copytree(draft, folder)
    config = json.loads((folder / "config.json").read_text())
    last = config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": last + 1}))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in list(tensors.items()):
        if f".layers.{last - 1}." in name:
            silent = name.endswith(("o_proj.weight", "down_proj.weight"))
            added = torch.zeros_like(tensor) if silent else tensor.clone()
            tensors[name.replace(f".{last - 1}.", f".{last}.")] = added
    save_file(tensors, file, {"format": "pt"})
