"""Imports what a job needs later, while programs that it started run."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from contextlib import suppress


def import_ahead(names: Sequence[str]) -> None:
    """Begin to import modules; whoever imports one meanwhile waits for it, and gets its errors."""
    if names:
        threading.Thread(target=_import, args=(names,), daemon=True, name="imports").start()


def _import(names: Sequence[str]) -> None:
    with suppress(Exception):  # raised again where the module is needed
        for name in names:
            importlib.import_module(name)
