"""A shared cache in this process, which may be broken in every way that a real one is."""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.ports import CacheUse, OpenedBlob
from weightsmith.core.values import Blob, Digest

CHUNK = 1000
"""Small, so that readers meet every boundary."""


@dataclass
class MemoryCache:
    """Documents and blobs; `faults` has the methods that fail, and how."""

    where: str = "memory"
    origin: tuple[str, str] = ("", "")
    documents: dict[Digest, bytes] = field(default_factory=dict)
    blobs: dict[Digest, bytes] = field(default_factory=dict)
    named: dict[Digest, tuple[Digest, ...]] = field(default_factory=dict)
    """Entry -> its blobs."""
    used: dict[Digest, float] = field(default_factory=dict)
    faults: dict[str, BaseException] = field(default_factory=dict)
    asked: list[Digest] = field(default_factory=list)
    """Every key that was looked up."""
    read_bytes: int = 0

    def find(self, key: Digest, *, use: bool = True) -> bytes | None:
        self._fail("find")
        self.asked.append(key)
        if use and key in self.documents:
            self.used[key] = time.time()
        return self.documents.get(key)

    def read(self, blob: Blob) -> Iterator[bytes]:
        self._fail("read")
        if blob.digest not in self.blobs:
            raise EnvironmentFailure(f"no blob {blob.digest.short}")
        data = self.blobs[blob.digest]
        for start in range(0, len(data), CHUNK):
            self._fail("read")
            self.read_bytes += len(data[start : start + CHUNK])
            yield data[start : start + CHUNK]

    def write(self, key: Digest, document: bytes, blobs: Sequence[OpenedBlob]) -> int:
        sent = 0
        for blob, opener in blobs:
            self._fail("write")
            if len(self.blobs.get(blob.digest, b"")) != blob.size:
                self.blobs[blob.digest] = b"".join(opener())
                sent += blob.size
        self._fail("write")
        self.documents[key] = document
        self.named[key] = tuple(blob.digest for blob, _ in blobs)
        self.used[key] = time.time()
        return sent + len(document)

    def discard(self, blob: Blob) -> None:
        self._fail("write")
        self.blobs.pop(blob.digest, None)

    def entries(self) -> Iterator[CacheUse]:
        self._fail("entries")
        for key, document in list(self.documents.items()):
            size = len(document) + sum(len(self.blobs[name]) for name in self.named[key])
            yield CacheUse(key=key, size=size, used=self.used[key])

    def remove(self, keys: Collection[Digest]) -> int:
        self._fail("remove")
        before = self._size()
        for key in keys:
            self.documents.pop(key, None)
            self.named.pop(key, None)
        left = {name for names in self.named.values() for name in names}
        self.blobs = {name: data for name, data in self.blobs.items() if name in left}
        return before - self._size()

    def _size(self) -> int:
        return sum(map(len, [*self.documents.values(), *self.blobs.values()]))

    def _fail(self, method: str) -> None:
        if fault := self.faults.get(method):
            raise fault
