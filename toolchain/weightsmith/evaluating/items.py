"""Read evaluation data: JSON Lines with a question and its expected answer per line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from weightsmith.core.errors import UsageError
from weightsmith.core.safe_parse import parse, small_file
from weightsmith.core.values import JsonValue, key_of
from weightsmith.evaluating.tool_calls import check_expected, check_tools, tools_text
from weightsmith.recipe.schema import TOLERANCE

_LONGEST_LINE = 1 << 20
_KEPT = 4 << 20
"""Bytes of a file whose questions stay in memory for who asks next."""
_MOST_ITEMS = 100_000
_ROLES = frozenset({"system", "user", "assistant", "developer", "tool"})
_TOLERANCE = re.compile(TOLERANCE, re.ASCII)
_SHAPE = (
    'a line is {"prompt": "…", "expected": "…"} or {"messages": […], "expected": "…"};'
    ' metric choice also needs "choices": ["…", "…"]'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question: its chat messages, and the accepted answers."""

    messages: tuple[Mapping[str, str], ...]
    expected: tuple[str, ...]
    """Texts, patterns, or JSON schemas as text; for `choice`, some of the choices."""
    line: int
    choices: tuple[str, ...] = ()
    """The options of metric `choice`."""
    tools: str = ""
    """Tools that may be called, as JSON in the form of OpenAI's API; empty for none."""
    tolerance: str = ""
    """For metric `numeric`: how far this answer may be off; empty: as far as the suite says."""
    plain: bool = False
    """True for a single prompt: metric `choice` continues it without a chat template."""

    @property
    def prompt(self) -> str:
        """The text of the last message, for display."""
        return self.messages[-1]["content"]


def read_items(path: Path, metric: str = "contains") -> tuple[Item, ...]:
    """Return the questions of a data file in order; blank lines are skipped.

    What may be expected depends on the metric: numbers for `numeric`, else text.
    Raises UsageError with file and line for invalid lines and duplicate questions, and for a file
    without questions.
    """
    data = small_file(path, _KEPT)
    return _read(path, metric, data) if data else _read.__wrapped__(path, metric, data)


@lru_cache(maxsize=4)  # a build asks for them ten times
def _read(path: Path, metric: str, _content: bytes) -> tuple[Item, ...]:
    items: list[Item] = []
    asked: dict[str, int] = {}
    for number, value in _lines(path):
        item = _item(value, number, f"{path}:{number}", metric)
        asks = [[dict(message) for message in item.messages], item.choices, item.tools]
        key = json.dumps(asks, sort_keys=True)
        if key in asked:
            raise UsageError(
                f"{path}:{number} duplicates the question of line {asked[key]}",
                hint='remove one of them; "expected" may be a list of accepted answers',
            )
        asked[key] = number
        items.append(item)
        if len(items) > _MOST_ITEMS:
            raise UsageError(f"{path} has more than {_MOST_ITEMS} questions", hint="take a sample")
    if not items:
        raise UsageError(f"{path} has no questions", hint=_SHAPE)
    return tuple(items)


def sample(items: Sequence[Item], limit: int) -> tuple[Item, ...]:
    """Return at most `limit` questions in their order, chosen by content; all for a limit of 0.

    The choice depends neither on the order of the file nor on answers that count as right, and a
    larger limit keeps the questions of a smaller one.
    """
    if not 0 < limit < len(items):
        return tuple(items)

    def place(number: int) -> str:
        item = items[number]
        tools = [item.tools] if item.tools else []
        return key_of([[dict(m) for m in item.messages], list(item.choices), *tools])

    chosen = sorted(range(len(items)), key=place)[:limit]
    return tuple(items[number] for number in sorted(chosen))


def read_prompts(path: Path) -> tuple[tuple[Mapping[str, str], ...], ...]:
    """Return the chats of a data file in order, ignoring expected answers.

    Raises UsageError with file and line for invalid lines, and for a file without chats.
    """
    found = tuple(
        _item({**value, "expected": "-"}, number, f"{path}:{number}")
        for number, value in _lines(path)
    )
    if not found:
        raise UsageError(f"{path} has no prompts", hint='a line is {"prompt": "…"}')
    return tuple(item.messages for item in found)


def _lines(path: Path) -> Iterator[tuple[int, Mapping[str, JsonValue]]]:
    """Yield the number of each line that is not blank, and its JSON object."""
    try:
        with path.open("rb") as stream:
            lines = iter(lambda: stream.readline(_LONGEST_LINE + 1), b"")
            for number, raw in enumerate(lines, start=1):
                where = f"{path}:{number}"
                if len(raw) > _LONGEST_LINE:
                    raise UsageError(
                        f"{where} is longer than {_LONGEST_LINE} bytes",
                        hint="use JSON Lines, one question per line",
                    )
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError:
                    raise UsageError(
                        f"{where} is not UTF-8", hint="save the file as UTF-8"
                    ) from None
                if not text:
                    continue
                try:
                    value = parse(text)
                except ValueError as error:
                    raise UsageError(f"{where}: invalid JSON: {error}", hint=_SHAPE) from None
                if not isinstance(value, dict):
                    kind = type(value).__name__
                    raise UsageError(f"{where} is not a JSON object but a {kind}", hint=_SHAPE)
                yield number, value
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}", hint="give the path of a JSON Lines file"
        ) from None


def _item(
    value: Mapping[str, JsonValue], number: int, where: str, metric: str = "contains"
) -> Item:
    if ("prompt" in value) == ("messages" in value):
        found = "both prompt and messages" if "prompt" in value else "neither prompt nor messages"
        raise UsageError(f"{where} has {found}", hint=_SHAPE)
    messages: tuple[Mapping[str, str], ...]
    if "prompt" in value:
        messages = ({"role": "user", "content": _text(value["prompt"], "prompt", where)},)
    else:
        messages = _messages(value["messages"], where)
    listed = value.get("choices", [])
    if not isinstance(listed, list):
        raise UsageError(f"{where}: choices is not a list of strings", hint=_SHAPE)
    choices = tuple(_text(choice, "a choice", where) for choice in listed)
    if choices and len(set(choices)) < max(2, len(choices)):
        raise UsageError(
            f"{where}: fewer than two choices, or duplicates", hint="list each choice once"
        )
    if "expected" not in value:
        raise UsageError(f"{where} has no expected", hint=_SHAPE)
    expected = value["expected"]
    answers = expected if isinstance(expected, list) else [expected]
    tools = ""
    if metric == "tool-call" or "tools" in value:
        names = check_tools(value.get("tools"), where)
        tools = tools_text(value["tools"])
        if metric == "tool-call":
            answers = [check_expected(expected, names, where)]
    if metric == "numeric":
        numbers = (int, float)
        answers = [json.dumps(a) if type(a) in numbers else a for a in answers]
    if not answers:
        raise UsageError(f"{where}: expected is an empty list", hint=_SHAPE)
    return Item(
        messages=messages,
        expected=tuple(_answer(answer, choices, where) for answer in answers),
        line=number,
        choices=choices,
        tools=tools,
        tolerance=_tolerance(value.get("tolerance", ""), where),
        plain="prompt" in value,
    )


def _messages(value: JsonValue, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise UsageError(f"{where}: messages is not a list of messages", hint=_SHAPE)
    found = []
    for position, message in enumerate(value):
        name = f"messages[{position}]"
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in _ROLES:
            raise UsageError(
                f"{where}: {name} has an unknown role", hint=f"one of: {', '.join(sorted(_ROLES))}"
            )
        content = _text(message.get("content"), f"{name}.content", where)
        found.append({"role": role, "content": content})
    return tuple(found)


def _tolerance(value: JsonValue, where: str) -> str:
    text = value if isinstance(value, str) else "" if isinstance(value, bool) else json.dumps(value)
    if value != "" and not _TOLERANCE.fullmatch(text):
        raise UsageError(
            f"{where}: tolerance {str(value)[:60]!r} is not one",
            hint="give how far the answer may be off: a number such as 0.5, or a share, as '2%'",
        )
    return text


def _answer(answer: JsonValue, choices: tuple[str, ...], where: str) -> str:
    """Return an expected answer as text: schemas as JSON, choice indices as the choice."""
    if isinstance(answer, dict):
        return json.dumps(answer, sort_keys=True)
    if choices and isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(choices):
            raise UsageError(
                f"{where}: expected {answer} is not the index of a choice",
                hint=f"give an index from 0 to {len(choices) - 1}",
            )
        return choices[answer]
    text = _text(answer, "expected", where)
    if choices and text not in choices:
        raise UsageError(
            f"{where}: expected {text!r} is not one of its choices",
            hint=f"choices: {', '.join(map(repr, choices[:6]))}",
        )
    return text


def _text(value: JsonValue, name: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{where}: {name} is not a non-empty string", hint=_SHAPE)
    return value
