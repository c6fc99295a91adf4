"""The files beside the weights: which tokenizer and which chat templates a merged model has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from weightsmith.validating.probes import expected_tokenizer

from tests.paths import ROOT
from tests.unit.merging.oracle import run

TOKENIZER = ROOT / "examples" / "tiny" / "base" / "tokenizer.json"
TOOLS = {"default": "DEFAULT", "tool_use": "TOOLS"}
LISTED = {"chat_template": [{"name": name, "template": text} for name, text in TOOLS.items()]}
FILES = {
    "chat_template.jinja": "DEFAULT",
    "additional_chat_templates/tool_use.jinja": "TOOLS",
}
OTHER = {"chat_template.jinja": "OLD", "additional_chat_templates/rag.jinja": "OLD"}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("of_base", "of_adapter"),
    [
        ({"tokenizer_config.json": json.dumps(LISTED)}, {}),
        ({"tokenizer_config.json": json.dumps(LISTED)}, {"tokenizer_config.json": "{}"}),
        (FILES, {"tokenizer_config.json": "{}"}),
        (OTHER, {"tokenizer_config.json": json.dumps(LISTED)}),
        (OTHER, {"tokenizer_config.json": "{}"} | FILES),
        (OTHER, FILES),
    ],
    ids=["base", "tokenizer-alone", "files-of-base", "adapter", "files-of-adapter", "files-alone"],
)
def test_named_templates_stay_together(
    of_base: dict[str, str], of_adapter: dict[str, str], make_model: Any, make_adapter: Any
) -> None:
    """The judge is the loader of transformers; the validation expects the same."""
    from transformers import AutoTokenizer

    base = make_model()
    adapter = make_adapter(base)
    tokenizer = {"tokenizer.json": TOKENIZER.read_text()}
    write(base, tokenizer | {"tokenizer_config.json": "{}"} | of_base)
    write(adapter, (tokenizer if "tokenizer_config.json" in of_adapter else {}) | of_adapter)

    out = base.parent / "out"
    run(base, adapter, out)

    assert AutoTokenizer.from_pretrained(out).chat_template == TOOLS
    assert expected_tokenizer(base, [adapter]).chat_template == TOOLS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "</s>", "added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"eos_token": "</s>", "added_tokens_decoder": {"x": [], "y": 1}}),
        (
            "tokenizer_config.json",
            {"eos_token": "</s>", "added_tokens_decoder": {"two": {"content": "</s>"}}},
        ),
        ("tokenizer.json", {"added_tokens": None, "model": None}),
        ("tokenizer.json", {"added_tokens": ["x", {"content": "</s>", "id": "2"}], "model": []}),
    ],
)
def test_a_tokenizer_of_odd_values_is_copied(
    name: str, content: Any, make_model: Any, make_adapter: Any
) -> None:
    """Only its end token is asked for; whether it works is the validation's business."""
    base = make_model(eos_token_id=1)
    write(base, {"tokenizer.json": "{}", "tokenizer_config.json": '{"eos_token": "</s>"}'})
    write(base, {name: json.dumps(content)})

    run(base, make_adapter(base), base.parent / "out")

    assert json.loads((base.parent / "out" / name).read_text()) == content
