"""The options of engines that read a file or arguments, as recorded from pinned versions.

So a typo, in a name or in a value such as `tool-call-parser: hermess`, is refused before ten
minutes of loading. The image cannot be asked: it does not exist yet. Also what no value of
`serve.extra` may hold at any depth, and what an image may state of it.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from weightsmith.core.errors import UsageError
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import JsonValue, without_passwords

NO_TLS = "health checks and probes speak HTTP: let a proxy or the cluster's ingress end TLS"
"""What to do instead of giving a server certificates."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?([kmgt]i?b?)?", re.IGNORECASE)
"""As engines read them, such as `1e5`, `25.6k` and `4GiB`."""
_SWITCHED = frozenset({"true", "false", "1", "0", "enabled", "disabled"})
"""What llama-server takes in place of on and off."""
_SHOWN = 60
_CODE = "trust-remote-code"
_SECRET = re.compile(
    r"(^|-)(password|passwd|passphrase|secret|credentials?|authorization)(-|$)"
    r"|(^|-)(api|access|auth|admin|account|private|secret|hf|hub)-?(key|token)$|^token$"
)
"""Names of values that are secrets themselves; `max-tokens` and `eos-token` are none."""
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_ARGUMENT = re.compile(r"-+[A-Za-z]")

_STATED_FILE = Path(__file__).with_name("stated_options.json")
STATED: Mapping[str, frozenset[str]] = MappingProxyType(
    {name: frozenset(words) for name, words in json.loads(_STATED_FILE.read_text("utf-8")).items()}
)
"""Options that name no file, address, module or program -> the words or keys they take; empty: any.

An option that an engine gets later is not among them, so an image cannot state it. A text in their
values is one word, such as `hermes`.
"""
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_,;=+-]{0,99}")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionList:
    """The options that one version of an engine knows, and those that are not for an image."""

    engine: str
    version: str
    kinds: Mapping[str, str]
    """Name -> `value`, `switch` (on and off) or `flag` (on only)."""
    refused: Mapping[str, str]
    """Name -> what to do instead."""
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Name -> the words that the engine's own parser takes; other options take any."""
    numbers: frozenset[str] = frozenset()
    """Names of the options that take a number."""
    needs: Mapping[str, str] = field(default_factory=dict)
    """Name -> what the engine does not start without, if this is on."""
    plugins: Mapping[str, str] = field(default_factory=dict)
    """Name -> the option whose file adds words to it."""
    underscores: bool = False
    """The engine's own names have underscores, not dashes."""

    def checked(self, extra: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
        """Return `serve.extra` under the engine's names; keys may have dashes or underscores.

        Raises UsageError for an unknown option (with near misses), one given twice, one that is not
        for an image, null, `false` for a flag that has no off (engines drop it silently), and for
        what no image may hold at any depth of a value. For words that the engine does not know and
        numbers that are none, too, and for an option without the one that it needs.
        """
        require_harmless(extra)
        found: dict[str, JsonValue] = {}
        for key, value in extra.items():
            name = key.strip().lstrip("-").lower()
            option = name.replace("-", "_") if self.underscores else name.replace("_", "-")
            if option in self.refused:
                raise UsageError(
                    f"serve.extra.{key} cannot be set: {option} is not for an image to choose",
                    hint=self.refused[option],
                )
            if option not in self.kinds:
                raise self._unknown(key, option)
            if option in found:
                raise UsageError(f"serve.extra sets {option} twice", hint=f"remove {key}")
            _check_value(key, value, self.kinds[option])
            found[option] = value
        for option, value in found.items():
            added = self.plugins.get(option) in found
            words = () if added else self.words.get(option, ())
            require_fitting(option, value, words, number=option in self.numbers)
            if value is True and (needed := self.needs.get(option)) and not found.get(needed):
                raise UsageError(
                    f"serve.extra.{option} needs {needed}: {self.engine} does not start without",
                    hint=f"set serve.extra.{needed} too"
                    + (f": {', '.join(self.words[needed])}" if needed in self.words else ""),
                )
        return found

    def _unknown(self, key: str, option: str) -> UsageError:
        if option.startswith("no-") and option[3:] in self.kinds:
            return UsageError(
                f"serve.extra.{key}: name the option and set it to false",
                hint=f"--set serve.extra.{option[3:]}=false",
            )
        near = difflib.get_close_matches(option, self.kinds, n=3, cutoff=0.6)
        guess = f"did you mean {', '.join(near)}? " if near else ""
        return UsageError(
            f"serve.extra.{key}: {self.engine} {self.version} has no such option",
            hint=f"{guess}toolchain/weightsmith/serving/{self.engine}_options.json lists them all",
        )


def _check_value(key: str, value: JsonValue, kind: str) -> None:
    if value is None:
        raise UsageError(
            f"serve.extra.{key} is null, which the engine would read as a text",
            hint="leave it out for the engine's default",
        )
    if kind in {"switch", "flag"} and not isinstance(value, bool):
        raise UsageError(f"serve.extra.{key} is {value!r}", hint="give true or false")
    if kind == "flag" and value is False:
        raise UsageError(
            f"serve.extra.{key}=false: there is no way to say that, the engine would drop it",
            hint="leave it out: it is off unless it is set",
        )


def require_fitting(option: str, value: JsonValue, words: Sequence[str], *, number: bool) -> None:
    """Raise UsageError for a value that the engine's own parser refuses, if that is known."""
    if number and (isinstance(value, bool) or not _NUMBER.fullmatch(str(value))):
        raise UsageError(
            f"serve.extra.{option} is {_shortened(value)}", hint="it takes a number: give one"
        )
    spelled = {_spelled(word) for word in words}
    if {"on", "off"} <= spelled and str(value).lower() in _SWITCHED:
        return
    if words and _spelled(value) not in spelled:
        near = difflib.get_close_matches(_spelled(value), words, n=3, cutoff=0.6)
        guess = f"did you mean {', '.join(near)}? " if near else ""
        raise UsageError(
            f"serve.extra.{option} is {_shortened(value)}, which the engine does not know",
            hint=f"{guess}it takes one of: {', '.join(words)}",
        )


def _spelled(word: JsonValue) -> str:
    return str(word).lower().replace("-", "_")


def _shortened(value: JsonValue) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def load_options(
    path: Path,
    refused: Mapping[str, str],
    *,
    without: Collection[str] = (),
    underscores: bool = False,
) -> OptionList:
    """Return the recorded list in a file beside the engine's; `without` drops some of it."""
    data = json.loads(path.read_text("utf-8"))
    return OptionList(
        engine=path.name.removesuffix("_options.json"),
        version=data["version"],
        kinds=MappingProxyType({k: v for k, v in data["options"].items() if k not in without}),
        refused=refused,
        words=MappingProxyType(data.get("words", {})),
        numbers=frozenset(data.get("numbers", ())),
        needs=MappingProxyType(data.get("needs", {})),
        plugins=MappingProxyType(data.get("plugins", {})),
        underscores=underscores,
    )


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
