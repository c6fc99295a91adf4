"""Text for people, of which nothing steers a terminal, hides, or is taken for a line of ours.

Names, keys, labels and logs are written by others. https://unicode.org/reports/tr36/ says what such
text can do by characters that are not seen, https://trojansource.codes by those that turn its order
round. CI systems take some lines of output for commands:
https://docs.github.com/actions/reference/workflow-commands-for-github-actions and
https://learn.microsoft.com/azure/devops/pipelines/scripts/logging-commands
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from weightsmith.values import Json

QUOTED = "  | "
"""Begins every further line of a message that has several: what follows is quoted."""
_BLANK = frozenset("\u115f\u1160\u17b4\u17b5\u3164\uffa0")
"""Letters by their category, and drawn as nothing."""
_COMMAND = re.compile(r"(?m)^([^\S\n]*):(?=:)|##(?=\w*\[)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_TURNING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def escaped(text: str) -> str:
    """Return a text that others wrote as part of one line; what cannot be seen is spelled out."""
    if text.isprintable() and not _BLANK.intersection(text):
        return text
    return "".join(c if c.isprintable() and c not in _BLANK else _spelled(c) for c in text)


def joined(lines: Iterable[str]) -> str:
    """Return lines of ours as a text; a newline in what one of them quotes does not add another."""
    return "\n".join(map(escaped, lines))


def quoted(text: str) -> str:
    """Return a message that may have several lines, such as the end of a log.

    All but the first are marked, so that none of them passes for a line of ours.
    """
    first, *others = text.replace("\r\n", "\n").split("\n")
    return "\n".join([escaped(first), *(QUOTED + escaped(line) for line in others)])


def printed(text: str) -> str:
    """Return what goes to a stream for people: newlines and tabs stay, nothing else steers it.

    No CI system takes any of it for a command.
    """
    if not text.isprintable():
        lines = ("\t".join(map(escaped, line.split("\t"))) for line in text.split("\n"))
        text = "\n".join(lines)
    return _COMMAND.sub(lambda m: f"{m[1]}\\x3a" if m[1] is not None else "#\\x23", text)


def passed_on(line: str) -> str:
    """Return a line of another program's output as it is printed on; colours are taken out."""
    return printed(_COLOUR.sub("", line))


def as_json(value: Json) -> str:
    """Return JSON in one line of ASCII that no terminal and no CI system obeys.

    It is the same value: what JSON leaves as it is, and they do not, is written as an escape.
    """
    return json.dumps(value).replace("\x7f", "\\u007f").replace("##", "#\\u0023")


def upright(text: str) -> str:
    """Return a text for a page: controls and what turns its order round are spelled out.

    Joiners and marks that languages need stay.
    """
    return _TURNING.sub(lambda match: _spelled(match[0]), text)


def _spelled(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}" if character not in "\n\t\r" else repr(character)[1:-1]
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
