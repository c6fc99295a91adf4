"""The projector beside a GGUF model: what its server needs to read pictures."""

from __future__ import annotations

from dataclasses import dataclass

from weightsmith.core.values import Tree
from weightsmith.models.gguf_names import projector_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Projector:
    """A file beside the model's."""

    file: str = ""
    """Relative to the model's folder; empty while there is none yet."""
    size: int
    """Bytes."""


def projector_in(tree: Tree) -> Projector | None:
    """Return the projector among a model's files."""
    name = projector_of(file.path for file in tree.files)
    return next((Projector(file=name, size=f.size) for f in tree.files if f.path == name), None)
