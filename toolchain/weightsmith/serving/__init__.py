"""Serving engines: what they load, how they are planned, started and asked.

It may import `forward`, `models`, `oci`, `recipe` and `core`. Begin with engine.py: an engine is
one frozen value in a file of this folder; plan.py is what is planned for it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from weightsmith.serving.engine import Engine


@cache
def engines() -> Mapping[str, Engine]:
    """Return every engine of this folder by name, found by listing it.

    An engine is a module that defines `ENGINE`; the others here are what engines share.
    """
    found: dict[str, Engine] = {}
    for module in pkgutil.iter_modules(__path__):
        engine = getattr(importlib.import_module(f"{__name__}.{module.name}"), "ENGINE", None)
        if isinstance(engine, Engine):
            found[engine.name] = engine
    return MappingProxyType(dict(sorted(found.items())))
