"""The kinds of adapter weights that can be merged: one file each, found by listing this folder."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from weightsmith.merging.claim import Family


@cache
def families() -> tuple[Family, ...]:
    """Return the families sorted by name: the `FAMILY` of each module of this folder."""
    modules = (
        importlib.import_module(f"{__name__}.{module.name}")
        for module in pkgutil.iter_modules(__path__)
    )
    found = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return tuple(sorted(found, key=lambda family: family.name))
