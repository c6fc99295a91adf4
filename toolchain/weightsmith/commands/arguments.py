"""Arguments that several commands share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from weightsmith.errors import UsageError
from weightsmith.oci.layout import is_layout, locate
from weightsmith.planning.options import serve_options
from weightsmith.recipe import Serve
from weightsmith.recipe_file import RecipeFile, Section, check_section, with_settings
from weightsmith.serving.engine import ServeOptions


def required(**values: object) -> None:
    """Raise UsageError naming the flags that are not given."""
    missing = [f"--{name.replace('_', '-')}" for name, value in values.items() if not value]
    if missing:
        raise UsageError(
            f"missing: {', '.join(missing)}", hint="`invoke --help COMMAND` lists every flag"
        )


def number(text: str, flag: str) -> float:
    """Return a share from 0 to 1; UsageError naming the flag for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UsageError(f"{flag} {text}: a number from 0 to 1 is expected", hint="such as 0.5")
    return value


def counts(text: str, flag: str) -> tuple[int, ...]:
    """Return `1,4,16` as positive numbers; UsageError naming the flag for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(
            f"{flag} {text}: positive numbers separated by commas are expected",
            hint=f"as in {flag} 1,4,16",
        )
    return tuple(int(part) for part in parts)


def parse_weights(text: str, count: int) -> tuple[float, ...]:
    """Return `0.7,0.3` as numbers, one per adapter; all 1 where none is given."""
    if not text:
        return (1.0,) * count
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--weights {text}: numbers separated by commas are expected",
            hint="as in --weights 0.7,0.3",
        ) from None
    return one_each(weights, count)


def one_each(weights: Sequence[float], count: int) -> tuple[float, ...]:
    """Return weights, one per adapter; UsageError for another number of them."""
    if len(weights) != count:
        raise UsageError(
            f"--weights has {len(weights)} numbers for {count} adapter(s)",
            hint="give one for each --adapter, in their order",
        )
    return tuple(weights)


def serving_options(serve: Serve, settings: Sequence[str]) -> ServeOptions:
    """Return serving options with `--set serve.KEY=VALUE` on top; raises UsageError."""
    data = with_settings({"serve": serve.model_dump(exclude_unset=True)}, settings)
    extra = sorted(set(data) - {"serve"})
    if extra:
        raise UsageError(
            f"--set {extra[0]}: only serve.KEY can be set here",
            hint="other recipe keys are for `build` and `plan`",
        )
    return serve_options(check_section(Serve, data["serve"], "the command line"))


def options_of(section: type[Section], given: Mapping[str, Any], where: str) -> Section:
    """Return a recipe's section from a function's arguments by name; raises UsageError.

    Other arguments are left out; None stands for the default.
    """
    names = section.model_fields.keys() & given.keys()
    chosen = {name: given[name] for name in names if given[name] is not None}
    return check_section(section, chosen, where)


def keep_apart(
    inputs: Iterable[str | Path],
    outputs: Mapping[str, str | Path | None],
    own: Mapping[str, Path] | None = None,
) -> None:
    """Make sure that nothing will be made in a folder that is read; UsageError where it would.

    What is no folder (a file, a source elsewhere) holds nothing that we make. `outputs` are by the
    flag that names them; those that are not given are empty. `own` are our own folders by variable,
    which may be hidden in a folder that is read: hidden names are no part of any source, and
    some CI systems cache nothing outside the project.
    """
    folders = [
        place.resolve()
        for text in inputs
        if text and "://" not in str(text) and (place := _folder_of(text)).is_dir()
    ]
    for flag, out in outputs.items():
        for folder, _ in _parts_inside(out, folders) if out else ():
            raise _inside(flag, out or "", folder, f"give {flag} a place outside it")
    for variable, out in (own or {}).items():
        for folder, parts in _parts_inside(out, folders):
            if not any(part.startswith(".") for part in parts):
                hint = f"set {variable} to a place outside it, or in a hidden folder of it"
                raise _inside(variable, out, folder, hint)


def _parts_inside(
    out: str | Path, folders: Iterable[Path]
) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Yield each folder that a place lies in, and the names from there to it."""
    path = Path(out).absolute()
    for folder in folders:
        # By where it leads, and by where its unfinished neighbour would be.
        for place in (path.resolve(), path.parent.resolve() / path.name):
            if place.is_relative_to(folder):
                yield folder, place.relative_to(folder).parts


def _inside(flag: str, out: str | Path, folder: Path, hint: str) -> UsageError:
    return UsageError(
        f"{flag} {out} lies in {folder}, which is read and must stay as it is", hint=hint
    )


def _folder_of(source: str | Path) -> Path:
    return locate(str(source))[0] if is_layout(str(source)) else Path(source)


def sources_of(file: RecipeFile) -> list[Path]:
    """Return where a recipe's sources are that are folders here, and its base's layout."""
    recipe = file.recipe
    names = [recipe.base.source, *(adapter.source for adapter in recipe.adapters)]
    found = [file.folder / Path(name).expanduser() for name in names if "://" not in name]
    base = recipe.image.base
    return [*found, locate(base)[0]] if base and is_layout(base) else found
