"""Converts callers' arguments: paths, texts and recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from weightsmith.core.errors import UsageError

AnyPath: TypeAlias = str | Path
Texts: TypeAlias = str | Sequence[str]


def path_of(given: AnyPath) -> Path:
    """Return a path with `~` expanded to the home folder.

    Raises UsageError for an empty text, which would be the current folder, and for one with NUL.
    """
    if not str(given) or "\0" in str(given):
        raise UsageError(
            f"{str(given)!r} is no path", hint="give a file or a folder; . is the current folder"
        )
    return Path(given).expanduser()


def source_of(given: AnyPath) -> str:
    """Return a folder's path, or a source such as `hf://owner/name` as it is."""
    return given if isinstance(given, str) and "://" in given else str(path_of(given))


def paths_of(given: AnyPath | Sequence[AnyPath]) -> tuple[Path, ...]:
    """Return paths as a tuple; a single path may be given without a list."""
    return (path_of(given),) if isinstance(given, str | Path) else tuple(map(path_of, given))


def texts_of(given: Texts) -> tuple[str, ...]:
    """Return texts as a tuple; a single text may be given without a list."""
    return (given,) if isinstance(given, str) else tuple(given)


def weights_of(given: Sequence[float] | None) -> tuple[float, ...] | None:
    """Return weights as a tuple, of whatever type of numbers they are."""
    return None if given is None else tuple(map(float, given))
