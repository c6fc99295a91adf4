"""A result whose files stay in a cache until something reads them.

A result is its document and its files in the tar layers that an image has of them, so that a push
mounts weights and a hit brings the document alone. Files by digest could not be mounted; whole
results would need the disk of every stage.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

from weightsmith.cache.cache import SharedCache, lost
from weightsmith.cache.document import FOLDERS, SharedEntry, layers_of
from weightsmith.core.errors import CacheLost
from weightsmith.core.files import replace_file
from weightsmith.core.ports import Store
from weightsmith.core.values import Blob, JsonValue, Stream, Tree
from weightsmith.oci import tar
from weightsmith.oci.layers import Member, TarLayer, verified

_WEIGHTS = (".safetensors", ".gguf")
_ALTERED = "the result is made here when the command is run again"
_Files: TypeAlias = Iterator[tuple[Member, Iterator[bytes]]]
"""Files of a layer with their bytes, which must be read before the next file."""


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
        """Return a file with the header of a GGUF file, and a hole instead of its tensors.

        A GGUF file whose header nobody could read has only a hole.
        """
        if self._whole is not None or not name.endswith(".gguf"):
            return self.root / name
        path = self._scratch() / self._entry.key.hex / "headers" / name
        with self._fetching:
            if path.exists():
                return path
            path.parent.mkdir(parents=True, exist_ok=True)
            if blob := self._entry.headers.get(name):
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
        with self._kept_honest(blob):
            position, files = self._pass_to(number, at)
            for _ in range(position, at):
                next(files)
            member, chunks = next(files)
            yield from self._verified(member, chunks)
        if at + 1 < len(layer.members):  # else its connection is closed
            with self._passing:
                self._passes[number] = at + 1, files

    def _pass_to(self, number: int, at: int) -> tuple[int, _Files]:
        """Return a reading of a layer that is not beyond a file, and where it is; nobody else's."""
        with self._passing:
            position, files = self._passes.pop(number, (at + 1, iter(())))
        if position <= at:
            return position, files
        layer, blob = self._layers[number]
        return 0, _files_in(layer, self._shared.read(blob), self._shared.where)

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
