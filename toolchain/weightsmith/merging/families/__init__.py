"""The kinds of adapter weights we can merge: one file each, found by listing this folder."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from weightsmith.merging.claim import Family


@cache
def families() -> tuple[Family, ...]:
    """Return the families there are, by name: each module of this folder that has a `FAMILY`."""
    modules = (
        importlib.import_module(f"{__name__}.{module.name}")
        for module in pkgutil.iter_modules(__path__)
    )
    found = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return tuple(sorted(found, key=lambda family: family.name))
