"""What a thin image says of the model that it merges where it starts.

`build` writes it, and the program in the image reads it (`worker/start.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from weightsmith.core.merge_options import Merge

SERVED = "/tmp/model"  # noqa: S108 - of the container, which may write there alone
"""Where the server finds the merged model: a link to its folder in one of `PLACES`."""
PLACES = ("/model", "/dev/shm/weightsmith")  # noqa: S108 - the second is memory
"""Where models are merged: the first that the container may write to, as to a volume at `/model`.

Each model has a folder there with the digest of its manifest as its name.
"""
ADAPTERS, OWN_FILES = "/adapters", "/etc/weightsmith/model"
"""Folders of the image: the adapters by number, and files that are not the base's."""
FOLDER = "models"
"""Of an image of the base that is mounted."""
MARKER = ".weightsmith.json"
"""In a merged model's folder, beside its files: when each was written."""
SPARE = 16 << 20
"""Bytes of folders and rounding that a file system takes beside the files."""
PROGRAM = "/opt/weightsmith"
MANIFEST = "/etc/weightsmith/thin.json"
LEAST_PYTHON = (3, 11)
"""Of the engine's image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinAdapter:
    """An adapter of the image."""

    folder: str
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeFile:
    """A file of weights that is made at the start, as the build saw it."""

    name: str
    size: int
    sha256: str
    tensors: tuple[str, ...] = ()
    """In the file's order; () for a file of rounded weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiedFile:
    """A small file of the model."""

    name: str
    size: int
    sha256: str
    source: str
    """Absolute path in the image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinModel:
    """How a model is made of what lies in its image, and the digest of every file.

    Raises ValueError for the name of a file outside the model's folder, or of two files.
    """

    base: str
    """Folder of the base's own files."""
    mounted: str = ""
    """The image whose folder `FOLDER` is mounted there; "" for files of this image."""
    adapters: tuple[ThinAdapter, ...]
    merge: Merge
    format: str = ""
    """The format that merged weights are rounded to; "" for 16 bits."""
    keep: tuple[str, ...] = ()
    """Matrices that are not rounded."""
    made: tuple[MadeFile, ...]
    copied: tuple[CopiedFile, ...]
    memory_bytes: int
    """What merging takes at most, besides the files that it makes."""

    def __post_init__(self) -> None:
        """Check the names."""
        names = [MARKER, *(file.name for file in self.files)]
        if twice := next((name for name in names if names.count(name) > 1), ""):
            raise ValueError(f"{twice!r} is the name of two files")
        for file in self.files:
            if not all(part.strip(".\0") for part in file.name.split("/")) or "\0" in file.name:
                raise ValueError(f"{file.name!r} is no file of a model")

    @property
    def size(self) -> int:
        """Bytes of all files of the merged model."""
        return sum(file.size for file in self.files)

    @property
    def files(self) -> tuple[MadeFile | CopiedFile, ...]:
        """All files of the merged model."""
        return (*self.made, *self.copied)
