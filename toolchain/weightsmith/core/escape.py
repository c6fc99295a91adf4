"""Makes untrusted text safe to show: nothing controls a terminal, is hidden, or fakes our output.

Names, keys, labels and logs come from others. https://unicode.org/reports/tr36/ describes attacks
by invisible characters, https://trojansource.codes those by characters that reverse the order of
text. CI systems interpret some lines of output as commands:
https://docs.github.com/actions/reference/workflow-commands-for-github-actions and
https://learn.microsoft.com/azure/devops/pipelines/scripts/logging-commands
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import TextIO

from weightsmith.core.values import JsonValue

QUOTED = "  | "
"""Starts every line of a message but the first: the rest is quoted."""
_BLANK = frozenset("\u115f\u1160\u17b4\u17b5\u3164\uffa0")
"""Letters by category that are drawn as nothing."""
_COMMAND = re.compile(r"(?m)^([^\S\n]*):(?=:)|##(?=\w*\[)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_TURNING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def escaped(text: str) -> str:
    """Return untrusted text for use within a line, with invisible characters escaped."""
    if text.isprintable() and not _BLANK.intersection(text):
        return text
    return "".join(c if c.isprintable() and c not in _BLANK else _spelled(c) for c in text)


def joined(lines: Iterable[str]) -> str:
    """Join our lines to a text; newlines inside a line are escaped."""
    return "\n".join(map(escaped, lines))


def quoted(text: str) -> str:
    """Return a message that may have several lines, such as the end of a log.

    All but the first are marked, so that none of them looks like ours.
    """
    first, *others = text.replace("\r\n", "\n").split("\n")
    return "\n".join([escaped(first), *(QUOTED + escaped(line) for line in others)])


def printed(text: str) -> str:
    """Return text for output to people: newlines and tabs stay, other control characters do not.

    No CI system interprets any of it as a command.
    """
    if not text.isprintable():
        lines = ("\t".join(map(escaped, line.split("\t"))) for line in text.split("\n"))
        text = "\n".join(lines)
    return _COMMAND.sub(lambda m: f"{m[1]}\\x3a" if m[1] is not None else "#\\x23", text)


def passed_on(line: str) -> str:
    """Return a line of another program's output for printing, without colours."""
    return printed(_COLOUR.sub("", line))


def as_json(value: JsonValue) -> str:
    """Return JSON in one line of ASCII that no terminal or CI system interprets.

    The value stays the same: characters that they would interpret are written as JSON escapes. What
    is no number, which JSON has not, is null.
    """
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:
        text = json.dumps(_with_numbers_only(value))
    return text.replace("\x7f", "\\u007f").replace("##", "#\\u0023")


def _with_numbers_only(value: JsonValue) -> JsonValue:
    if isinstance(value, Mapping):
        return {key: _with_numbers_only(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_with_numbers_only(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def upright(text: str) -> str:
    """Return text for a page, with control and bidirectional characters escaped.

    Joiners and marks that languages need stay.
    """
    return _TURNING.sub(lambda match: _spelled(match[0]), text)


def _spelled(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}" if character not in "\n\t\r" else repr(character)[1:-1]
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def put_line(text: str, stream: TextIO) -> str:
    """Print a line and flush it; once that fails, discard all further output.

    Return why it was not written, as on a full disk; empty if the reader has closed the pipe.
    """
    try:
        print(printed(text), file=stream, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        # The reader, such as `head`, has closed the pipe; the work goes on.
        return "" if isinstance(error, BrokenPipeError) else str(error.strerror)
    return ""


def pinned(reference: str, digest: str) -> str:
    """Return a reference with its digest, without repeating it."""
    return escaped(reference if "@" in reference else f"{reference}@{digest}")


def clock(seconds: float) -> str:
    """Return `minutes:seconds`, or `hours:minutes:seconds` from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
