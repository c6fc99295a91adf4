"""Lines of output, which may have no reader any longer."""

from __future__ import annotations

import os
from typing import TextIO


def put_line(text: str, stream: TextIO) -> None:
    """Print a line at once; into nothing from the moment in which nobody reads it any more."""
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:  # the reader, such as `head`, had enough; the work goes on
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
