"""A checkpoint's own chat template, as others may have written it."""

from __future__ import annotations

import errno
import json
from types import SimpleNamespace

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from weightsmith.core import time_limits
from weightsmith.core.errors import InputRefused
from weightsmith.models.templates import gguf_template, own_template, render_chat, takes_parts


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


def test_a_gguf_file_of_gemma_3_has_the_line_breaks_of_its_processor(tmp_path):
    """Around what stands for a picture in llama.cpp's server, and nowhere else."""
    own = "{% for m in messages %}<turn>{{ m.content | trim }}{% endfor %}\n"
    (tmp_path / "chat_template.jinja").write_text(own)

    def rendered(config, content):
        (tmp_path / "config.json").write_text(json.dumps(config))
        made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
            gguf_template(tmp_path)
        )
        return made.render(messages=[{"role": "user", "content": content}])

    sees = {"model_type": "gemma3", "vision_config": {}}
    seeing = {**sees, "vision_config": {"image_size": 56}}
    mark = "<__media_4711__>"
    assert rendered(seeing, f"{mark}Which?") == f"<turn>\n\n{mark}\n\nWhich?"
    assert rendered(seeing, "a__>b") == "<turn>a__>b"
    for other in (sees, {**seeing, "model_type": "qwen2_vl"}):
        assert rendered(other, f"{mark}Which?") == f"<turn>{mark}Which?"
    (tmp_path / "config.json").write_text(json.dumps(seeing))
    once = gguf_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(once)
    assert gguf_template(tmp_path) == once, "of a file that is converted again"


def test_an_error_in_telling_what_is_done_is_none_of_the_template(monkeypatch):
    """The converter goes on with less where a template refuses, and the file would differ."""

    def tell(what: str) -> None:
        if what:
            raise OSError(errno.EBADF, what)

    monkeypatch.setattr(time_limits, "_tell", tell)
    tokenizer = SimpleNamespace(name_or_path="x", apply_chat_template=lambda *_, **__: "")

    with pytest.raises(OSError, match="rendering the chat template of x"):
        render_chat(tokenizer, (), answer=True)
