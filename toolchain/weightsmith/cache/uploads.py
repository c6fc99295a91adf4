"""Uploads results beside the next stage; a command's end waits for them only so long."""

from __future__ import annotations

import errno
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
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
from weightsmith.core.ports import AnySigner, StoreEntry
from weightsmith.core.values import Blob, Digest, Writable, key_of
from weightsmith.oci.layers import LAYER_TAR, Memo, checked_opener
from weightsmith.provenance.signing import Check, check_of_signer

T = TypeVar("T")

Remember = Callable[[str, str, Sequence[Digest]], None]
"""(registry, repository, digests): images can mount these layers from there."""
_Task: TypeAlias = tuple[Digest, Mapping[str, Writable], StoreEntry, bool]
Opener: TypeAlias = Callable[[], Iterator[bytes]]
_HEADER_TYPE = "application/vnd.weightsmith.cache.header.v1"
_LARGEST_HEADER = 64 << 20
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
        signer: AnySigner | None = None,
        remember: Remember = nowhere,
    ) -> None:
        self.shared = shared
        """Where results go; other caches are only read."""
        self._memo = memo
        self._signer = signer
        self._check: Check | None = check_of_signer(signer) if signer else None
        self._remember = remember
        self._tasks = queue.SimpleQueue[_Task | None]()
        self._seen: set[Digest] = set()
        self._left = 0
        self._counting = threading.Lock()
        """Two stages may add results at once, while another is uploaded."""
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self.sent = 0
        """Bytes sent so far."""

    def add(
        self, key: Digest, note: Mapping[str, Writable], entry: StoreEntry, *, again: bool = False
    ) -> None:
        """Upload an entry soon, unless the cache has it; returns at once.

        With `again`, also if it has one: that could not be used, because it lacks a blob.
        """
        with self._counting:
            if key in self._seen or self.shared.closed:
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
        return 0 if self.shared.closed else self._left

    def _work(self) -> None:
        while task := self._tasks.get():
            if self._stopped.is_set():
                return
            try:
                if not self.shared.closed:
                    self.upload(*task)
            except (InputRefused, UsageError):
                pass  # a file that cannot be in a layer: this result stays here
            except Exception as error:  # noqa: BLE001 - a fault of a cache never ends a build
                if not self._stopped.is_set():
                    self.shared.fail(error, writing=True)
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
        cache = self.shared.cache
        layers: Sequence[Digest] | None = None
        with suppress(InputRefused):  # an entry that others would not use
            found = None if again else self._tried(lambda: cache.find(key))
            if found is not None:
                layers = [blob.digest for blob in read_document(found, key, self._check).layers]
        sending = layers is None
        if layers is None:
            document, blobs, layers = prepared(key, note, entry, self._memo, self._signer)
            wanted = [(blob, partial(self._while_wanted, opener)) for blob, opener in blobs]
            self.sent += self._tried(lambda: cache.write(key, document, wanted))
        if cache.origin[0]:
            self._remember(*cache.origin, layers)
        return sending

    def _while_wanted(self, opener: Opener) -> Iterator[bytes]:
        """Yield the opener's bytes; ends with an error once the upload is given up.

        Some clients send in threads of their own, and a process waits for them at its end.
        """
        for chunk in opener():
            if self._stopped.is_set():
                raise EnvironmentFailure("the upload was given up", hint="run it again")
            yield chunk

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


def prepared(
    key: Digest,
    note: Mapping[str, Writable],
    entry: StoreEntry,
    memo: Memo,
    signer: AnySigner | None,
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
    bodies: list[tuple[Blob, Opener]] = []
    for layer in layers_of(plain, tree, memo):
        blob = Blob(digest=layer.digest, size=layer.size, media_type=LAYER_TAR)
        bodies.append((blob, checked_opener(layer, blob)))
    blobs, headers = tuple(blob for blob, _ in bodies), dict[str, Blob]()
    for name in (file.path for file in tree.files if file.path.endswith(".gguf")):
        if head := _header(tree.path(name)):
            headers[name] = Blob(digest=Digest.of(head), size=len(head), media_type=_HEADER_TYPE)
            bodies.append((headers[name], partial(iter, (head,))))
    document = to_document(replace(plain, layers=blobs, headers=headers), signer)
    return document, bodies, [blob.digest for blob in blobs]


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
