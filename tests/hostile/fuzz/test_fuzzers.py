"""Some inputs of each fuzzer, the same each time. `make fuzz` goes on with others."""

from __future__ import annotations

import pytest

from tests.hostile.fuzz.subjects import once

INPUTS = {
    "safetensors": 1000, "gguf": 250, "tar": 400, "config": 800, "report": 120, "image": 2000,
    "envelope": 2000, "text": 600, "from": 200, "wheel": 600,
    "folder-cache": 300, "s3-cache": 300, "registry-cache": 40, "payloads": 500, "thin": 60,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", INPUTS)
def test_inputs_changed_at_random_are_read_or_refused(name):
    """Files of a model, layers, configurations and statements, each with some bytes changed."""
    for seed in range(INPUTS[name]):
        once(name, seed)
