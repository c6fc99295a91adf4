"""Combined factors against PEFT's `add_weighted_adapter`, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from weightsmith.merging.combining.combination import Combination
from weightsmith.merging.combining.methods import Factor, combine_factors

ADAPTERS = {"one": (4, 6.0, 0.7), "two": (4, 3.0, -0.4), "three": (4, 8.0, 1.1)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(31, 23, bias=False)


def peft_model(ranks: dict[str, int] | None = None) -> Any:
    torch.manual_seed(3)
    model: Any = None
    for name, (rank, alpha, _) in ADAPTERS.items():
        r = (ranks or {}).get(name, rank)
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules=["proj"])
        if model is None:
            model = get_peft_model(Net(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter)
    return model


def factors(model: Any) -> list[Factor]:
    layer = model.base_model.model.proj
    return [
        Factor(
            a=layer.lora_A[name].weight.detach().numpy(),
            b=layer.lora_B[name].weight.detach().numpy(),
            weight=weight,
            scaling=layer.scaling[name],
            adapter=name,
        )
        for name, (_, _, weight) in ADAPTERS.items()
    ]


@pytest.mark.parametrize("density", [0.15, 0.5, 1.0])
@pytest.mark.parametrize("method", ["linear", "cat", "ties", "magnitude_prune"])
@pytest.mark.filterwarnings("ignore:The density")
def test_pefts_bits(method: str, density: float) -> None:
    model = peft_model({"two": 7} if method == "cat" else None)
    prunes = method in ("ties", "magnitude_prune")
    combination = Combination(method=method, density=density if prunes else None, space="factors")
    given = factors(model)
    model.add_weighted_adapter(
        list(ADAPTERS),
        [weight for _, _, weight in ADAPTERS.values()],
        "all",
        combination_type=method,
        density=density,
    )
    layer = model.base_model.model.proj
    assert layer.scaling["all"] == 1.0
    a, b = combine_factors(given, combination, "proj")
    assert np.array_equal(a, layer.lora_A["all"].weight.detach().numpy())
    assert np.array_equal(b, layer.lora_B["all"].weight.detach().numpy())


def test_dare_keeps_its_share_and_depends_on_the_seed() -> None:
    model = peft_model()
    given = factors(model)
    made = [
        combine_factors(
            given, Combination(method="dare_linear", density=0.5, seed=s, space="factors"), "proj"
        )
        for s in (1, 1, 2)
    ]
    assert np.array_equal(made[0][0], made[1][0])
    assert not np.array_equal(made[0][0], made[2][0])
    assert np.array_equal(given[0].a, factors(model)[0].a)  # the inputs are left alone
