"""Targets: every engine with every format that it loads."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from weightsmith.core.errors import UsageError
from weightsmith.core.values import SAFETENSORS, Format
from weightsmith.serving import engines
from weightsmith.serving.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One engine that loads one format, such as `llamacpp-q4_k_m`."""

    name: str
    engine: Engine
    format: Format


_SHORT = {"mix-compressed": "mix"}
"""Format -> its name in a target's, where the engine's says the rest."""


def targets(formats: Iterable[Format]) -> Mapping[str, Target]:
    """Return the targets there are, by name, given the formats that quantizers make.

    The merged checkpoint itself needs no quantizer: its targets carry the engine's name alone. An
    engine without compressed-tensors' layout of integers has the format that stands in for it.
    """
    found = {
        name: Target(name=name, engine=engine, format=format_)
        for engine in engines().values()
        for format_ in (SAFETENSORS, *formats)
        if _loads(engine, format_)
        for name in [_name(engine, format_)]
    }
    return MappingProxyType(dict(sorted(found.items())))


def _loads(engine: Engine, format_: Format) -> bool:
    own = format_.without_adapters
    return {format_.kind, own.kind} <= engine.accepts and own.layout in {"", *engine.layouts}


def _name(engine: Engine, format_: Format) -> str:
    if format_ == SAFETENSORS:
        return engine.name
    stands_in = format_.instead_of and not engine.layouts
    name = format_.instead_of if stands_in else format_.name
    own = format_.without_adapters.name
    return f"{engine.name}-{name.replace(own, _SHORT.get(own, own), 1)}"


def find(name: str, known: Mapping[str, Target]) -> Target:
    """Return the target of that name; UsageError with near misses and the list otherwise."""
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    guess = f"did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(
        f"unknown target {name!r}", hint=f"{guess}the targets are: {', '.join(known) or 'none'}"
    )
