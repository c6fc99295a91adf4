"""What an earlier build left in a target's folder of results, and writing there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure, UsageError
from weightsmith.core.files import write_folder
from weightsmith.evaluating.build_record import read_build


def is_written(files: Mapping[str, str], folder: Path) -> bool:
    """Return whether a folder already has these texts from an earlier build."""
    try:
        return all((folder / name).read_text("utf-8") == text for name, text in files.items())
    except (OSError, ValueError):
        return False


def layers_in(folder: Path) -> tuple[str, ...]:
    """Return the layers of the image recorded in a folder, bottom first; () if there is none."""
    try:
        image = read_build(folder).image
    except (OSError, ValueError):
        return ()
    return tuple(layer.digest for layer in image.layers) if image else ()


def write_files(files: Mapping[str, str], folder: Path) -> None:
    """Write texts to a folder, each atomically.

    Raises UsageError if it is a file, EnvironmentFailure if it cannot be written.
    """
    try:
        write_folder(folder, {name: text.encode() for name, text in files.items()})
    except FileExistsError as error:
        raise UsageError(
            f"cannot write results to {folder}: {error.filename or folder} is not a folder",
            hint="give another path, or move that file away",
        ) from None
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot write results to {folder}: {error.strerror}",
            hint="check the folder's permissions and the free space on its disk",
        ) from None
