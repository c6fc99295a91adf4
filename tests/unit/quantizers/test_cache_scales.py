"""Scales of an 8-bit KV cache: the largest keys and values of the whole model in transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache
from weightsmith.quantizers.calibration import GENERAL
from weightsmith.quantizers.layerwise.maxima import cache_scales

from tests.fakes.decoders import make_dense

LINES = [json.loads(line)["text"] for line in GENERAL.read_text("utf-8").splitlines()[:3]]


def by_transformers(model: Path) -> list[tuple[float, float]]:
    """The largest keys and values that its own cache holds, text by text."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    most = [[0.0, 0.0] for _ in range(network.config.num_hidden_layers)]
    for line in LINES:
        ids = tokenizer(line, add_special_tokens=False, return_tensors="pt")["input_ids"]
        for start in range(0, ids.shape[1], 512):
            with torch.inference_mode():
                made = network(input_ids=ids[:, start : start + 512], use_cache=True)
            (cache,) = (one for one in made.values() if isinstance(one, Cache))
            for layer, pair in zip(cache.layers, most, strict=True):
                pair[0] = max(pair[0], float(layer.keys.abs().max()))
                pair[1] = max(pair[1], float(layer.values.abs().max()))
    return [(keys / 448, values / 448) for keys, values in most]


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM"]
)
def test_they_are_those_of_transformers_cache(tmp_path: Path, architecture: str) -> None:
    model = make_dense(tmp_path / "model", architecture)
    found = cache_scales(model, LINES)

    right = by_transformers(model)
    assert list(found) == [f"model.layers.{n}.self_attn" for n in range(len(right))]
    for mine, theirs in zip(found.values(), right, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
