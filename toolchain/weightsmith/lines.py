"""Lines of output, which may have no reader any longer."""

from __future__ import annotations

import os
from typing import TextIO

from weightsmith.visible import escaped, printed


def put_line(text: str, stream: TextIO) -> str:
    """Print a line at once; into nothing from the moment in which that cannot be done any more.

    Return why it was not written, as on a full disk; empty also where nobody reads any longer.
    """
    try:
        print(printed(text), file=stream, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        # The reader, such as `head`, had enough; the work goes on.
        return "" if isinstance(error, BrokenPipeError) else str(error.strerror)
    return ""


def pinned(reference: str, digest: str) -> str:
    """Return a reference with its digest, once."""
    return escaped(reference if "@" in reference else f"{reference}@{digest}")
