"""Names of a tokenizer's files and of its chat template."""

from __future__ import annotations

from pathlib import PurePosixPath

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
_NO_VOCABULARY = {
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
}
VOCABULARY_FILES = tuple(name for name in TOKENIZER_FILES if name not in _NO_VOCABULARY)
"""Those that hold the tokens; without one of them, there is no tokenizer."""
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_NAMED_TEMPLATES = "additional_chat_templates"
"""Folder of further templates, `NAME.jinja`, beside the default one."""


def is_named_template(name: str) -> bool:
    """Return whether a model's file is a further chat template, such as one for tools."""
    path = PurePosixPath(name)
    return str(path.parent) == _NAMED_TEMPLATES and path.suffix == ".jinja"
