"""Views of models whose code reads weights without calling their layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from weightsmith.forward.meeting import Meeting
from weightsmith.forward.views import view

from tests.unit.merging.models import build

IDS = torch.arange(7, 47).reshape(2, 20)


@pytest.mark.parametrize("kind", ["nemotron_h", "mamba2"])
def test_models_with_states_are_streamed(kind: str, tmp_path: Path) -> None:
    """They filter single channels by functions of their own."""
    torch.manual_seed(0)
    model = build(kind).eval()
    model.save_pretrained(tmp_path)

    def logits(network: Any) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = network(input_ids=IDS, use_cache=False).logits
            return found

    meeting = Meeting(cpus=2)
    network = view(tmp_path, [], meeting, 0)

    found = meeting.run({"": lambda: logits(network)})[""]

    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-5)
