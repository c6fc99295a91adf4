"""The local store in front of a shared cache; stages see one store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from weightsmith.cache.cache import SharedCache
from weightsmith.cache.document import SharedEntry, layers_of
from weightsmith.cache.lazy import LazyTree
from weightsmith.cache.uploads import Remember, Uploads, nowhere
from weightsmith.core.errors import CacheLost, UsageError
from weightsmith.core.ports import Store, StoreEntry
from weightsmith.core.values import Blob, Digest, FileEntry, JsonValue, Writable


class SharedStore:
    """A Store whose results may be in a cache: found there, and fetched when they are read."""

    def __init__(
        self,
        local: Store,
        caches: Sequence[SharedCache],
        scratch: Callable[[], Path],
        uploads: Uploads | None = None,
        remember: Remember = nowhere,
    ) -> None:
        self._local = local
        self._caches = caches
        self._scratch = scratch
        self._uploads = uploads
        self._remember = remember
        self._lazy: dict[Digest, StoreEntry] = {}
        self._missed: set[Digest] = set()
        self._refused: set[Digest] = set()
        self._shared: set[Digest] = set()
        self._layers: dict[str, Digest] = {}
        """Key of a layer -> its digest, by the entries that were found."""

    def find(self, key: Digest) -> StoreEntry | None:
        """Return the entry, or None; the cache is asked once for each key.

        An entry that is here is uploaded, since who looks for it uses it.
        """
        entry = self._find(key, again=False)
        if entry and self._uploads and key not in self._lazy:
            self._uploads.add(key, entry.note, entry)
        return entry

    def produce(
        self,
        key: Digest,
        note: Mapping[str, Writable],
        make: Callable[[Path], Mapping[str, JsonValue]],
        *,
        resume: bool = False,
    ) -> StoreEntry:
        """Return the entry; make it if neither store nor cache has it, and upload it meanwhile."""
        if (found := self._find(key, again=True)) and key in self._lazy:
            return found
        entry = found or self._local.produce(key, note, make, resume=resume)
        if self._uploads:
            self._uploads.add(key, note, entry, again=key in self._refused)
        return entry

    def share(
        self, key: Digest, note: Mapping[str, Writable], entry: StoreEntry, *, again: bool = False
    ) -> None:
        """Upload an entry now, unless the cache has it; for machines that wait for it.

        The cache is asked once for each key; with `again` it is asked for every blob. Raises
        what `Uploads.upload` raises, UsageError if the cache is only read.
        """
        if self._uploads is None:
            raise UsageError(
                "other machines need a cache that may be written to",
                hint="give --cache instead of --cache-from",
            )
        if again or key not in self._shared:  # what all tasks of a fleet need is asked for once
            self._uploads.upload(key, note, entry, again=again)
        self._shared.add(key)

    def moved(self) -> int:
        """Return how many bytes have come from the caches and gone to them so far."""
        sent = self._uploads.sent if self._uploads else 0
        return sent + sum(shared.bytes_read for shared in self._caches)

    def digest_file(self, path: Path, *, read: bool = True) -> FileEntry:
        """Return size and digest of a file; see Store."""
        return self._local.digest_file(path, read=read)

    def require_room(self, needed: int, what: str) -> None:
        """Raise EnvironmentFailure unless `needed` bytes are free on the store's disk."""
        self._local.require_room(needed, what)

    def memo(self, key: str, make: Callable[[], str]) -> str:
        """Return the small text cached under a key; a layer's digest may be known from a cache."""
        return self._layers.get(key) or self._local.memo(key, make)

    def clean(self, keep_bytes: int) -> Mapping[str, int]:
        """Delete least recently used entries of the local store."""
        return self._local.clean(keep_bytes)

    def _find(self, key: Digest, *, again: bool) -> StoreEntry | None:
        if entry := self._local.find(key):
            self._lazy.pop(key, None)
            return entry
        if lazy := self._lazy.get(key):
            return lazy
        if key in self._refused or (key in self._missed and not again):
            return None
        for shared in self._caches:
            if found := shared.find(key):
                entry = self._lazy[key] = self._entry(found, shared)
                return entry
        self._missed.add(key)
        return None

    def _entry(self, found: SharedEntry, shared: SharedCache) -> StoreEntry:
        def refuse(error: CacheLost, blob: Blob) -> None:
            if found.key not in self._refused:
                shared.refuse(error)
            self._lazy.pop(found.key, None)
            self._refused.add(found.key)
            if self._uploads and self._uploads.fill(shared):
                shared.discard(blob, (*found.layers, *found.headers.values()))

        tree = LazyTree(found, shared, self._local, self._scratch, refuse)
        for layer, blob in zip(layers_of(found, tree), found.layers, strict=True):
            self._layers[layer.key] = blob.digest
        registry, repository = shared.cache.origin
        if registry:
            self._remember(registry, repository, [blob.digest for blob in found.layers])
        return StoreEntry(tree=tree, meta=found.meta, cached=True, where=shared.where)
