"""Quantizers: the formats, the commands that make them, and how much each format loses.

It may import `forward`, `models`, `oci`, `recipe` and `core`. Begin with quantizer.py: a quantizer
is one frozen value in a file of this folder; quality/ has the gate.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from weightsmith.core.errors import UsageError
from weightsmith.core.values import Format
from weightsmith.quantizers.quantizer import Quantizer


@cache
def quantizers() -> Mapping[str, Quantizer]:
    """Return every quantizer of this folder by name."""
    found: dict[str, Quantizer] = {}
    for module in pkgutil.iter_modules(__path__):
        value = getattr(importlib.import_module(f"{__name__}.{module.name}"), "QUANTIZER", None)
        if isinstance(value, Quantizer):
            found[value.name] = value
    return MappingProxyType(dict(sorted(found.items())))


@cache
def formats() -> Mapping[str, Format]:
    """Return every quantizer's formats by name."""
    every = (format_ for quantizer in quantizers().values() for format_ in quantizer.formats)
    return MappingProxyType({format_.name: format_ for format_ in every})


def of_format(name: str) -> Quantizer:
    """Return a format's quantizer; raise UsageError with similar names if it is unknown."""
    for quantizer in quantizers().values():
        if any(format_.name == name for format_ in quantizer.formats):
            return quantizer
    near = difflib.get_close_matches(name.lower(), formats(), n=2, cutoff=0.5)
    guess = f"did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(f"unknown format {name!r}", hint=f"{guess}formats: {', '.join(formats())}")


def legacy_of(format_: Format) -> str:
    """Return why one should choose another format; "" for most, and where none makes it here."""
    found = formats().get(format_.without_adapters.name)
    return of_format(found.name).legacy if found else ""
