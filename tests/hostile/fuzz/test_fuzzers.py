"""Some inputs of each fuzzer, the same each time. `make fuzz` goes on with others."""

from __future__ import annotations

import pytest

from tests.hostile.fuzz.subjects import once

INPUTS = {
    "safetensors": 500, "gguf": 125, "tar": 200, "config": 400, "report": 60, "image": 1000,
    "envelope": 1000, "text": 300, "from": 100, "wheel": 300,
    "folder-cache": 150, "s3-cache": 150, "registry-cache": 20, "payloads": 250, "thin": 30,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", INPUTS)
def test_inputs_changed_at_random_are_read_or_refused(name):
    """Files of a model, layers, configurations and statements, each with some bytes changed."""
    for seed in range(INPUTS[name]):
        once(name, seed)
