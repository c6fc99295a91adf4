"""A checkpoint's own chat template, as others may have written it."""

from __future__ import annotations

import json

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.models.templates import own_template, takes_parts


@pytest.mark.parametrize("stated", ["", [], ["x"], [{"name": "tool", "template": "t"}], 7])
def test_a_folder_without_a_usable_template_has_none(tmp_path, stated):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": stated}))

    assert own_template(tmp_path) is None


def test_a_template_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe{{")

    with pytest.raises(InputRefused, match="chat_template"):
        own_template(tmp_path)


@pytest.mark.parametrize(
    ("template", "taken"),
    [
        ("{% for message in messages %}{{ message['content'] }}{% endfor %}", False),
        ("{%- for m in messages %}{% if m.content is string %}{{ m.content }}{% endif %}", False),
        ("{% for message in messages %}{% for part in message['content'] %}", True),
        ("{%- macro shown(content) %}{%- for item in content -%}", True),
        ("{% for block in message.content | reverse %}", True),
    ],
)
def test_a_template_for_contents_in_parts_goes_through_them(template, taken):
    assert takes_parts(template) is taken
