"""Greedy text of both sides against transformers' own generation, each probe alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from weightsmith.validating import probes
from weightsmith.validating.forwards import MergedModel

from tests.unit.validating.conftest import held, make_adapter, make_model, merged, tell

ITEMS = tuple(
    ({"role": "user", "content": text},)
    for text in ("What is the price of salt?", "Which port?", "Name a colour of the sky.")
)


def said_by_peft(base: Path, lora: Path) -> list[str]:
    """Return what the unmerged model says to each item, asked alone, in at most 16 tokens."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, lora)
    texts = []
    for item in ITEMS:
        ids = tokenizer.apply_chat_template(
            [dict(m) for m in item], add_generation_prompt=True, return_tensors="pt"
        )["input_ids"]
        made = model.generate(input_ids=ids, max_new_tokens=16, do_sample=False)
        texts.append(tokenizer.decode(made[0, ids.shape[1] :]))
    return texts


@pytest.mark.grid(4)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "qwen3_moe"])
def test_both_sides_say_what_they_say_alone(tmp_path: Path, kind: str) -> None:
    base = make_model(tmp_path / "base", kind)
    targets = ["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "o_proj"]
    lora = make_adapter(tmp_path / "lora", base, target_modules=targets)
    out = merged(tmp_path / "out", base, lora, dtype="float32")

    result = held(base, out, lora, items=ITEMS)

    assert result.passed, tell(result)
    assert "cannot generate" not in tell(result)
    wanted = said_by_peft(base, lora)
    assert [row.reference for row in result.comparison.greedy] == wanted
    assert [row.merged for row in result.comparison.greedy] == wanted


def test_a_wrong_merge_says_something_else(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    lora = make_adapter(tmp_path / "lora", base)
    out = merged(tmp_path / "out", base, lora, weights=(4.0,))

    result = held(base, out, lora, items=ITEMS)

    parted = [row for row in result.comparison.greedy if row.same < row.tokens]
    assert parted
    assert all(row.reference != row.merged for row in parted)
    assert "greedy texts differ" in tell(result)


def test_the_text_is_generated_without_loading_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model(tmp_path / "base")
    lora = make_adapter(tmp_path / "lora", base)
    out = merged(tmp_path / "out", base, lora)
    monkeypatch.delattr(MergedModel, "whole")

    result = held(base, out, lora, items=ITEMS)

    assert result.passed, tell(result)
    assert [row.tokens for row in result.comparison.greedy] == [16, 16, 16]


def test_a_large_model_generates_fewer_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "_LARGE", 1000)
    base = make_model(tmp_path / "base")
    lora = make_adapter(tmp_path / "lora", base)
    out = merged(tmp_path / "out", base, lora)

    result = held(base, out, lora, items=ITEMS)

    assert result.passed, tell(result)
    assert [row.tokens for row in result.comparison.greedy] == [4, 4, 4]
