"""The options of engines that read a file or arguments, as recorded from pinned versions."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from weightsmith.errors import UsageError
from weightsmith.serving.option_values import require_harmless
from weightsmith.values import Json

NO_TLS = "health checks and probes speak HTTP: let a proxy or the cluster's ingress end TLS"
"""What to do instead of giving a server certificates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionList:
    """The options that one version of an engine knows, and those that are not for an image."""

    engine: str
    version: str
    kinds: Mapping[str, str]
    """Name -> `value`, `switch` (on and off) or `flag` (on only)."""
    refused: Mapping[str, str]
    """Name -> what to do instead."""
    underscores: bool = False
    """The engine's own names have underscores, not dashes."""

    def checked(self, extra: Mapping[str, Json]) -> dict[str, Json]:
        """Return `serve.extra` under the engine's names; keys may have dashes or underscores.

        Raises UsageError for an unknown option (with near misses), one given twice, one that is not
        for an image, null, `false` for a flag that has no off (engines drop it silently), and for
        what no image may hold at any depth of a value.
        """
        require_harmless(extra)
        found: dict[str, Json] = {}
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


def _checked_value(key: str, value: Json, kind: str) -> Json:
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
        underscores=facts.get("underscores", False),
    )
