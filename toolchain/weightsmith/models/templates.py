"""A tokenizer's files, and a chat template, an untrusted program, rendered in Jinja's sandbox.

The sandbox prevents access to files and Python, but does not limit time and memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from weightsmith.core import time_limits
from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import parse, read_json
from weightsmith.core.time_limits import TooLong, cpu_limit, doing
from weightsmith.core.values import JsonValue
from weightsmith.models.task import SentenceTransformers

_PARTS = re.compile(r"\bfor\s+\w+\s+in\b[^%]{0,200}\bcontent\b")
"""A loop over a message's content, which only a template for contents in parts has."""
_TOOLS = re.compile(r"\btools\b")
"""The variable that templates have the tools in."""
_THOUGHTS = re.compile(r"\breasoning(?:_content)?\b")
"""The variables that templates have an answer's thoughts in."""
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


def takes_parts(template: str) -> bool:
    """Return whether a chat template takes contents in parts, as those of pictures are."""
    return _PARTS.search(template) is not None


def has_tools(template: str) -> bool:
    """Return whether a chat template says which tools may be called."""
    return _TOOLS.search(template) is not None


def writes_thoughts(template: str) -> bool:
    """Return whether a chat template reads the thoughts of an answer."""
    return _THOUGHTS.search(template) is not None


def own_template(model: Path) -> str | None:
    """Return a folder's default chat template, None without one or with an empty one.

    chat_template.jinja comes before tokenizer_config.json, as in transformers. Raises InputRefused
    for a file that is not text.
    """
    own = model / "chat_template.jinja"
    if own.is_file():
        try:
            return own.read_text("utf-8") or None
        except UnicodeDecodeError:
            raise InputRefused(f"{own} is not UTF-8", hint="replace the chat template") from None
    config = model / "tokenizer_config.json"
    if not config.is_file():
        return None
    template = read_json(config).get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        named = {str(entry.get("name")): entry.get("template") for entry in entries}
        template = named.get("default")
    return template if isinstance(template, str) and template else None


_MARK = "<__media_"
_WITH_BREAKS = "{{ said.replace('<__media_', '\\n\\n<__media_').replace('__>', '__>\\n\\n') }}"
_BREAKS = (
    "{%- set said %}",
    "{% endset -%}{% if '<__media_' in said %}" + _WITH_BREAKS + "{% else %}{{ said }}{% endif %}",
)
"""Around a template: two line breaks before and after what stands for a picture in llama.cpp's
server, `<__media_…__>`."""


def gguf_template(model: Path) -> str | None:
    """Return the chat template that a GGUF file of a folder's model has; None without one.

    It is the folder's own. Only Gemma 3's processor writes line breaks around a picture, after the
    template, which llama.cpp's server does not: there the template itself does.
    """
    own, settings = own_template(model), model / "config.json"
    if not own or _MARK in own or not settings.is_file():
        return own
    config = read_json(settings)
    breaks = config.get("model_type") == "gemma3" and config.get("vision_config")
    return own.join(_BREAKS) if breaks else own


class TemplateOverLimit(InputRefused):
    """A chat template took too much time or memory: where there is more, it may do."""


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, JsonValue]],
    *,
    answer: bool,
    hint: str = "",
    tools: str = "",
) -> str:
    """Render messages by the tokenizer's chat template; `answer` adds the generation prompt.

    `tools` are what the model may call, as JSON.

    Raises InputRefused if the template raises an error, TemplateOverLimit if it takes too much time
    or memory.
    """
    named = f"the chat template of {tokenizer.name_or_path}"
    with doing(f"rendering {named}"):  # what fails in telling that is no fault of the template
        try:
            with cpu_limit(time_limits.FOREIGN_SECONDS):
                return str(
                    tokenizer.apply_chat_template(
                        [dict(message) for message in messages],
                        add_generation_prompt=answer,
                        **({"tools": parse(tools)} if tools else {}),
                        tokenize=False,
                    )
                )
        except TooLong:
            raise TemplateOverLimit(
                f"{named} exceeded {time_limits.FOREIGN_SECONDS:g} s of CPU time for one"
                " conversation",
                hint="look for nested loops in it, or give the model another chat_template.jinja",
            ) from None
        except MemoryError:
            raise TemplateOverLimit(
                f"{named} exceeded the job's memory for one conversation",
                hint="look for strings that grow in it, or give the model another"
                " chat_template.jinja",
            ) from None
        except Exception as error:  # noqa: BLE001 - templates can raise anything
            raise InputRefused(
                f"{named} refused a conversation: {error}",
                hint=hint or "write the conversations in the form that the template expects",
            ) from None


QUERY, DOCUMENT = "{query}", "{document}"
"""What stands for the texts of a pair in a prompt, as llama.cpp's server has it."""


def pair_prompt(tokenizer: Any, sentence: SentenceTransformers) -> str:
    """Return the prompt of a reranker by two tokens, with QUERY and DOCUMENT in place of the texts.

    Raises InputRefused for a chat template that does not write each text once, as it is.
    """

    def rendered(query: str, document: str) -> str:
        return render_chat(tokenizer, sentence.pair(query, document), answer=sentence.begins_answer)

    prompt, other = rendered(QUERY, DOCUMENT), rendered(" a\n", "B. ")
    if (
        prompt.count(QUERY) != 1
        or prompt.count(DOCUMENT) != 1
        or prompt.replace(QUERY, " a\n").replace(DOCUMENT, "B. ") != other
    ):
        raise InputRefused(
            f"the chat template of {tokenizer.name_or_path} does not write a pair's query and"
            " document once each, as they are, so that no server can",
            hint="give the model the chat_template.jinja of its roles `query` and `document`,"
            " without filters such as trim",
        )
    return prompt


def is_named_template(name: str) -> bool:
    """Return whether a model's file is a further chat template, such as one for tools."""
    path = PurePosixPath(name)
    return str(path.parent) == _NAMED_TEMPLATES and path.suffix == ".jinja"
