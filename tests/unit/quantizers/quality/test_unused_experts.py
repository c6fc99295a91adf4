"""The quality gate compares every expert, whether or not a text runs through it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers.quality.runs import run_both

from tests.unit.validating.conftest import make_model


class LouderExperts:
    """A checkpoint whose experts' weights are a quarter larger."""

    def __init__(self, model: Path) -> None:
        self._truth = CheckpointTensors(model)
        self.names = self._truth.names

    def tensor(self, name: str) -> np.ndarray:
        return self._truth.tensor(name) * (1.25 if ".experts." in name else 1)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.tensor(name)[start:stop]

    def kind(self, _: str) -> str:
        return ""


def test_experts_that_get_no_token_are_compared_too(tmp_path: Path) -> None:
    model = make_model(tmp_path, "qwen3_moe", num_experts=64, num_experts_per_tok=1)

    found = run_both(model, LouderExperts(model), torch.arange(8)[None], 8, lambda *_: None)

    errors = [error for name, error in found.errors.items() if ".experts." in name]
    assert errors == [0.25] * 3 * 3 * 64
