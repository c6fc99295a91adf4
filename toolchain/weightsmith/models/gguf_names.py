"""Which GGUF files of a folder are the model, in one file or parts, and its projector for pictures.

Parts are named `NAME-00001-of-00003.gguf` and so on, as in llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from weightsmith.core.errors import InputRefused
from weightsmith.models.folder import check_links

_PREFIX = "mmproj"
"""By this, llama.cpp finds projectors, too (common/download.cpp)."""
_SUFFIX = ".gguf"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def projector_name(model: str) -> str:
    """Return the name of the projector beside a model's file, which may be a part."""
    path = PurePosixPath(model)
    return str(path.with_name(f"{_PREFIX}-{model_name(path.name)}{_SUFFIX}"))


def projector_of(names: Iterable[str]) -> str:
    """Return the projector among a model's files, by relative path; empty if there is none.

    Without one that is named after the model's file, it is the only one with the prefix.
    """
    known = _gguf(names)
    if named := next((name for name in map(projector_name, known) if name in known), ""):
        return named
    prefixed = [name for name in known if PurePosixPath(name).name.startswith(_PREFIX)]
    return prefixed[0] if len(prefixed) == 1 < len(known) else ""


def gguf_models(names: Iterable[str]) -> list[str]:
    """Return the GGUF files among these, sorted, but for a projector."""
    known = _gguf(names)
    projector = projector_of(known)
    return [name for name in known if name != projector]


def files_with(path: Path) -> tuple[str, ...]:
    """Return the names of a GGUF model's parts, and of the projector beside them if there is one.

    `path` is the file of a whole model, or of any part. Raises InputRefused if a part is missing,
    or if one of the files beside `path` is a link out of its folder.
    """
    names, projector = parts_of(path.name), projector_name(path.name)
    if lost := [part for part in names if not (path.parent / part).is_file()]:
        raise InputRefused(
            f"{path} is one of {len(names)} parts, and {lost[0]} is not beside it",
            hint="give a model whose parts are all in its folder",
        )
    names = (*names, projector) if (path.parent / projector).is_file() else names
    check_links(path.parent, (name for name in names if name != path.name))
    return names


def _gguf(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(_SUFFIX))


def parts_of(name: str) -> tuple[str, ...]:
    """Return all files of the model that a GGUF file belongs to, in order: itself if it is whole.

    A server opens the first one, and finds the others beside it.
    """
    found = _PART.fullmatch(name)
    if not found or not 0 < int(found[2]) <= int(found[3]):
        return (name,)
    return tuple(f"{found[1]}-{n:05}-of-{found[3]}.gguf" for n in range(1, int(found[3]) + 1))


def model_name(name: str) -> str:
    """Return a GGUF file's name without its ending and its part's number."""
    found = _PART.fullmatch(name)
    return found[1] if found else name.removesuffix(".gguf")
