"""Parses untrusted JSON, YAML and patterns within limits; nothing else in the package parses them.

Besides broken text it refuses what later code then need not expect: nesting too deep for recursion,
duplicate keys (on which two readers would disagree), lone surrogates (which cannot be written
again), too many values for memory, and YAML whose aliases expand to more than was written.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from weightsmith.core.errors import InputRefused

if TYPE_CHECKING:
    import yaml

SMALL = 16 << 20
"""Bytes of a configuration; the largest seen have 1 MiB."""
INDEX = 64 << 20
"""Bytes of an index of weights; 100,000 tensors take 10 MiB."""
PART = 64 << 20
"""Bytes of a part of an attachment; a large engine's signed bill of materials has 20 MiB."""
RECORD = 512 << 20
"""Bytes of a build's record, including every answer: of 100,000 questions, 200 MB and more."""
TOKENIZER = 256 << 20
"""Bytes of a tokenizer.json; those of today's largest vocabularies have 35 MB."""
LONGEST_YAML = 256 << 10
"""Bytes; PyYAML reads 100,000 per second."""
DEEPEST = 100
"""Levels; a tokenizer has ten. Python's own writers fail at a few hundred."""
MOST_VALUES = 6_000_000
"""A few hundred megabytes of objects; the largest tokenizers have two million values."""
_MOST_YAML = 50_000
_PIECE = 1 << 20
_STRING = re.compile(r'"(?:[^"\\]+|\\.?)*+"?', re.DOTALL)
"""A string of JSON; one without an end goes to the text's end, so no character is read twice."""
_HALF = re.compile("[\ud800-\udfff]")
_HALF_CHARACTER = "it contains half a character, a surrogate without its pair"
_AGAIN = "the file is damaged or incomplete; download or export it again and compare its sha256"


def parse(
    text: bytes | str, *, largest: int = SMALL, unique: bool = False, pairs: bool = True
) -> Any:
    """Return the value of a JSON text in UTF-8; `unique` refuses duplicate keys.

    Without `pairs`, lone surrogates are accepted, for text that is only compared and never written.
    NaN and Infinity are accepted, since transformers writes them into configurations. Raises only
    ValueError, for broken text or text beyond the limits above.
    """
    if len(text) > largest:
        raise ValueError(f"it has {len(text)} bytes; at most {largest} are read")
    text = text.decode() if isinstance(text, bytes) else text
    if _has_more_values(text, MOST_VALUES):
        raise ValueError(f"it has more than {MOST_VALUES} values")
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        if not level:
            break
        level = [
            child
            for parent in level
            for child in (parent.values() if type(parent) is dict else parent)
            if type(child) is dict or type(child) is list
        ]
    else:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels")
    if pairs and ("\\ud" in text or "\\uD" in text):
        try:  # refuses lone surrogates, as Rust's parser does
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(_HALF_CHARACTER) from None
    return value


def _has_more_values(text: str, most: int) -> bool:
    """Say whether a JSON text may have more values: commas in its strings make none."""
    if sum(map(text.count, ",[{")) <= most:
        return False
    # A value is one string at most, and its key another. To cut out more would fill the memory.
    if text.count('"') - text.count('\\"') > 4 * most + 2:
        return True
    return sum(map(_STRING.sub("", text).count, ",[{")) > most


def check_pattern(pattern: str) -> None:
    """Raise ValueError for a text that is no regular expression, or one that Python cannot read."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError) as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_file(path: Path, *, largest: int = SMALL, unique: bool = False) -> Any:
    """Return the value of a JSON file; raises OSError, and ValueError as `parse` does."""
    return parse(content(path, largest), largest=largest, unique=unique)


def read_json(path: Path, *, largest: int = SMALL, unique: bool = True) -> dict[str, Any]:
    """Return the JSON object in an untrusted file; raises InputRefused if there is none."""
    return json_object(read_bytes(path, largest), str(path), largest=largest, unique=unique)


def json_object(
    data: bytes | str, what: str, *, largest: int = SMALL, unique: bool = False
) -> dict[str, Any]:
    """Return the JSON object in `text`; raises InputRefused, which names `what`, otherwise."""
    try:
        value = parse(data, largest=largest, unique=unique)
    except ValueError as error:
        raise InputRefused(f"{what} holds no valid JSON: {error}", hint=_AGAIN) from error
    if not isinstance(value, dict):
        raise InputRefused(
            f"{what} is not a valid checkpoint file: its JSON is not an object", hint=_AGAIN
        )
    return value


def read_bytes(path: Path, largest: int) -> bytes:
    """Return a regular file's content; raises InputRefused for other kinds and larger files."""
    try:
        return content(path, largest)
    except OSError as error:
        raise InputRefused(
            f"{path} cannot be read: {error.strerror}", hint="check that the folder is complete"
        ) from error
    except ValueError as error:
        raise InputRefused(
            f"{path}: {error}", hint="check where it comes from: it may be a different file"
        ) from None


def content(path: Path, largest: int) -> bytes:
    """Return a regular file's bytes; ValueError for other kinds and larger files, and OSError."""
    # An ordinary open of a pipe would wait forever.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError("it is not a regular file")
        return _at_most(largest, file)


def given_content(path: Path, largest: int = SMALL) -> bytes:
    """Return the bytes of a file that a user names, which may be a pipe.

    Raises ValueError for more bytes than `largest`, as a device never ends, and OSError.
    """
    with path.open("rb") as file:
        return _at_most(largest, file)


def _at_most(largest: int, file: BinaryIO) -> bytes:
    # In pieces: one large read reserves all of its memory, however short the file is.
    pieces, left = list[bytes](), largest + 1
    while left and (piece := file.read(min(left, _PIECE))):
        pieces.append(piece)
        left -= len(piece)
    if not left:
        raise ValueError(f"it has more than {largest} bytes")
    return b"".join(pieces)


def small_file(path: Path, largest: int) -> bytes:
    """Return a regular file's bytes; nothing of other kinds, of larger files and for an error.

    Nothing else is opened: a pipe can be read only once.
    """
    try:
        is_small = path.is_file() and path.stat().st_size <= largest
        return content(path, largest) if is_small else b""
    except (OSError, ValueError):
        return b""


def parse_yaml(text: str, loader: type[yaml.SafeLoader] | None = None) -> Any:
    """Return the value of a YAML text; raises only ValueError, for broken or oversized YAML.

    If the position of the error is known, the `__cause__` is a yaml.MarkedYAMLError.
    """
    import yaml

    if len(text) > LONGEST_YAML:
        raise ValueError(f"it has more than {LONGEST_YAML >> 10} KiB")
    try:
        reader = (loader or yaml.SafeLoader)(text)
        try:
            node = reader.get_single_node()
            _unfolded(node, {})
            return None if node is None else reader.construct_document(node)
        finally:
            reader.dispose()
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    # For month 99 or a number without digits, PyYAML raises ValueError, IndexError and others.
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _unfolded(node: yaml.Node | None, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return a node's number of values and depth, with its aliases expanded.

    An alias is the same node object, so each node is visited once. Raises ValueError for too many.
    """
    import yaml

    if node is None:
        return 1, 0
    if isinstance(node, yaml.ScalarNode):
        if not node.value.isascii() and _HALF.search(node.value):
            raise ValueError(_HALF_CHARACTER)
        return 1, 0
    if id(node) not in known:
        known[id(node)] = _MOST_YAML + 1, 0  # an alias inside its own node never ends
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        found = [_unfolded(part, known) for part in parts]
        depth = max((depth for _, depth in found), default=0)
        known[id(node)] = 1 + sum(values for values, _ in found), 1 + depth
    values, depth = known[id(node)]
    if values > _MOST_YAML or depth > DEEPEST:
        raise ValueError(f"it expands to more than {_MOST_YAML} values or {DEEPEST} levels")
    return values, depth


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {twice[:80]!r}")
    return table
