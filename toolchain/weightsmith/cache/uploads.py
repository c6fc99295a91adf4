"""Uploads results beside the next stage; a command's end waits for them only so long."""

from __future__ import annotations

import errno
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

from weightsmith.cache.cache import SharedCache
from weightsmith.cache.document import (
    SharedEntry,
    layers_of,
    packing_of,
    read_document,
    to_document,
)
from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.ports import Signer, StoreEntry
from weightsmith.core.values import Blob, Digest, Writable, key_of
from weightsmith.oci.layers import LAYER_TAR, Memo
from weightsmith.oci.uploads import checked_opener
from weightsmith.provenance.signing import Check, check_by

T = TypeVar("T")

Remember = Callable[[str, str, Sequence[Digest]], None]
"""(registry, repository, digests): images can mount these layers from there."""
_TRIES = 3
_PAUSE_SECONDS = 2.0
_FINAL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})
"""What another try does not change."""


def nowhere(_registry: str, _repository: str, _digests: Sequence[Digest]) -> None:
    """Remember nothing."""


class Uploads:
    """Results on their way into a cache, in a thread of their own."""

    def __init__(
        self,
        shared: SharedCache,
        memo: Memo,
        signer: Signer | None = None,
        remember: Remember = nowhere,
    ) -> None:
        self._shared = shared
        self._memo = memo
        self._signer = signer
        self._check: Check | None = check_by(signer.public) if signer else None
        self._remember = remember
        self._tasks: queue.SimpleQueue[
            tuple[Digest, Mapping[str, Writable], StoreEntry, bool] | None
        ]
        self._tasks = queue.SimpleQueue()
        self._seen: set[Digest] = set()
        self._left = 0
        self._counting = threading.Lock()
        """Two stages may add results at once, while another is uploaded."""
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self.sent = 0
        """Bytes sent so far."""

    def fill(self, shared: SharedCache) -> bool:
        """Return whether results go into this cache, which others are only read."""
        return shared is self._shared

    def add(
        self, key: Digest, note: Mapping[str, Writable], entry: StoreEntry, *, again: bool = False
    ) -> None:
        """Upload an entry soon, unless the cache has it; returns at once.

        With `again`, also if it has one: that could not be used, because it lacks a blob.
        """
        with self._counting:
            if key in self._seen or self._shared.closed:
                return
            self._seen.add(key)
            self._left += 1
            self._tasks.put((key, note, entry, again))
            if self._thread is None:
                # A daemon, so that a process does not wait for an upload that was given up.
                self._thread = threading.Thread(target=self._work, daemon=True, name="uploads")
                self._thread.start()

    def close(self, seconds: float) -> int:
        """Wait at most so long for what is on its way; return how many results were given up."""
        if self._thread is None:
            return 0
        self._tasks.put(None)
        self._thread.join(seconds)
        self._stopped.set()
        return 0 if self._shared.closed else self._left

    def _work(self) -> None:
        while task := self._tasks.get():
            if self._stopped.is_set():
                return
            try:
                if not self._shared.closed:
                    self.upload(*task)
            except (InputRefused, UsageError):
                pass  # a file that cannot be in a layer: this result stays here
            except Exception as error:  # noqa: BLE001 - a fault of a cache never ends a build
                if not self._stopped.is_set():
                    self._shared.close(error)
            with self._counting:
                self._left -= 1

    def upload(
        self, key: Digest, note: Mapping[str, Writable], entry: StoreEntry, again: bool = False
    ) -> bool:
        """Upload an entry now, with some tries; return False if the cache has it already.

        With `again`, each of its blobs is looked for, and those that are missing are sent.

        Raises EnvironmentFailure or OSError if the cache cannot be used, UsageError or InputRefused
        for files that cannot be in a layer.
        """
        cache, layers = self._shared.cache, None if again else self._held(key)
        sending = layers is None
        if layers is None:
            document, blobs, layers = prepared(key, note, entry, self._memo, self._signer)
            wanted = [(blob, self._while_wanted(opener)) for blob, opener in blobs]
            self.sent += self._tried(lambda: cache.write(key, document, wanted))
        if cache.origin[0]:
            self._remember(*cache.origin, layers)
        return sending

    def _while_wanted(self, opener: Opener) -> Opener:
        """Return an opener whose bytes end with an error once the upload is given up.

        Some clients send in threads of their own, and a process waits for them at its end.
        """

        def chunks() -> Iterator[bytes]:
            for chunk in opener():
                if self._stopped.is_set():
                    raise EnvironmentFailure("the upload was given up", hint="run it again")
                yield chunk

        return chunks

    def _held(self, key: Digest) -> Sequence[Digest] | None:
        """Return the layers of the cache's entry; None if there is none that others would use."""
        cache = self._shared.cache
        try:
            document = self._tried(lambda: cache.find(key))
            if document is None:
                return None
            return [blob.digest for blob in read_document(document, key, self._check).layers]
        except InputRefused:
            return None

    def _tried(self, call: Callable[[], T]) -> T:
        for number in range(1, _TRIES):
            try:
                return call()
            except (EnvironmentFailure, OSError) as error:
                if isinstance(error, OSError) and error.errno in _FINAL:
                    raise
                if self._stopped.wait(_PAUSE_SECONDS * number):
                    raise
        return call()


Opener: TypeAlias = Callable[[], Iterator[bytes]]
_HEADER_TYPE = "application/vnd.weightsmith.cache.header.v1"
_LARGEST_HEADER = 64 << 20


def prepared(
    key: Digest, note: Mapping[str, Writable], entry: StoreEntry, memo: Memo, signer: Signer | None
) -> tuple[bytes, Sequence[tuple[Blob, Opener]], Sequence[Digest]]:
    """Return a local entry as a cache takes it: document, its blobs, digests of those with layers.

    Hashes its layers unless their digests are known. Raises UsageError or InputRefused for files
    that cannot be in a layer, and for a note that the key is not the digest of, which no reader
    would use.
    """
    if key_of(note) != key:
        raise InputRefused(
            "it does not say what it was made of",
            hint="`clean --keep 0` empties the store; the next build makes it again",
        )
    tree = entry.tree
    plain = SharedEntry(
        key=key,
        note=note,
        meta=entry.meta,
        files=tree.files,
        programs=frozenset(f.path for f in tree.files if tree.mode(f.path) & 0o100),
        packing=packing_of(note),
    )
    layers = layers_of(plain, tree, memo)
    blobs = tuple(Blob(digest=x.digest, size=x.size, media_type=LAYER_TAR) for x in layers)
    heads = {f.path: _header(tree.path(f.path)) for f in tree.files if f.path.endswith(".gguf")}
    headers = {
        path: (Blob(digest=Digest.of(head), size=len(head), media_type=_HEADER_TYPE), head)
        for path, head in heads.items()
        if head
    }
    shared = replace(plain, layers=blobs, headers={path: one for path, (one, _) in headers.items()})
    bodies = [
        (blob, checked_opener(layer, blob)) for blob, layer in zip(blobs, layers, strict=True)
    ]
    bodies += [(blob, partial(iter, (head,))) for blob, head in headers.values()]
    return to_document(shared, signer), bodies, [blob.digest for blob in blobs]


def _header(path: Path) -> bytes:
    """Return the bytes of a GGUF file before its tensors; empty if it has no readable header."""
    from weightsmith.models.gguf_reader import GGUFReader

    try:
        reader = GGUFReader(path)
        size = int(reader.data_offset)
        with path.open("rb") as file:
            return file.read(size) if size <= _LARGEST_HEADER else b""
    except (OSError, ValueError, InputRefused):
        return b""
