"""Inputs and outputs of a command, which must not lie in each other."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from weightsmith.core.errors import UsageError
from weightsmith.oci.layout import is_layout, locate
from weightsmith.recipe.sources import is_remote


def keep_apart(
    inputs: Iterable[str | Path],
    outputs: Mapping[str, str | Path | None],
    own: Mapping[str, Path] | None = None,
) -> None:
    """Raise UsageError if an output would be written inside an input folder, or can be nowhere.

    Inputs that are not local folders are ignored. `outputs` maps flags to paths, empty if not
    given. `own` maps environment variables to our own folders. These may be hidden folders inside
    an input: sources never include hidden names, and some CI systems cache only what is in the
    project.
    """
    for flag, out in {**outputs, **(own or {})}.items():
        try:  # since Python 3.13, `resolve` does not say so
            Path(out or ".").stat()
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise UsageError(
                    f"{flag} {out}: symbolic links lead in a circle",
                    hint="correct the symbolic links, or give another path",
                ) from None
    local = [str(text) for text in inputs if text and not is_remote(str(text))]
    places = (locate(text)[0] if is_layout(text) else Path(text) for text in local)
    folders = [place.resolve() for place in places if place.is_dir()]
    for flag, out in outputs.items():
        for folder, _ in _parts_inside(out, folders) if out else ():
            raise _inside(flag, out or "", folder, f"give {flag} a path outside it")
    for variable, out in (own or {}).items():
        for folder, parts in _parts_inside(out, folders):
            if not any(part.startswith(".") for part in parts):
                hint = f"set {variable} to a path outside it, or in a hidden folder inside it"
                raise _inside(variable, out, folder, hint)


def not_nested(first: tuple[str, str], second: tuple[str, str]) -> None:
    """Raise UsageError if of two outputs, each a flag and its path, one is inside the other."""
    for (flag, out), (other_flag, other) in ((first, second), (second, first)):
        if out and other and any(_parts_inside(out, [Path(other).resolve()])):
            raise UsageError(
                f"{flag} {out} is inside {other_flag} {other}", hint="give each its own folder"
            )


def _parts_inside(
    out: str | Path, folders: Iterable[Path]
) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Yield each folder that contains the path, and the path's parts relative to it."""
    path = Path(out).absolute()
    for folder in folders:
        # Check the target of a symbolic link, and the folder where the temporary output is written.
        for place in (path.resolve(), path.parent.resolve() / path.name):
            if place.is_relative_to(folder):
                yield folder, place.relative_to(folder).parts


def _inside(flag: str, out: str | Path, folder: Path, hint: str) -> UsageError:
    return UsageError(
        f"{flag} {out} is inside the input folder {folder}, which must not change", hint=hint
    )
