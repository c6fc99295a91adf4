"""Read evaluation data: JSON Lines with a question and its expected answer per line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from weightsmith.core.errors import UsageError
from weightsmith.core.jobs import in_parts
from weightsmith.core.safe_parse import parse, small_file
from weightsmith.core.values import JsonValue, key_of
from weightsmith.evaluating.pictures import Picture, picture_in
from weightsmith.evaluating.tool_calls import check_expected, check_tools, tools_text
from weightsmith.recipe.schema import TOLERANCE

_LONGEST_LINE = 1 << 20
_KEPT = 4 << 20
"""Bytes of a file whose questions stay in memory for who asks next."""
_MOST_ITEMS = 100_000
_ROLES = frozenset({"system", "user", "assistant", "developer", "tool"})
_NOT = 'what must not be in an answer is {"not": "pattern"} or {"not": ["pattern", …]}'
_OBJECTS = frozenset({"json-schema", "tool-call", "command"})
"""Metrics whose expected answers may be objects; of `regex`, there is one form alone."""
_TOLERANCE = re.compile(TOLERANCE, re.ASCII)
_MOST_PICTURES = 16
"""Of one question."""
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
    parts: tuple[str, ...] = ()
    """For `label`, the words that have a label each; for `rerank`, the documents."""
    grades: tuple[tuple[str, float], ...] = ()
    """For `embedding` and `rerank`: the relevant documents, by id or index, and how relevant."""
    is_set: bool = False
    """For `label`: all expected labels are true of the text, and no others."""
    pictures: tuple[Picture, ...] = ()
    """In their order."""

    @property
    def prompt(self) -> str:
        """The text of the last message with its pictures' names, for display."""
        shown = [one.shown for one in self.pictures]
        return " ".join([*shown, *filter(None, [self.messages[-1]["content"]])])

    @property
    def asks(self) -> JsonValue:
        """All that a model is told, with the digests of its pictures: equal for equal questions."""
        asked: list[JsonValue] = [
            [dict(m) for m in self.messages],
            list(self.choices),
            self.tools,
            list(self.parts),
        ]
        seen: list[JsonValue] = [
            [one.digest, one.seen.message, one.seen.at] for one in self.pictures
        ]
        return [*asked, seen] if seen else asked

    def in_parts(self, part: Callable[[Picture], JsonValue]) -> list[dict[str, JsonValue]]:
        """Return the messages, with contents in parts where they have pictures."""
        seen = [one.seen for one in self.pictures]
        return in_parts(self.messages, seen, lambda place: part(self.pictures[place]))


def read_items(path: Path, metric: str = "contains") -> tuple[Item, ...]:
    """Return the questions of a data file in order; blank lines are skipped.

    What may be expected depends on the metric: numbers for `numeric`, else text.
    Raises UsageError with file and line for invalid lines and duplicate questions, and for a file
    without questions.
    """
    data = small_file(path, _KEPT)
    if data:
        items = _read(path, metric, data)
        if not any(item.pictures for item in items):  # whose files may change meanwhile
            return items
    return _read.__wrapped__(path, metric, data)


@lru_cache(maxsize=4)  # a build asks for them ten times
def _read(path: Path, metric: str, _content: bytes) -> tuple[Item, ...]:
    items: list[Item] = []
    asked: dict[str, int] = {}
    for number, value in _lines(path):
        where = f"{path}:{number}"
        pooled = _POOLED.get(metric)
        item = (
            pooled(value, number, where)
            if pooled
            else _item(value, number, where, path.parent, metric)
        )
        if items and _form(item) != _form(items[0]):
            raise UsageError(f"{where} has another form than the lines before", hint=_LABEL)
        key = json.dumps(item.asks, sort_keys=True)
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
        if item.pictures:
            return key_of(item.asks)
        tools = [item.tools] if item.tools else []
        more = [*tools, *([list(item.parts)] if item.parts else [])]
        return key_of([[dict(m) for m in item.messages], list(item.choices), *more])

    chosen = sorted(range(len(items)), key=place)[:limit]
    return tuple(items[number] for number in sorted(chosen))


def read_prompts(path: Path) -> tuple[tuple[Mapping[str, str], ...], ...]:
    """Return the chats of a data file in order, without expected answers and pictures.

    Raises UsageError with file and line for invalid lines, and for a file without chats.
    """
    found = tuple(
        _item({**value, "expected": "-"}, number, f"{path}:{number}", path.parent)
        for number, value in _lines(path)
    )
    if not found:
        raise UsageError(f"{path} has no prompts", hint='a line is {"prompt": "…"}')
    texts = (item.messages for item in found)
    return tuple(chat for chat in texts if all(message["content"] for message in chat))


def picture_files(path: Path) -> tuple[str, ...]:
    """Return the pictures that a data file's lines name, relative to it; () for other texts."""
    found: dict[str, None] = {}
    if b"image" not in small_file(path, _KEPT) and path.stat().st_size <= _KEPT:
        return ()
    with suppress(UsageError):  # of other columns, which have no pictures
        for number, value in _lines(path):
            if "image" in value or "messages" in value:
                _, pictures = _asked(value, f"{path}:{number}", path.parent)
                found |= {one.name: None for one in pictures if one.path}
    return tuple(found)


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
                    value = parse(text, unique=True)
                    if not _is_finite(value):
                        raise ValueError("NaN, Infinity and numbers beyond 1e308 are none of JSON")
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


def _is_finite(value: JsonValue) -> bool:
    """Return whether a request can be made of a value: Python reads numbers that JSON lacks."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def _item(
    value: Mapping[str, JsonValue],
    number: int,
    where: str,
    folder: Path,
    metric: str = "contains",
) -> Item:
    messages, pictures = _asked(value, where, folder)
    if pictures and metric == "choice":
        raise UsageError(
            f"{where} has a picture, and metric choice asks for likelihoods of texts",
            hint="name the choices in the question, and use metric exact or contains",
        )
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
    _check_objects(answers, metric, where)
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
        pictures=pictures,
    )


def _check_objects(answers: Sequence[JsonValue], metric: str, where: str) -> None:
    """Raise UsageError for an expected object that the metric would take for a text."""
    for one in answers if metric not in _OBJECTS else ():
        if not isinstance(one, dict):
            continue
        patterns = one.get("not")
        listed = patterns if isinstance(patterns, list) else [patterns]
        texts = bool(listed) and all(isinstance(pattern, str) for pattern in listed)
        if metric != "regex" or set(one) != {"not"} or not texts:
            raise UsageError(
                f"{where}: expected is {json.dumps(one)[:60]}, and metric {metric} knows no such"
                " object",
                hint=_NOT if metric == "regex" else _SHAPE,
            )


def _asked(
    value: Mapping[str, JsonValue], where: str, folder: Path
) -> tuple[tuple[Mapping[str, str], ...], tuple[Picture, ...]]:
    """Return a row's messages with their texts alone, and its pictures."""
    if ("prompt" in value) == ("messages" in value):
        found = "both prompt and messages" if "prompt" in value else "neither prompt nor messages"
        raise UsageError(f"{where} has {found}", hint=_SHAPE)
    messages: tuple[Mapping[str, str], ...]
    pictures: tuple[Picture, ...] = ()
    if "prompt" in value:
        messages = ({"role": "user", "content": _text(value["prompt"], "prompt", where)},)
    else:
        messages, pictures = _messages(value["messages"], where, folder)
    if "image" in value:
        name = _text(value["image"], "image", where)
        last = len(messages) - 1
        first = picture_in(folder, name, where).at(last, 0)
        before = [one for one in pictures if one.seen.message < last]
        pictures = (*before, first, *pictures[len(before) :])
    if len(pictures) > _MOST_PICTURES:
        raise UsageError(
            f"{where} has {len(pictures)} pictures; at most {_MOST_PICTURES} are asked at once",
            hint="ask about fewer",
        )
    return messages, pictures


def _messages(
    value: JsonValue, where: str, folder: Path
) -> tuple[tuple[dict[str, str], ...], tuple[Picture, ...]]:
    """Return messages with their texts alone, and the pictures in them."""
    if not isinstance(value, list) or not value:
        raise UsageError(f"{where}: messages is not a list of messages", hint=_SHAPE)
    found, pictures = [], list[Picture]()
    for position, message in enumerate(value):
        name = f"messages[{position}]"
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in _ROLES:
            raise UsageError(
                f"{where}: {name} has an unknown role", hint=f"one of: {', '.join(sorted(_ROLES))}"
            )
        if lost := next(filter(message.get, ("tool_calls", "function_call")), ""):
            raise UsageError(
                f"{where}: {name} has {lost}, and earlier messages are asked as texts alone",
                hint="end the messages before the first call, or write it into the content",
            )
        content = message.get("content")
        if isinstance(content, list) and content:
            text = ""
            for part in content:
                said, url = _part(part, f"{name}.content", where)
                if url:
                    pictures.append(picture_in(folder, url, where).at(position, len(text)))
                text += said
        else:
            text = _text(content, f"{name}.content", where)
        found.append({"role": role, "content": text})
    return tuple(found), tuple(pictures)


def _part(part: JsonValue, name: str, where: str) -> tuple[str, str]:
    """Return the text or the picture's address of a part of a content, as in OpenAI's API."""
    if isinstance(part, dict) and part.get("type") == "text":
        return _text(part.get("text"), f"{name}.text", where), ""
    if isinstance(part, dict) and part.get("type") == "image_url":
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, dict) else None
        return "", _text(url, f"{name}.image_url.url", where)
    raise UsageError(
        f"{where}: {name} has a part that is neither a text nor a picture",
        hint='a part is {"type": "text", "text": "…"} or'
        ' {"type": "image_url", "image_url": {"url": "PATH"}}',
    )


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


_LABEL = (
    'each line is {"text": "…", "expected": "LABEL"}, or {"text": "…", "labels": ["LABEL", …]} with'
    ' all that are true of it, or {"words": ["…", …], "expected": ["LABEL", …]}'
)
_EMBEDDING = (
    'a line is {"query": "…", "expected": ["ID", …]} or {"query": "…", "expected": {"ID": 2}}'
)
_RERANK = (
    'a line is {"query": "…", "documents": ["…", "…"], "expected": 0}, where expected is the index'
    ' of the relevant one, a list of them, or {"INDEX": GRADE}'
)
_CORPUS = 'a line is {"id": "…", "text": "…"}, and may have a "title"'
_MOST_PARTS = 1000
_MOST_DOCUMENTS = 50_000
_MOST_LETTERS = 64 << 20


def _label_item(value: Mapping[str, JsonValue], number: int, where: str) -> Item:
    """Return a text with its label or its set of labels, or words with a label each."""
    is_set = "labels" in value
    key = "labels" if is_set else "expected"
    expected = value.get(key)
    if is_set and (not isinstance(expected, list) or {"words", "expected"} & value.keys()):
        raise UsageError(f"{where}: labels is no list, or is beside words or expected", hint=_LABEL)
    listed = expected if isinstance(expected, list) else [expected]
    labels = [_given(label, f"a label of {key}", where, _LABEL) for label in listed]
    if "words" not in value:
        text = _one_of(value, ("text", "prompt"), where, _LABEL)
        if is_set and len(set(labels)) < len(labels):
            raise UsageError(f"{where}: labels has one of them twice", hint="name each once")
        if is_set:
            return _pooled(text, number, expected=tuple(labels), is_set=True)
        if not labels:
            raise UsageError(f"{where}: expected has no label", hint=_LABEL)
        return _pooled(text, number, expected=tuple(labels))
    words = _texts(value["words"], "words", where, _LABEL)
    if any(word.split() != [word] for word in words):
        raise UsageError(f"{where}: a word of words has white space in it", hint=_LABEL)
    if len(labels) != len(words):
        raise UsageError(
            f"{where} has {len(words)} words and {len(labels)} labels", hint="give each word one"
        )
    return _pooled(" ".join(words), number, expected=tuple(labels), parts=words)


def _embedding_item(value: Mapping[str, JsonValue], number: int, where: str) -> Item:
    """Return a query with the ids of its relevant documents."""
    query = _one_of(value, ("query", "prompt"), where, _EMBEDDING)
    grades = _grades(value.get("expected"), where, _EMBEDDING)
    return _pooled(query, number, expected=tuple(dict(grades)), grades=grades)


def _rerank_item(value: Mapping[str, JsonValue], number: int, where: str) -> Item:
    """Return a query with documents, and the indices of the relevant ones."""
    query = _one_of(value, ("query", "prompt"), where, _RERANK)
    documents = _texts(value.get("documents"), "documents", where, _RERANK)
    if len(set(documents)) < max(2, len(documents)):
        raise UsageError(
            f"{where}: fewer than two documents, or duplicates", hint="list each document once"
        )
    grades = _grades(value.get("expected"), where, _RERANK)
    known = {str(index) for index in range(len(documents))}  # "01" would be "1" once more
    for index, _ in grades:
        if index not in known:
            raise UsageError(
                f"{where}: expected {index!r} is not the index of a document",
                hint=f"give an index from 0 to {len(documents) - 1}",
            )
    return _pooled(query, number, expected=tuple(dict(grades)), parts=documents, grades=grades)


_POOLED: Mapping[str, Callable[[Mapping[str, JsonValue], int, str], Item]] = {
    "label": _label_item,
    "embedding": _embedding_item,
    "rerank": _rerank_item,
}
"""Metrics of models that do not chat -> what reads their lines."""


def _pooled(
    text: str,
    number: int,
    *,
    expected: tuple[str, ...],
    parts: tuple[str, ...] = (),
    grades: tuple[tuple[str, float], ...] = (),
    is_set: bool = False,
) -> Item:
    return Item(
        messages=({"role": "user", "content": text},),
        expected=expected,
        line=number,
        plain=True,
        parts=parts,
        grades=grades,
        is_set=is_set,
    )


def _form(item: Item) -> tuple[bool, bool]:
    """Return what all lines of a file have in common, for metric `label`."""
    return item.is_set, bool(item.parts and not item.grades)


def _one_of(value: Mapping[str, JsonValue], names: Sequence[str], where: str, shape: str) -> str:
    found = [name for name in names if name in value]
    if len(found) != 1:
        raise UsageError(f"{where} has {' and '.join(found) or f'no {names[0]}'}", hint=shape)
    return _given(value[found[0]], found[0], where, shape)


def _texts(value: JsonValue, name: str, where: str, shape: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not 0 < len(value) <= _MOST_PARTS:
        raise UsageError(f"{where}: {name} is not a list of 1 to {_MOST_PARTS} texts", hint=shape)
    return tuple(_given(one, f"one of {name}", where, shape) for one in value)


def _given(value: JsonValue, name: str, where: str, shape: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{where}: {name} is not a non-empty string", hint=shape)
    return value


def _grades(value: JsonValue, where: str, shape: str) -> tuple[tuple[str, float], ...]:
    """Return the relevant documents with their grades, the most relevant first."""
    rows = value if isinstance(value, dict) else None
    if rows is None:
        rows = {}
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, bool) or not isinstance(one, str | int) or str(one) in rows:
                raise UsageError(
                    f"{where}: expected does not name documents, each once", hint=shape
                )
            rows[str(one)] = 1
    found = {}
    for key, grade in rows.items():
        number = isinstance(grade, int | float) and not isinstance(grade, bool)
        if not number or not 0 <= grade <= 1000 or not math.isfinite(grade):
            raise UsageError(
                f"{where}: {str(grade)[:60]!r} is no grade of a document",
                hint="give a number from 0, not relevant, to 1000",
            )
        if grade > 0:
            found[key] = float(grade)
    if not found:
        raise UsageError(f"{where}: expected names no relevant document", hint=shape)
    return tuple(sorted(found.items(), key=lambda row: (-row[1], row[0])))


def read_corpus(path: Path) -> tuple[tuple[str, str], ...]:
    """Return the documents of a corpus in order: id, and the title before the text.

    Raises UsageError with file and line for invalid lines and ids that occur twice, and for a file
    without documents or with too many.
    """
    found: dict[str, str] = {}
    letters = 0
    for number, value in _lines(path):
        where = f"{path}:{number}"
        key = value.get("id", value.get("_id"))
        if isinstance(key, int) and not isinstance(key, bool):
            key = str(key)
        key = _given(key, "id", where, _CORPUS)
        if key in found:
            raise UsageError(f"{where}: another document has the id {key!r}", hint="remove one")
        title = value.get("title") or ""
        texts = [title] if isinstance(title, str) and title.strip() else []
        found[key] = " ".join([*texts, _given(value.get("text"), "text", where, _CORPUS)])
        letters += len(found[key])
        if len(found) > _MOST_DOCUMENTS or letters > _MOST_LETTERS:
            raise UsageError(
                f"{path} has more than {_MOST_DOCUMENTS} documents or {_MOST_LETTERS >> 20} MiB",
                hint="take a part of the corpus: the relevant documents and some others",
            )
    if len(found) < 2:
        raise UsageError(f"{path} has fewer than two documents", hint=_CORPUS)
    return tuple(found.items())


def check_documents(
    items: Sequence[Item], corpus: Sequence[tuple[str, str]], path: str, corpus_path: str
) -> None:
    """Raise UsageError with file and line of a question whose document the corpus lacks."""
    known = {key for key, _ in corpus}
    for item in items:
        for key, _ in item.grades:
            if key not in known:
                raise UsageError(
                    f"{path}:{item.line}: expected {key!r} is no document of {corpus_path}",
                    hint="add it to the corpus, or correct the id",
                )
