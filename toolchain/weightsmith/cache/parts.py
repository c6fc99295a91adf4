"""Takes files out of a layer whose content is known but for the files' bytes."""

from __future__ import annotations

from collections.abc import Iterator

from weightsmith.core.errors import CacheLost
from weightsmith.oci import tar
from weightsmith.oci.layers import Member, TarLayer


class _Reader:
    """Reads exactly so many bytes from chunks of any size."""

    def __init__(self, chunks: Iterator[bytes], where: str) -> None:
        self._chunks, self._where, self._held = chunks, where, memoryview(b"")

    def part(self, size: int) -> Iterator[bytes]:
        """Yield the next `size` bytes; CacheLost if there are fewer."""
        while size:
            if not self._held:
                try:
                    self._held = memoryview(next(self._chunks))
                except StopIteration:
                    raise lost(self._where, "it is shorter than it should be") from None
                continue
            chunk, self._held = self._held[:size], self._held[size:]
            size -= len(chunk)
            yield bytes(chunk)

    def exactly(self, expected: bytes) -> None:
        """Read what must be these bytes."""
        if b"".join(self.part(len(expected))) != expected:
            raise lost(self._where, "it is not the layer of its files")


def lost(where: str, why: str) -> CacheLost:
    """Return the error for a result in a cache that cannot be read as it should."""
    return CacheLost(f"a result in the cache {where} cannot be used: {why}", hint="run it again")


def files_in(
    layer: TarLayer, chunks: Iterator[bytes], where: str
) -> Iterator[tuple[Member, Iterator[bytes]]]:
    """Yield each file of a layer with its bytes, which must be read before the next file.

    Everything but the files' bytes is compared; those are the caller's to verify. Raises CacheLost.
    """
    reader = _Reader(chunks, where)
    for head, member in layer.entries():
        reader.exactly(head)
        if member is None:
            continue
        left = reader.part(member.size)
        yield member, left
        for _ in left:  # what the caller did not read
            pass
        reader.exactly(tar.padding(member.size))
