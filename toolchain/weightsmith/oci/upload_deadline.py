"""Warns if a layer uploads too slowly for its registry's time limit.

A warning and no abort, since the rate rises when other layers are done. Splitting layers here would
make the digest depend on the network.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

from weightsmith.oci.image import Opener
from weightsmith.oci.limits import RegistryLimits

_SURE = 1 / 20
"""Fraction of the time limit after which the rate is reliable: half a minute of ten."""
_SPARE = 0.8
"""Fraction of the size that would just fit, as advice: rates vary."""


class UploadDeadline:
    """Warns once per push, well before the registry's time limit, about a slow layer."""

    def __init__(
        self, limits: RegistryLimits | None, warn: Callable[[str], None], clock: Callable[[], float]
    ) -> None:
        self._name = limits.name if limits else ""
        self._limit = limits.upload_seconds if limits else 0
        self._warn = warn
        self._clock = clock
        self._warned = not self._limit
        self._lock = threading.Lock()

    def over(self, opener: Opener, size: int, file: str = "") -> Opener:
        """Return an opener of the same layer of `size` bytes that watches the upload rate."""
        return lambda: self._watched(opener(), size, file)

    def _watched(self, chunks: Iterable[bytes], size: int, file: str) -> Iterator[bytes]:
        began, done = self._clock(), 0
        for chunk in chunks:
            yield chunk
            done += len(chunk)
            if not self._warned:
                self._look(done, size, self._clock() - began, file)

    def _look(self, done: int, size: int, seconds: float, file: str) -> None:
        if seconds < self._limit * _SURE or seconds * size <= self._limit * done:
            return
        with self._lock:
            if self._warned:
                return
            self._warned = True
        rate = done / seconds
        self._warn(
            f"{file or 'a layer'} will take about {size / rate / 60:.0f} minutes at "
            f"{rate / 1e6:.1f} MB/s, and {self._name} ends uploads after {self._limit / 60:.0f}: "
            f"bake it with --max-layer-size {_written(rate * self._limit * _SPARE)} "
            "(for GGUF, `quantize --split-max-size`)"
        )


def _written(size: float) -> str:
    return f"{size // 1e8 / 10:g}GB" if size >= 1e9 else f"{max(1, size // 1e6):.0f}MB"
