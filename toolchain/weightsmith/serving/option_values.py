"""What no value of `serve.extra` may hold at any depth, and what an image may state of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from weightsmith.core.errors import UsageError
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import JsonValue, without_passwords

_CODE = "trust-remote-code"
_SECRET = re.compile(
    r"(^|-)(password|passwd|passphrase|secret|credentials?|authorization)(-|$)"
    r"|(^|-)(api|access|auth|admin|account|private|secret|hf|hub)-?(key|token)$|^token$"
)
"""Names of values that are secrets themselves; `max-tokens` and `eos-token` are none."""
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_ARGUMENT = re.compile(r"-+[A-Za-z]")

STATED: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        option: frozenset(words)
        for option, words in json.loads(
            Path(__file__).with_name("stated_options.json").read_text("utf-8")
        ).items()
    }
)
"""Options that name no file, address, module or program -> the words or keys they take; empty: any.

An option that an engine gets later is not among them, so an image cannot state it. A text in their
values is one word, such as `hermes`.
"""
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_,;=+-]{0,99}")


def plain_name(key: str) -> str:
    """Return an option's or key's name in lower case with dashes, as tables here have it."""
    return _HUMP.sub("-", key).strip().lstrip("-").lower().replace("_", "-")


def require_harmless(extra: Mapping[str, JsonValue]) -> None:
    """Raise UsageError for code of a checkpoint, secrets or further options within values.

    Each engine's own table refuses the options that are these themselves.
    """
    for option, value in extra.items():
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and _ARGUMENT.match(text):
                raise UsageError(
                    f"serve.extra.{option} is {text[:60]!r}, which is read as another option",
                    hint="set each option under its own name",
                )
        if without_passwords(value) != value:
            raise _secret(f"serve.extra.{option}")
        for place, key, inner in _inner(value, f"serve.extra.{option}"):
            name = plain_name(key)
            if name == _CODE and inner not in (False, None):
                raise UsageError(
                    f"{place} cannot be set: an image runs no code of a checkpoint",
                    hint="leave it out, and choose a model whose code the engine has itself",
                )
            if _SECRET.search(name) and isinstance(inner, str) and inner:
                raise _secret(place)


def _secret(place: str) -> UsageError:
    return UsageError(
        f"{place} holds a secret, which everybody can read in an image",
        hint="leave it out, and give it to the server where it runs",
    )


def not_to_be_stated(extra: Mapping[str, JsonValue]) -> list[str]:
    """Return the places in an image's `serve.extra` that only this machine's user may set."""
    found = []
    for key, value in extra.items():
        allowed = STATED.get(plain_name(key))
        if allowed is None:
            found.append(key)
            continue
        if allowed and isinstance(value, Mapping):
            found += [f"{key}.{name}" for name in value if plain_name(name) not in allowed]
        elif allowed and not (isinstance(value, str) and value in allowed):
            found.append(key)
        for place, name, inner in [(key, plain_name(key), value), *_inner(value, key)]:
            texts = [name, inner] if isinstance(inner, str) else [name]
            if not all(map(_WORD.fullmatch, texts)):
                found.append(place)
    return sorted(set(found))


def _inner(value: JsonValue, place: str) -> Iterator[tuple[str, str, JsonValue]]:
    """Yield each value within another, also of JSON in a text: its place, its key, the value."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            value = parse(value)
        except ValueError:  # a template or a pattern
            return
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield f"{place}.{key}", str(key), inner
            yield from _inner(inner, f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield f"{place}.{number}", place.rpartition(".")[2], inner
            yield from _inner(inner, f"{place}.{number}")
