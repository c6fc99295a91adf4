"""A cache as a build uses it: whatever is wrong with it is a miss and one warning.

Whoever finds a damaged blob reads it once more, since the fault may have been on the way, and
deletes it where it may write: an upload that looks for each blob then misses it and sends it. An
upload compares names and sizes alone, because reading everything would cost as much as sending it.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator

from weightsmith.cache.document import SharedEntry, read_document
from weightsmith.core.errors import (
    Altered,
    CacheLost,
    InputRefused,
    WeightsmithError,
)
from weightsmith.core.ports import Cache
from weightsmith.core.time_limits import within
from weightsmith.core.values import Blob, Digest
from weightsmith.provenance.signing import Check

_LIMIT = "cache.lookup_seconds is this limit"


class SharedCache:
    """One cache with what is known of it; safe to use from several threads."""

    def __init__(
        self, cache: Cache, check: Check | None, warn: Callable[[str], None], seconds: float
    ) -> None:
        self.cache = cache
        self._check = check
        self._warn = warn
        self._seconds = seconds
        """For one look-up; a cache that takes longer is not asked again."""
        self._lock = threading.Lock()
        self.broken = False
        """Whether it is not used any more."""
        self.closed = False
        """Whether nothing is written to it any more; it may still be read."""
        self.bytes_read = 0
        """Bytes read from it."""

    @property
    def where(self) -> str:
        """The cache's address."""
        return self.cache.where

    def find(self, key: Digest) -> SharedEntry | None:
        """Return the entry, or None: also if it is refused, or the cache cannot be used."""
        if self.broken:
            return None
        try:
            data = within(self._seconds, lambda: self.cache.find(key), _LIMIT)
            return None if data is None else read_document(data, key, self._check)
        except InputRefused as refused:
            self._warn(
                f"the cache {self.where} has a result that is not used ({key.short}): "
                f"{refused.message}"
            )
        except Exception as error:  # noqa: BLE001 - whatever a client raises, it is a miss
            self.fail(error)
        return None

    def read(self, blob: Blob) -> Iterator[bytes]:
        """Yield a blob's bytes, unverified; raises CacheLost if they cannot be read."""
        if self.broken:
            raise lost(self.where, "the cache cannot be used any more")
        try:
            for chunk in self.cache.read(blob):
                self.bytes_read += len(chunk)
                yield chunk
        except (InputRefused, FileNotFoundError, Altered) as error:
            raise lost(self.where, _why(error)) from error
        except Exception as error:
            self.fail(error)
            raise lost(self.where, _why(error)) from error

    def refuse(self, error: CacheLost) -> None:
        """Say that a result turned out to be another than its entry says."""
        if not self.broken:
            self._warn(error.message)

    def discard(self, suspect: Blob, others: Iterable[Blob]) -> None:
        """Delete a blob with other bytes than its digest says, so that the next upload sends it.

        It is read once more: the fault may have been on the way. Only who deletes one compares the
        entry's others too, so that one upload is enough.
        """
        if self._deleted(suspect):
            for blob in others:
                self._deleted(blob)

    def _deleted(self, blob: Blob) -> bool:
        """Delete a blob if it is damaged, and return whether it was."""
        if self.broken or self.closed:
            return False
        state = hashlib.sha256()
        try:
            for chunk in self.cache.read(blob):
                self.bytes_read += len(chunk)
                state.update(chunk)
            if state.hexdigest() == blob.digest.hex:
                return False
            self.cache.discard(blob)
        except Exception:  # noqa: BLE001 - it cannot be read at all, or this machine may not delete
            return False
        return True

    def fail(self, error: Exception, *, writing: bool = False) -> None:
        """Do not use the cache any more, or only not write to it, and say so once."""
        with self._lock:
            said, self.closed = self.closed, True
            self.broken |= not writing
        what = "cannot be used; the build goes on without it"
        if writing:
            what = "cannot be written; results are not shared"
        if not said:
            self._warn(f"the cache {self.where} {what}: {_why(error)}")


def lost(where: str, why: str) -> CacheLost:
    """Return the error for a result in a cache that cannot be read as it should."""
    return CacheLost(f"a result in the cache {where} cannot be used: {why}", hint="run it again")


def _why(error: Exception) -> str:
    if isinstance(error, WeightsmithError):
        return error.message
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
