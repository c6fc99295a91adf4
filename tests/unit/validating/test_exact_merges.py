"""Whatever is merged exactly passes, on every architecture and adapter that PEFT computes."""

from pathlib import Path

import pytest
import torch

from tests.unit.validating.conftest import (
    held,
    make_adapter,
    make_model,
    merged,
    merged_by_peft,
    tell,
)

EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
CASES = [
    ("llama", {}, {}),
    ("llama", {"dtype": torch.float16}, {"use_rslora": True}),
    ("llama", {"dtype": torch.float32}, {}),
    ("llama", {"tie_word_embeddings": True}, {"target_modules": ["q_proj", "down_proj"]}),
    ("llama", {"tie_word_embeddings": True}, {"target_modules": ["embed_tokens", "q_proj"]}),
    ("llama", {"attention_bias": True}, {"rank_pattern": {"q_proj": 2}}),
    ("llama", {}, {"use_dora": True}),
    ("llama", {}, {"target_modules": ["lm_head", "q_proj"]}),
    ("llama", {}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("llama", {}, {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]}),
    ("llama", {}, {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 3]]}),
    ("qwen2", {}, {"alpha_pattern": {"up_proj": 32}}),
    ("qwen2", {}, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    ("qwen2", {}, {"target_modules": ["q_proj"], "lora_bias": True}),
    ("gpt2", {}, {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    ("gemma3", {}, {}),
    ("qwen3_moe", {}, {"target_modules": ["q_proj", "v_proj"]}),
    ("qwen3_moe", {}, EXPERTS),
]


@pytest.mark.parametrize(
    ("kind", "model", "adapter"),
    CASES,
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_exact_merge_passes(tmp_path: Path, kind: str, model: dict, adapter: dict) -> None:
    base = make_model(tmp_path / "base", kind, **model)
    lora = make_adapter(tmp_path / "lora", base, **adapter)
    out = merged(tmp_path / "out", base, lora)

    result = held(base, out, lora)

    assert result["passed"], tell(result)
    assert result["streamed"], tell(result)
    assert result["elements"]["wrong"] == 0
    assert result["top1_agreement"] > 0.9
    assert result["first_difference"] is None
    assert result["max_abs_logit_diff"] < 1


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        ("llama", {"use_dora": True}),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("llama", {"target_modules": ["lm_head", "q_proj"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]}),
        ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
        ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
        ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_peft_merges_exactly_passes(tmp_path: Path, kind: str, adapter: dict) -> None:
    base = make_model(tmp_path / "base", kind)
    lora = make_adapter(tmp_path / "lora", base, **adapter)
    out = merged_by_peft(tmp_path / "out", base, lora)

    result = held(base, out, lora)

    assert result["passed"], tell(result)
    assert result["streamed"], tell(result)
    assert result["elements"]["wrong"] == 0
