"""Arguments that several commands share."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

from weightsmith.errors import UsageError
from weightsmith.oci.layout import is_layout, locate
from weightsmith.recipe import Serve
from weightsmith.recipe_file import RecipeFile, check_section, validated, with_settings
from weightsmith.serving.engine import ServeOptions
from weightsmith.stages.render import serve_options

_Section = TypeVar("_Section")
_Keys = ParamSpec("_Keys")


def required(**values: object) -> None:
    """Raise UsageError naming the flags that are not given."""
    missing = [
        f"--{name.replace('_', '-')}"
        for name, value in values.items()
        # An empty value, as of a variable that is not set, would be the current folder.
        if not value or (isinstance(value, list | tuple) and not all(value))
    ]
    if missing:
        raise UsageError(f"missing: {', '.join(missing)}", hint="`--help COMMAND` lists every flag")


def serving_options(serve: Serve, settings: Sequence[str]) -> ServeOptions:
    """Return serving options of `--set serve.KEY=VALUE` and, on top, flags; raises UsageError.

    A flag left at its default is not on top.
    """
    data = with_settings({"serve": {}}, settings)
    extra = sorted(set(data) - {"serve"})
    if extra:
        raise UsageError(
            f"--set {extra[0]}: only serve.KEY can be set here",
            hint="other recipe keys are for `build` and `plan`",
        )
    if not isinstance(data["serve"], dict):
        raise UsageError(
            "--set serve=…: serve is a mapping of keys", hint="as in --set serve.max_num_seqs=4"
        )
    named = serve.model_dump(exclude_defaults=True)
    return serve_options(check_section(Serve, {**data["serve"], **named}, "the command line"))


def options_of(
    section: Callable[_Keys, _Section], where: str, /, *_: _Keys.args, **given: _Keys.kwargs
) -> _Section:
    """Return a recipe's section with some keys, checked as in a recipe; None is the default.

    Raises UsageError.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    return check_section(cast("type[_Section]", section), chosen, where)


def request_of(
    request: Callable[_Keys, _Section], where: str, /, *_: _Keys.args, **given: _Keys.kwargs
) -> _Section:
    """Return a command's request of a function's arguments, checked as flags are.

    Raises UsageError.
    """
    return validated(cast("type[_Section]", request), given, where)


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
        if out and _is_circle(Path(out)):
            raise UsageError(
                f"{flag} {out}: symbolic links lead in a circle",
                hint="correct the symbolic links, or give another path",
            )
    folders = [
        place.resolve()
        for text in inputs
        if text and "://" not in str(text) and (place := _folder_of(text)).is_dir()
    ]
    for flag, out in outputs.items():
        for folder, _ in _parts_inside(out, folders) if out else ():
            raise _inside(flag, out or "", folder, f"give {flag} a path outside it")
    for variable, out in (own or {}).items():
        for folder, parts in _parts_inside(out, folders):
            if not any(part.startswith(".") for part in parts):
                hint = f"set {variable} to a path outside it, or in a hidden folder inside it"
                raise _inside(variable, out, folder, hint)


def _is_circle(path: Path) -> bool:
    """Say whether links lead in a circle; since Python 3.13, `resolve` does not."""
    try:
        path.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


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


def _folder_of(source: str | Path) -> Path:
    return locate(str(source))[0] if is_layout(str(source)) else Path(source)


def sources_of(file: RecipeFile) -> list[Path]:
    """Return a recipe's local source folders, and the layout of its base image if it is local."""
    recipe = file.recipe
    names = [recipe.base.source, *(adapter.source for adapter in recipe.adapters)]
    found = [file.folder / Path(name).expanduser() for name in names if "://" not in name]
    base = recipe.image.base
    return [*found, locate(base)[0]] if base and is_layout(base) else found
