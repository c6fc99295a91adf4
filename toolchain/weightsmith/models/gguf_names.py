"""Which GGUF files of a folder are the model, and which is its projector for pictures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from weightsmith.models.folder import check_links
from weightsmith.models.gguf_parts import files_of, model_name

_PREFIX = "mmproj"
"""By this, llama.cpp finds projectors, too (common/download.cpp)."""
_SUFFIX = ".gguf"


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

    Raises InputRefused if a part is missing, or if one of the files beside `path` is a link out of
    its folder.
    """
    names, projector = files_of(path), projector_name(path.name)
    names = (*names, projector) if (path.parent / projector).is_file() else names
    check_links(path.parent, (name for name in names if name != path.name))
    return names


def _gguf(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(_SUFFIX))
