"""Prints lines of output, whose reader may be gone."""

from __future__ import annotations

import os
from typing import TextIO

from weightsmith.core.escape import escaped, printed


def put_line(text: str, stream: TextIO) -> str:
    """Print a line and flush it; once that fails, discard all further output.

    Return why it was not written, as on a full disk; empty if the reader has closed the pipe.
    """
    try:
        print(printed(text), file=stream, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        # The reader, such as `head`, has closed the pipe; the work goes on.
        return "" if isinstance(error, BrokenPipeError) else str(error.strerror)
    return ""


def pinned(reference: str, digest: str) -> str:
    """Return a reference with its digest, without repeating it."""
    return escaped(reference if "@" in reference else f"{reference}@{digest}")


def clock(seconds: float) -> str:
    """Return `minutes:seconds`, or `hours:minutes:seconds` from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
