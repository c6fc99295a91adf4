"""The local store in front of a shared cache; stages see one store.

A result is its document and its files in the tar layers that an image has of them, so that a push
mounts weights and a hit brings the document alone. Its files stay in the cache until something
reads them. Files by digest could not be mounted; whole results would need the disk of every stage.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

from weightsmith.cache.cache import SharedCache, lost
from weightsmith.cache.document import FOLDERS, SharedEntry, layers_of
from weightsmith.cache.uploads import Remember, Uploads, nowhere
from weightsmith.core.errors import CacheLost, UsageError
from weightsmith.core.files import replace_file
from weightsmith.core.ports import Make, Store, StoreEntry
from weightsmith.core.values import Blob, Digest, FileEntry, JsonValue, Stream, Tree, Writable
from weightsmith.models.safetensors import header_bytes
from weightsmith.oci import tar
from weightsmith.oci.layers import Member, TarLayer, verified

_WEIGHTS = (".safetensors", ".gguf")
_ALTERED = "the result is made here when the command is run again"
_Files: TypeAlias = Iterator[tuple[Member, Iterator[bytes]]]
"""Files of a layer with their bytes, which must be read before the next file."""


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
        self, key: Digest, note: Mapping[str, Writable], make: Make, *, resume: bool = False
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
                return self._lazy.setdefault(key, self._entry(found, shared))
        self._missed.add(key)
        return None

    def _entry(self, found: SharedEntry, shared: SharedCache) -> StoreEntry:
        def refuse(error: CacheLost, blob: Blob) -> None:
            if found.key not in self._refused:
                shared.refuse(error)
            self._lazy.pop(found.key, None)
            self._refused.add(found.key)
            if self._uploads and self._uploads.shared is shared:
                shared.discard(blob, (*found.layers, *found.headers.values()))

        tree = LazyTree(found, shared, self._local, self._scratch, refuse)
        for layer, blob in zip(layers_of(found, tree), found.layers, strict=True):
            self._layers[layer.key] = blob.digest
        registry, repository = shared.cache.origin
        if registry:
            self._remember(registry, repository, [blob.digest for blob in found.layers])
        return StoreEntry(tree=tree, meta=found.meta, cached=True, where=shared.where)


class LazyTree(Tree):
    """A tree of a cache's entry; its files are fetched when their paths are asked for.

    Every byte is compared with its file's digest.
    """

    __setattr__ = object.__setattr__  # it keeps what was fetched, although a Tree is frozen

    def __init__(
        self,
        entry: SharedEntry,
        shared: SharedCache,
        store: Store,
        scratch: Callable[[], Path],
        refuse: Callable[[CacheLost, Blob], None],
    ) -> None:
        object.__setattr__(self, "files", entry.files)
        object.__setattr__(self, "places", {})
        self._entry = entry
        self._shared = shared
        self._store = store
        self._scratch = scratch
        """Returns a folder for what a process reads of it."""
        self._refuse = refuse
        """Called when a blob, or a file in it, turned out to be another."""
        self._whole: Path | None = None
        self._texts: Path | None = None
        self._fetching = threading.RLock()
        """Two stages may read the same result at once."""
        self._passing = threading.Lock()
        self._passes: dict[int, tuple[int, _Files]] = {}
        """A layer's number -> a reading of it that nobody uses now, and its next file's number."""

    def __repr__(self) -> str:
        """Return a text without fetching anything."""
        return f"LazyTree({len(self.files)} files)"

    @property
    def root(self) -> Path:
        """The folder with all files, which are fetched first, as a result of the store."""
        with self._fetching:
            if self._whole is None:
                made = self._store.produce(self._entry.key, self._entry.note, self._fill)
                self._whole = made.tree.root
            return self._whole

    @property
    def texts(self) -> Path:
        """A folder with all files but the weights."""
        if self._whole is not None or not any(f.path.endswith(_WEIGHTS) for f in self.files):
            return self.root
        with self._fetching:
            if self._texts is None:
                folder = self._scratch() / self._entry.key.hex
                for layer, blob in self._layers:
                    if not any(member.path.endswith(_WEIGHTS) for member in layer.members):
                        self._unpack(layer, blob, folder)
                self._texts = folder
            return self._texts

    def path(self, name: str) -> Path:
        """Return the file's location on disk, fetching it first."""
        return (self.root if name.endswith(_WEIGHTS) else self.texts) / name

    def source(self, name: str) -> Path | Stream:
        """Return where the file's bytes come from, without fetching them."""
        if self._whole is not None:
            return self._whole / name
        return Stream(open=lambda: self._stream(name))

    def header(self, name: str) -> Path:
        """Return a file with the header of a weights file, and a hole instead of its tensors.

        A GGUF file whose header nobody could read has only a hole. A safetensors file's header is
        compared with nothing before its tensors are read.
        """
        if self._whole is not None or not name.endswith(_WEIGHTS):
            return self.path(name)
        path = self._scratch() / self._entry.key.hex / "headers" / name
        with self._fetching:
            if path.exists():
                return path
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".safetensors"):
                replace_file(path, (header_bytes(self._stream(name)),))
            elif blob := self._entry.headers.get(name):
                with self._kept_honest(blob):
                    read = self._shared.read(blob)
                    replace_file(path, verified(read, blob, self._where, _ALTERED, CacheLost))
            else:
                replace_file(path, ())
            (size,) = (file.size for file in self.files if file.path == name)
            with path.open("r+b") as file:
                file.truncate(size)
        return path

    def mode(self, name: str) -> int:
        """Return the file's mode."""
        return self._entry.mode(name)

    @property
    def _where(self) -> str:
        return f"the cache {self._shared.where}"

    @cached_property
    def _layers(self) -> list[tuple[TarLayer, Blob]]:
        return list(zip(layers_of(self._entry), self._entry.layers, strict=True))

    @cached_property
    def _names(self) -> Mapping[str, str]:
        """Path in the layer -> path in the entry; layers may have further files."""
        folder = FOLDERS[self._entry.packing]
        return {folder + file.path: file.path for file in self.files}

    def _fill(self, folder: Path) -> Mapping[str, JsonValue]:
        for layer, blob in self._layers:
            self._unpack(layer, blob, folder)
        digests = {file.path: file.digest.hex for file in self.files}
        return {**self._entry.meta, "sha256": digests}

    def _unpack(self, layer: TarLayer, blob: Blob, folder: Path) -> None:
        with self._kept_honest(blob):
            for member, chunks in _files_in(layer, self._shared.read(blob), self._shared.where):
                name = self._names.get(member.path)
                if name is None:
                    continue
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    for chunk in self._verified(member, chunks):
                        file.write(chunk)
                path.chmod(self.mode(name))

    @cached_property
    def _places(self) -> Mapping[str, tuple[int, int]]:
        """Path in the entry -> the number of its layer, and its number among the layer's files."""
        return {
            self._names[member.path]: (number, at)
            for number, (layer, _) in enumerate(self._layers)
            for at, member in enumerate(layer.members)
            if member.path in self._names
        }

    def _stream(self, name: str) -> Iterator[bytes]:
        """Yield a file's bytes; who reads a layer's files in their order reads its blob once."""
        number, at = self._places[name]
        layer, blob = self._layers[number]
        with self._passing:  # a reading that is not beyond the file, and where it is
            position, files = self._passes.pop(number, (at + 1, iter(())))
        with self._kept_honest(blob):
            if position > at:
                read = self._shared.read(blob)
                position, files = 0, _files_in(layer, read, self._shared.where)
            for _ in range(position, at):
                next(files)
            member, chunks = next(files)
            yield from self._verified(member, chunks)
        if at + 1 < len(layer.members):  # else its connection is closed
            with self._passing:
                self._passes[number] = at + 1, files

    def _verified(self, member: Member, chunks: Iterable[bytes]) -> Iterator[bytes]:
        if member.digest is None:
            raise AssertionError("a file of an entry has a digest")
        blob = Blob(digest=member.digest, size=member.size, media_type="")
        return verified(chunks, blob, f"{self._where}, {member.path}", _ALTERED, CacheLost)

    @contextmanager
    def _kept_honest(self, blob: Blob) -> Iterator[None]:
        """Refuse the entry from now on if the block ends with a result that cannot be used."""
        try:
            yield
        except CacheLost as error:
            self._refuse(error, blob)
            raise


def _files_in(layer: TarLayer, chunks: Iterator[bytes], where: str) -> _Files:
    """Yield each file of a layer.

    Everything but the files' bytes is compared; those are the caller's to verify. Raises CacheLost.
    """
    held = memoryview(b"")

    def part(size: int) -> Iterator[bytes]:
        nonlocal held
        while size:
            if not held:
                try:
                    held = memoryview(next(chunks))
                except StopIteration:
                    raise lost(where, "it is shorter than it should be") from None
                continue
            chunk, held = held[:size], held[size:]
            size -= len(chunk)
            yield bytes(chunk)

    def require(expected: bytes) -> None:
        if b"".join(part(len(expected))) != expected:
            raise lost(where, "it is not the layer of its files")

    for head, member in layer.entries():
        require(head)
        if member is None:
            continue
        left = part(member.size)
        yield member, left
        for _ in left:  # what the caller did not read
            pass
        require(tar.padding(member.size))
