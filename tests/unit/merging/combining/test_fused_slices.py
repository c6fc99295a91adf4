"""Several adapters on layers that the base stores in one tensor: PEFT combines each by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import merge_utils
from safetensors.torch import load_file

from tests.unit.merging.oracle import MakeBase, merged, train, unmerged
from tests.unit.merging.oracle import run as merge_pairs

KIND = "sarvam_moe"
FUSED = "model.layers.1.attention.query_key_value.weight"
WEIGHTS = (0.7, 1.2)
LAYERS = (["q_proj", "v_proj"], ["q_proj", "k_proj"])


@pytest.fixture
def two(bases: MakeBase, tmp_path: Path) -> tuple[Path, list[Path]]:
    """Adapters of which both change the query, and each one other part."""
    base = bases(KIND)
    return base, [
        train(base, KIND, tmp_path / f"{n}", LoraConfig(r=4 + n, target_modules=names))
        for n, names in enumerate(LAYERS)
    ]


def run(base: Path, adapters: list[Path], out: Path, **options: Any) -> Path:
    merge_pairs(base, list(zip(adapters, WEIGHTS, strict=True)), out, **options)
    return out


def deltas_of(adapter: Path) -> dict[str, torch.Tensor]:
    """Return the deltas of the layer in FUSED by the names of its parts, from the files alone."""
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for part in config["target_modules"]:
        prefix = f"base_model.model.model.layers.1.self_attn.{part}"
        a, b = (tensors[f"{prefix}.lora_{side}.weight"].double() for side in "AB")
        found[part] = b @ a * (config["lora_alpha"] / config["r"])
    return found


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_each_layer_is_pruned_by_itself(
    method: str, two: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, adapters = two
    out = run(base, adapters, tmp_path / "out", method=method, density=0.4)

    before, after = (load_file(root / "model.safetensors")[FUSED] for root in (base, out))
    deltas, first = [deltas_of(adapter) for adapter in adapters], 0
    for part in ("q_proj", "k_proj", "v_proj"):
        pairs = zip(deltas, WEIGHTS, strict=True)
        mine, weights = zip(*((d[part], w) for d, w in pairs if part in d), strict=True)
        combine = getattr(merge_utils, method)
        wanted = combine(list(mine), torch.tensor(weights, dtype=torch.float64), 0.4)
        rows = slice(first, first + len(wanted))
        found = after[rows].double() - before[rows].double()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        first = rows.stop
    assert first == len(after)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "linear"},
        {"method": "svd", "rank": 8},
        {"method": "ties_svd", "density": 0.4, "rank": 8},
        {"method": "ties", "density": 0.4, "space": "factors", "equal": True},
    ],
    ids=str,
)
def test_what_is_kept_is_the_merge(
    options: dict[str, Any], two: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, adapters = two
    if options.pop("equal", False):  # factors are combined where their ranks are equal
        config = LoraConfig(r=4, target_modules=LAYERS[1])
        adapters = [adapters[0], train(base, KIND, tmp_path / "of-4", config)]
    out = run(base, adapters, tmp_path / "out", **options)
    kept = run(base, adapters, tmp_path / "kept", keep_adapter=True, **options)

    found, wanted = unmerged(base, KIND, kept), merged(out, KIND)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
