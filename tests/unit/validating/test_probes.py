"""Probes: what both sides are asked, and by which tokenizer."""

import os
import shutil

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.validating.probes import expected_tokenizer

from tests.paths import ROOT

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
