"""A user's folder for fleets on clusters: the tiny example without questions."""

import json
import shutil
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import load_file, save_file

from tests.paths import TINY

TARGETS = ("llamacpp-q4_k_m", "llamacpp-q5_k_m", "llamacpp-q8_0")
ADAPTERS = ("a", "b", "c", "d")


def write_home(folder: Path) -> None:
    """Write a base, four adapters, and one with a weight that is not a number."""
    shutil.copytree(TINY / "base", folder / "base")
    shutil.copy(TINY / "calibration.jsonl", folder)
    for name, source, factor in (("a", "a", 1), ("b", "b", 1), ("c", "a", 2), ("d", "b", 2)):
        shutil.copytree(TINY / "adapters" / source, folder / "adapters" / name)
        path = folder / "adapters" / name / "adapter_config.json"
        settings = json.loads(path.read_text())
        path.write_text(json.dumps({**settings, "lora_alpha": settings["lora_alpha"] * factor}))
    shutil.copytree(TINY / "adapters" / "a", folder / "broken")
    tensors = load_file(folder / "broken" / "adapter_model.safetensors")
    first = next(iter(tensors.values()))
    first.flat[0] = np.nan
    save_file(tensors, folder / "broken" / "adapter_model.safetensors")
    recipe = yaml.safe_load((TINY / "recipe.yaml").read_text())
    del recipe["evaluate"], recipe["adapters"]
    recipe |= {"validate": {"enabled": False}, "quality": {"gate": False}, "targets": [*TARGETS]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
