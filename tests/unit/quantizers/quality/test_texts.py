"""Calibration text rendered without torch, against transformers' own tokenizer."""

import json
import shutil
import subprocess
import sys

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.forward.libraries import load_tokenizer
from weightsmith.quantizers.quality.texts import as_lines

from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny" / "base"
CHATS = [
    {"messages": [{"role": "user", "content": "What is blue?"}]},
    {
        "messages": [
            {"role": "system", "content": "Be <brief>."},
            {"role": "user", "content": "  Two\n\nlines  "},
            {"role": "assistant", "content": "Ja — ähm"},
        ]
    },
]
ROWS = [{"text": "plain, with <|im_start|> in it"}, *CHATS]
TOOLS = (
    "{%- set ns = namespace(n=0) %}{% for m in messages %}\n    {% if loop.first %}{{ bos_token }}"
    "{% endif %}\n[{{ m | tojson }}]{% set ns.n = ns.n + 1 %}{{ ns.n }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}{{ eos_token }}"
    "{% endgeneration %}{% continue %}{% endif %}\n{% endfor %}"
)


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(TINY, tmp_path / "model")


def by_transformers(model, rows):
    """Return what AutoTokenizer makes of rows: their text and number of tokens."""
    tokenizer = load_tokenizer(model)
    texts = [
        row.get("text") or tokenizer.apply_chat_template(row["messages"], tokenize=False)
        for row in rows
    ]
    return [
        {"text": text, "tokens": len(tokenizer(text, add_special_tokens=False)["input_ids"])}
        for text in texts
    ]


def change(model, **settings):
    file = model / "tokenizer_config.json"
    told = {**json.loads(file.read_text("utf-8")), **settings}
    file.write_text(json.dumps({k: v for k, v in told.items() if v is not None}), "utf-8")


@pytest.mark.parametrize("template", [None, TOOLS], ids=["its own", "another"])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["chats", "text"])
def test_lines_are_what_the_models_own_tokenizer_makes(model, template, rows):
    if template:
        (model / "chat_template.jinja").write_text(template, "utf-8")
    found = [json.loads(line) for line in as_lines(model, rows).splitlines()]
    assert found == by_transformers(model, rows)


def test_separators_of_lines_in_a_text_do_not_end_its_line(model):
    said = "one\u2028two\u2029three\x85four\x1cfive\nsix"
    (line,) = as_lines(model, [{"text": said}]).splitlines()
    assert json.loads(line)["text"] == said


def test_a_token_that_only_the_tokenizers_class_knows_is_in_the_text(model):
    (model / "chat_template.jinja").write_text(TOOLS, "utf-8")
    change(model, tokenizer_class="LlamaTokenizer", bos_token=None)
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    found = [json.loads(line)["text"] for line in as_lines(model, CHATS).splitlines()]
    assert found[0].startswith("<s>")
    assert found == [row["text"] for row in by_transformers(model, CHATS)]


def test_a_file_that_cuts_and_fills_does_not_change_the_count(model):
    told = json.loads((model / "tokenizer.json").read_text("utf-8"))
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 90}, "direction": "Right", "pad_to_multiple_of": None}
    fill |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    (model / "tokenizer.json").write_text(json.dumps({**told, "truncation": cut, "padding": fill}))
    assert as_lines(model, ROWS) == as_lines(TINY, ROWS)


def test_conversations_need_a_template_and_text_does_not(model):
    for name in ("chat_template.jinja", "chat_template.json"):
        (model / name).unlink(missing_ok=True)
    change(model, chat_template=None)
    with pytest.raises(InputRefused, match="no chat template"):
        as_lines(model, ROWS)
    assert as_lines(model, ROWS[:1])
    (model / "chat_template.jinja").write_text("{{ raise_exception('no system') }}", "utf-8")
    with pytest.raises(InputRefused, match="no system"):
        as_lines(model, CHATS)


@pytest.mark.slow
def test_rendering_imports_no_torch():
    script = (
        "import sys; from pathlib import Path; "
        "from weightsmith.quantizers.quality.texts import as_lines;"
        f"as_lines(Path({str(TINY)!r}), {CHATS!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
