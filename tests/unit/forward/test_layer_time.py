"""The time of one layer, which needs the model's configuration and none of its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, MixtralConfig, PretrainedConfig
from weightsmith.forward import layer_time as timing
from weightsmith.forward.layer_time import layer_time

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        Gemma3TextConfig(**SIZES, head_dim=8),
        MixtralConfig(**SIZES, num_local_experts=2),
    ],
    ids=lambda config: config.model_type,
)
def test_a_layer_is_timed_without_any_weights(tmp_path: Path, config: PretrainedConfig) -> None:
    config.architectures = [type(config).__name__.replace("TextConfig", "Config")]
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    seen: list[tuple[int, int]] = []

    found = layer_time(tmp_path, (8, 64), lambda done, total: seen.append((done, total)))

    assert found["layers"] == 6
    assert found["counts"] == [8, 64]
    assert all(seconds > 0 for part in ("layer", "head") for seconds in found[part])
    assert seen == [(1, 2), (2, 2)]


def test_a_part_of_a_large_head_stands_for_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(timing, "_HEAD_ROWS", 100)
    monkeypatch.setattr(timing, "_BLOCK", 1 << 10)  # the embedding is larger than the buffer
    monkeypatch.setattr(timing, "_fastest", lambda work: (work(), 2.0)[1])

    assert layer_time(tmp_path, (8,), lambda *_: None)["head"] == [6.0]


def test_the_faster_of_two_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 5.0, 10.0, 13.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(times))

    assert timing._fastest(lambda: torch.zeros(1)) == 3.0
