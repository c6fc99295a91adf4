"""Retries programs that download, if a connection broke; not if the server refused."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from weightsmith.core.ports import Progress
from weightsmith.outside.process import Completed

PAUSES = (5.0, 20.0)
"""Seconds before the second and the third try."""
_BROKE = re.compile(
    r"broke off|Connection broken:|IncompleteRead|Read timed out|read operation timed out"
    r"|Connection reset|RemoteDisconnected|not enough bytes|unexpected EOF|TLS handshake timeout"
    r"|HTTP [Ee]rror 50\d|Service Unavailable|Bad Gateway|Gateway Time-?out"
    # Some take a truncated download for complete until they hash it.
    r"|DO NOT MATCH THE HASHES|broken or not the published file|Hash Sum mismatch|unexpected size"
)
"""How pip, apt, BuildKit and our own scripts report a connection that broke."""


def persistently(run: Callable[[], Completed], progress: Progress) -> Completed:
    """Run a program that downloads, up to three times if a connection broke.

    An unreachable server is not retried here: the programs do that themselves.
    """
    for pause in PAUSES:
        done = run()
        broken = next((line for line in reversed(done.tail) if _BROKE.search(line)), "")
        if done.returncode == 0 or not broken:
            return done
        progress.warn(f"a download failed; trying again in {pause:g} s: {broken.strip()[:200]}")
        time.sleep(pause)
    return run()
