"""Finds `images/` and `templates/`: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from weightsmith.core.errors import UsageError
from weightsmith.core.trees import below
from weightsmith.core.values import Digest, JsonValue, key_of

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = _PACKAGE / "_resources"
_SHARED = {"assemble.py": "debs.py", "compile.py": "zig.py"}
"""Program in an engine's folder -> the file beside the folders that it imports."""
_ROOT = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent.parent


def templates() -> Path:
    """Return the folder with one template folder per engine."""
    return _ROOT / "templates"


def images() -> Path:
    """Return the folder with `builders/`, `engines/` and `bases.lock`."""
    return _ROOT / "images"


def package() -> Path:
    """Return the folder of the `weightsmith` package itself, for builders to import."""
    return _PACKAGE


def builder_pins(name: str) -> Digest:
    """Return the digest of everything that defines a builder.

    That is its folder, the sources that it compiles and its Containerfile. Raises UsageError for
    an unknown builder.
    """
    return _builder_pins(name, images())


@cache
def _builder_pins(name: str, _images: Path) -> Digest:
    folder = _builder(name)
    rows: list[JsonValue] = [[folder.name, _fingerprint(folder)]]
    rows += [
        [engine, [*_fingerprint(images() / "engines" / engine), *_shared(engine)]]
        for engine in compiled_engines(name)
    ]
    if (recipe := containerfile(name)).parent != folder:
        rows.append([recipe.name, Digest.of(recipe.read_bytes())])
    return key_of(rows)


def containerfile(builder: str) -> Path:
    """Return a builder's Containerfile: its own, or the shared one for packages only.

    Raises UsageError for an unknown builder.
    """
    own = _builder(builder) / "Containerfile"
    return own if own.is_file() else own.parents[1] / own.name


def _builder(name: str) -> Path:
    folder = images() / "builders" / name
    if not folder.is_dir():
        raise UsageError(
            f"no builder `{name}`: {folder} is missing",
            hint="a quantizer's builder is a folder of that name under images/builders/",
        )
    return folder


def engine_pins(name: str) -> Digest:
    """Return the digest of what defines one of our engine layers: its folder, and what it imports.

    A Containerfile in it is another way to make the same files, so it is left out.
    """
    return _engine_pins(name, images())


@cache
def _engine_pins(name: str, _images: Path) -> Digest:
    rows = [row for row in _fingerprint(images() / "engines" / name) if row[0] != "Containerfile"]
    return key_of([*rows, *_shared(name)])


def engine_platforms(name: str) -> tuple[str, ...]:
    """Return the platforms that one of our engines can be made for, on any machine."""
    platforms = engine_source(name).get("platforms")
    return tuple(map(str, platforms)) if isinstance(platforms, list) else ()


def engine_source(name: str) -> Mapping[str, JsonValue]:
    """Return the `source.json` of one of our engines."""
    source: Mapping[str, JsonValue] = json.loads(
        (images() / "engines" / name / "source.json").read_text("utf-8")
    )
    return source


def assembles_itself(engine: str) -> bool:
    """Say whether an engine's folder has a program that makes its complete root file system."""
    return (images() / "engines" / engine / "assemble.py").is_file()


def compiled_engines(builder: str) -> tuple[str, ...]:
    """Return the engines whose tools a builder contains: those that name it in source.json."""
    return _engines_naming(builder, "builders")


def optional_engines(builder: str) -> tuple[str, ...]:
    """Return the engines whose tools make a builder's jobs faster, without changing a byte.

    They are not part of the builder's pins, and its jobs run without them.
    """
    return _engines_naming(builder, "speeds_up")


def _engines_naming(builder: str, key: str) -> tuple[str, ...]:
    return tuple(
        source.parent.name
        for source in sorted((images() / "engines").glob("*/source.json"))
        if builder in json.loads(source.read_text("utf-8")).get(key, ())
    )


def _shared(engine: str) -> list[list[str]]:
    engines = images() / "engines"
    names = [file for program, file in _SHARED.items() if (engines / engine / program).is_file()]
    return [[n, Digest.of((engines / n).read_bytes())] for n in names if (engines / n).is_file()]


def _fingerprint(folder: Path) -> list[list[str]]:
    files = [p for p in below(folder) if p.is_file() and "__pycache__" not in p.parts]
    return [
        [p.relative_to(folder).as_posix(), Digest.of(p.read_bytes())]
        for p in files
        if p.suffix != ".md"
    ]
