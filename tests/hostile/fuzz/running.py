"""Runs one input of one subject."""

from __future__ import annotations

import warnings
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from weightsmith.core.errors import WeightsmithError

from tests.hostile.fuzz.subjects import SUBJECTS


class Finding(AssertionError):
    """A reader ended otherwise than with a result or a refusal; `data` is what it read."""

    def __init__(self, message: str, data: bytes) -> None:
        super().__init__(message)
        self.data = data


def once(name: str, seed: int) -> None:
    """Read the input of a seed; raises Finding, whose cause is what went wrong."""
    make, read = SUBJECTS[name]
    data = make(Random(seed))
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            read(data, Path(folder))
        except WeightsmithError:
            return
        except Exception as error:
            raise Finding(
                f"{name} by seed {seed}: {type(error).__name__}: {error}", data
            ) from error
