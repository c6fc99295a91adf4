"""Arguments of several commands: callers' paths and texts, sections of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeAlias, TypeVar, cast

from weightsmith.core.errors import UsageError
from weightsmith.oci.layout import is_layout, locate
from weightsmith.recipe.file import RecipeFile, check_section, validated
from weightsmith.recipe.sources import is_remote

AnyPath: TypeAlias = str | Path
Texts: TypeAlias = str | Sequence[str]
_Section = TypeVar("_Section")
_Keys = ParamSpec("_Keys")


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
    return given if isinstance(given, str) and is_remote(given) else str(path_of(given))


def sources_in(given: AnyPath | Sequence[AnyPath]) -> tuple[str, ...]:
    """Return sources as a tuple; a single one may be given without a list."""
    return (source_of(given),) if isinstance(given, str | Path) else tuple(map(source_of, given))


def paths_of(given: AnyPath | Sequence[AnyPath]) -> tuple[Path, ...]:
    """Return paths as a tuple; a single path may be given without a list."""
    return (path_of(given),) if isinstance(given, str | Path) else tuple(map(path_of, given))


def texts_of(given: Texts) -> tuple[str, ...]:
    """Return texts as a tuple; a single text may be given without a list."""
    return (given,) if isinstance(given, str) else tuple(given)


def options_of(
    section: Callable[_Keys, _Section], where: str, /, *_: _Keys.args, **given: _Keys.kwargs
) -> _Section:
    """Return a recipe's section with some keys, checked as in a recipe; None is the default.

    Raises UsageError.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    return check_section(cast("type[_Section]", section), chosen, where)


def request_of(
    command: Callable[_Keys, _Section], /, *_: _Keys.args, **given: _Keys.kwargs
) -> _Section:
    """Return what a command is asked, checked as its flags are; raises UsageError."""
    request = cast("type[_Section]", command)
    return validated(request, given, request.__name__.removesuffix("Command").lower())


def sources_of(file: RecipeFile) -> list[Path]:
    """Return a recipe's local source folders, and the layout of its base image if it is local."""
    recipe = file.recipe
    names = [one.source for one in recipe.sources if not is_remote(one.source)]
    found = [file.folder / Path(name).expanduser() for name in names]
    base = recipe.image.base
    return [*found, locate(base)[0]] if base and is_layout(base) else found
