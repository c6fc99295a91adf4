"""Runs programs that download once more where a connection broke, not where the answer was no."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from weightsmith.drivers.process import Completed
from weightsmith.ports import Progress

PAUSES = (5.0, 20.0)
"""Seconds before the second and the third try."""
_BROKE = re.compile(
    r"broke off|Connection broken:|IncompleteRead|Read timed out|read operation timed out"
    r"|Connection reset|RemoteDisconnected|not enough bytes|unexpected EOF|TLS handshake timeout"
    r"|HTTP [Ee]rror 50\d|Service Unavailable|Bad Gateway|Gateway Time-?out"
    # A cut download is taken for a whole one by some, until it is hashed.
    r"|DO NOT MATCH THE HASHES|broken or not the published file|Hash Sum mismatch|unexpected size"
)
"""What pip, apt, BuildKit and our own scripts say of a connection that was there and broke."""


def persistently(run: Callable[[], Completed], progress: Progress) -> Completed:
    """Return how a program ended that downloads; a broken connection is tried three times.

    A place that nobody answers at is no such case: the programs try that again by themselves.
    """
    for pause in PAUSES:
        done = run()
        broken = next((line for line in reversed(done.tail) if _BROKE.search(line)), "")
        if done.returncode == 0 or not broken:
            return done
        progress.warn(f"a download failed; trying again in {pause:g} s: {broken.strip()[:200]}")
        time.sleep(pause)
    return run()
