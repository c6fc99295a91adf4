"""What both sides are asked, by which tokenizer, and the greedy texts after it."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from weightsmith.core.errors import InputRefused
from weightsmith.validating import probes
from weightsmith.validating.forwards import MergedModel
from weightsmith.validating.probes import expected_tokenizer, known

from tests.paths import ROOT
from tests.unit.validating.conftest import held, make_adapter, make_model, merged, passed, tell

BASE = ROOT / "examples" / "tiny" / "base"


def test_a_base_whose_tokenizer_is_damaged_is_refused(tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, tmp_path / name)
    whole = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(InputRefused, match="cannot be loaded"):
        expected_tokenizer(tmp_path, ())


ADAPTER = next((BASE.parent / "adapters").iterdir())


def with_templates(tmp_path, **files):
    """An adapter with chat templates and without a tokenizer."""
    folder = tmp_path / "adapter"
    shutil.copytree(ADAPTER, folder, ignore=shutil.ignore_patterns("*token*", "*template*"))
    (folder / "additional_chat_templates").mkdir()
    for name, data in files.items():
        (folder / name.replace("__", "/").replace("_jinja", ".jinja")).write_bytes(data)
    return folder


def test_named_templates_without_a_default_one(tmp_path):
    adapter = with_templates(tmp_path, additional_chat_templates__tool_use_jinja=b"tools")

    assert expected_tokenizer(BASE, [adapter]).chat_template == {"tool_use": "tools"}


def test_a_hidden_file_is_no_template(tmp_path):
    """It may be a link to anything, or a pipe."""
    adapter = with_templates(tmp_path, chat_template_jinja=b"one")
    os.mkfifo(adapter / "additional_chat_templates" / ".hidden.jinja")

    assert expected_tokenizer(BASE, [adapter]).chat_template == "one"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("chat_template_jinja", b"\xff"),
        ("additional_chat_templates__x_jinja", b"\xff"),
        ("chat_template.json", b'{"chat_template": ["text"]}'),
        ("chat_template.json", b'{"chat_template": [{"name": "default"}]}'),
    ],
)
def test_templates_that_cannot_be_read_are_refused(tmp_path, name, data):
    with pytest.raises(InputRefused, match=r"the chat template of .*adapter cannot be loaded"):
        expected_tokenizer(BASE, [with_templates(tmp_path, **{name: data})])


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

    result = passed(base, out, lora, items=ITEMS)

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


def test_the_text_is_generated_without_loading_the_model_and_a_large_one_generates_less(
    plain: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, lora, out = plain
    monkeypatch.delattr(MergedModel, "whole")

    found = passed(base, out, lora, items=ITEMS).comparison

    assert found.probes == 3
    assert "price of salt" in found.greedy[0].after
    assert [row.same for row in found.greedy] == [row.tokens for row in found.greedy] == [16] * 3

    monkeypatch.setattr(probes, "_LARGE", 1000)
    found = passed(base, out, lora, items=ITEMS).comparison
    assert [row.tokens for row in found.greedy] == [4, 4, 4]


END = 9


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ([1, 2, END], [1, 2, END]),
        ([1, 2, 3, 4], [1, 2, 3, 4]),
        ([1, 2, 3, 4, 5, END], [1, 2, 3, 4]),
        ([1, END, 2], [1, END]),
        ([1, 2], None),  # cut off by a shorter limit: the next token is not known
        ([], None),
    ],
)
def test_an_answer_is_the_text_if_it_is_long_enough_or_ended(answer, text):
    found = known([[7, 8]], [([7, 8], answer)], [END], 4)
    assert found == ({} if text is None else {0: text})
    # Only whole questions are known.
    answers = [([5, 7, 8], [1, END]), ([6], [2, END])]
    assert known([[7, 8], [6], [5]], answers, [END], 4) == {1: [2, END]}
