"""The options of engines that read a file or arguments, as recorded from pinned versions.

So a typo, in a name or in a value such as `tool-call-parser: hermess`, is refused before ten
minutes of loading. The image cannot be asked: it does not exist yet.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from weightsmith.core.errors import UsageError
from weightsmith.core.values import JsonValue
from weightsmith.serving.option_values import require_harmless

NO_TLS = "health checks and probes speak HTTP: let a proxy or the cluster's ingress end TLS"
"""What to do instead of giving a server certificates."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?([kmgt]i?b?)?", re.IGNORECASE)
"""As engines read them, such as `1e5`, `25.6k` and `4GiB`."""
_SWITCHED = frozenset({"true", "false", "1", "0", "enabled", "disabled"})
"""What llama-server takes in place of on and off."""
_SHOWN = 60


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
            option = self._name(key)
            if option in self.refused:
                raise UsageError(
                    f"serve.extra.{key} cannot be set: {option} is not for an image to choose",
                    hint=self.refused[option],
                )
            if option not in self.kinds:
                raise self._unknown(key, option)
            if option in found:
                raise UsageError(f"serve.extra sets {option} twice", hint=f"remove {key}")
            found[option] = _checked_value(key, value, self.kinds[option])
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

    def _name(self, key: str) -> str:
        name = key.strip().lstrip("-").lower()
        return name.replace("-", "_") if self.underscores else name.replace("_", "-")

    def _unknown(self, key: str, option: str) -> UsageError:
        near = difflib.get_close_matches(option, self.kinds, n=3, cutoff=0.6)
        if option.startswith("no-") and option[3:] in self.kinds:
            return UsageError(
                f"serve.extra.{key}: name the option and set it to false",
                hint=f"--set serve.extra.{option[3:]}=false",
            )
        guess = f"did you mean {', '.join(near)}? " if near else ""
        return UsageError(
            f"serve.extra.{key}: {self.engine} {self.version} has no such option",
            hint=f"{guess}toolchain/weightsmith/serving/{self.engine}_options.json lists them all",
        )


def _checked_value(key: str, value: JsonValue, kind: str) -> JsonValue:
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
    return value


def require_fitting(option: str, value: JsonValue, words: Sequence[str], *, number: bool) -> None:
    """Raise UsageError for a value that the engine's own parser refuses, if that is known."""
    if number and (isinstance(value, bool) or not _NUMBER.fullmatch(str(value))):
        raise UsageError(
            f"serve.extra.{option} is {shortened(value)}", hint="it takes a number: give one"
        )
    spelled = {_spelled(word) for word in words}
    if {"on", "off"} <= spelled and str(value).lower() in _SWITCHED:
        return
    if words and _spelled(value) not in spelled:
        near = difflib.get_close_matches(_spelled(value), words, n=3, cutoff=0.6)
        guess = f"did you mean {', '.join(near)}? " if near else ""
        raise UsageError(
            f"serve.extra.{option} is {shortened(value)}, which the engine does not know",
            hint=f"{guess}it takes one of: {', '.join(words)}",
        )


def _spelled(word: JsonValue) -> str:
    return str(word).lower().replace("-", "_")


def shortened(value: JsonValue) -> str:
    """Return a value for a message."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def load_options(
    path: Path, refused: Mapping[str, str], *, without: Collection[str] = (), **facts: bool
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
        underscores=facts.get("underscores", False),
    )
