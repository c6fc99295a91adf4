"""The tiny example's base with other chat templates and begin tokens, and a question for it."""

import json
import shutil
from pathlib import Path
from typing import Any

from weightsmith.evaluating.items import Item

from tests.paths import TINY

ITEM = Item(
    messages=({"role": "user", "content": "What is the capital of Narmi?"},), expected=("",), line=1
)
WORDED = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
BEGUN = "{{ bos_token }}" + WORDED


def model(folder: Path, template: str, *, begins: bool) -> Path:
    """The tiny base with this chat template or none, whose tokenizer begins a text with <s>."""
    shutil.copytree(TINY / "base", folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer.model").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"chat_template": template, "add_bos_token": begins}
    if not template:
        del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if begins:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        text: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
        begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        }
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder
