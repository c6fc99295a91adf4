"""The files of a GGUF model in parts: `NAME-00001-of-00003.gguf` and so on, as in llama.cpp."""

from __future__ import annotations

import re
from pathlib import Path

from weightsmith.core.errors import InputRefused

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def parts_of(name: str) -> tuple[str, ...]:
    """Return all files of the model that a GGUF file belongs to, in order: itself if it is whole.

    A server opens the first one, and finds the others beside it.
    """
    found = _PART.fullmatch(name)
    if not found or not 0 < int(found[2]) <= int(found[3]):
        return (name,)
    return tuple(f"{found[1]}-{n:05}-of-{found[3]}.gguf" for n in range(1, int(found[3]) + 1))


def files_of(path: Path) -> tuple[str, ...]:
    """Return the names of all files of a GGUF model in its folder; InputRefused if one is missing.

    `path` is the file of a whole model, or of any part.
    """
    names = parts_of(path.name)
    if lost := [part for part in names if not (path.parent / part).is_file()]:
        raise InputRefused(
            f"{path} is one of {len(names)} parts, and {lost[0]} is not beside it",
            hint="give a model whose parts are all in its folder",
        )
    return names


def model_name(name: str) -> str:
    """Return a GGUF file's name without its ending and its part's number."""
    found = _PART.fullmatch(name)
    return found[1] if found else name.removesuffix(".gguf")
