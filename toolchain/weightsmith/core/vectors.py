"""Vectors as text: float32 in base64, as they are kept and sent."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def packed(vector: Sequence[float]) -> str:
    """Return a vector as text."""
    import numpy as np

    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode("ascii")


def unpacked(text: str) -> np.ndarray:
    """Return a vector of a text, in float64; raise ValueError for another text."""
    import numpy as np

    try:
        return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").astype("f8")
    except binascii.Error as error:
        raise ValueError(str(error)) from None
