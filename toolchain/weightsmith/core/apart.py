"""Limits time off the main thread: the work is done on the main thread of another process.

Python's `re` matches without letting other threads run, and looks for signals on the main thread
alone: a pattern without an end would hold the whole process of somebody who calls our functions
from a thread. `python -m weightsmith.core.apart` is the other process.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from weightsmith.core import time_limits
from weightsmith.core.errors import WeightsmithError, from_code
from weightsmith.core.safe_parse import RECORD, parse
from weightsmith.core.values import JsonValue

if TYPE_CHECKING:
    from weightsmith.core.ports import RunCommand

_Given = TypeVar("_Given", bound="JsonValue")
_Found = TypeVar("_Found", bound="JsonValue")
_SECONDS = 24 * 3600.0
"""Real time; what is done there limits its own CPU time."""
_run: RunCommand | None = None


def start_processes_by(run: RunCommand) -> None:
    """Let `on_a_main_thread` start its processes so."""
    global _run
    _run = run


def on_a_main_thread(function: Callable[[_Given], _Found], given: _Given) -> _Found:
    """Return what a function of one of our modules returns, called where `cpu_limit` holds.

    That is here on the main thread, and before anybody said how processes are started; elsewhere
    in another process, where tuples become lists. Raises its WeightsmithErrors; any other error
    there is a CheckFailed.
    """
    if threading.current_thread() is threading.main_thread() or _run is None:
        return function(given)
    asked: JsonValue = {
        "function": [function.__module__, function.__qualname__],
        "given": given,
        "seconds": time_limits.FOREIGN_SECONDS,
    }
    program = (sys.executable, "-P", "-m", __name__)
    told = parse(_run(program, {}, json.dumps(asked).encode(), _SECONDS), largest=RECORD)
    if "error" in told:
        raise from_code(*told["error"])
    found: _Found = told["value"]
    return found


def main() -> None:
    """Call the function that standard input names; print its result, or its error."""
    asked = parse(sys.stdin.buffer.read(), largest=RECORD)
    module, name = asked["function"]
    time_limits.FOREIGN_SECONDS = asked["seconds"]
    try:
        told = {"value": getattr(importlib.import_module(module), name)(asked["given"])}
    except WeightsmithError as error:
        told = {"error": [error.exit_code, error.message, error.hint]}
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
