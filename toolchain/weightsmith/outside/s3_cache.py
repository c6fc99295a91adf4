"""A shared cache in an object store, through fsspec and s3fs: `weightsmith[s3]`.

PREFIX/entries/<key>.json     documents; written after the blobs that they name
PREFIX/entries/<key>.blobs    digest and size of each of these blobs, for cleaning
PREFIX/blobs/<2>/<sha256>     blobs by digest
PREFIX/now/…                  for a moment, to learn the time there

Credentials, region and endpoint are those of the AWS tools: AWS_PROFILE, AWS_ENDPOINT_URL, …
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError, WeightsmithError
from weightsmith.core.ports import CacheUse, OpenedBlob
from weightsmith.core.values import Blob, Digest
from weightsmith.outside.folder_cache import of_rows, to_rows

CLIENT = {
    "connect_timeout": 5,
    "read_timeout": 60,
    "retries": {"max_attempts": 2, "mode": "standard"},
}
"""Settings of botocore's client."""
_CHUNK = 8 << 20
_SMALL = 16 << 20
_PART = 64 << 20
"""Bytes of one part of an upload; S3 allows 10,000 parts."""
_BEING_WRITTEN = 86400
"""Seconds in which a blob without an entry may be one that is being written."""


class S3Cache:
    """Objects below a prefix of a bucket."""

    origin = ("", "")

    def __init__(self, place: str) -> None:
        """Open `BUCKET/PREFIX` without contacting it; UsageError if s3fs is not installed."""
        try:
            from fsspec import get_filesystem_class

            files = get_filesystem_class("s3")
        except ImportError:
            raise UsageError(
                f"s3://{place} needs the package s3fs, which is not installed",
                hint="pip install 'weightsmith[s3]'",
            ) from None
        self.where = f"s3://{place}"
        self._place = place
        self._files: Any = files(
            use_listings_cache=False,
            skip_instance_cache=True,
            default_block_size=_PART,
            config_kwargs=CLIENT,
        )

    def find(self, key: Digest, *, use: bool = True) -> bytes | None:
        """Return the entry's document; nothing there says when it was used."""
        del use
        with self._asked(), suppress(FileNotFoundError):
            return self._small(self._entry(key))
        return None

    def read(self, blob: Blob) -> Iterator[bytes]:
        """Yield a blob's bytes; raises InputRefused for an object of another size."""
        path = self._blob(blob.digest)
        with self._asked(), self._files.open(path, "rb", _CHUNK) as file:
            if file.size != blob.size:
                raise InputRefused(
                    f"{path} has {file.size} bytes, not {blob.size}", hint="delete it"
                )
            while chunk := file.read(_CHUNK):
                yield chunk

    def write(self, key: Digest, document: bytes, blobs: Sequence[OpenedBlob]) -> int:
        """Write the missing blobs, then the document."""
        sent = 0
        with self._asked():
            for blob, opener in blobs:
                path = self._blob(blob.digest)
                if self._size(path) != blob.size:
                    self._put(path, opener())
                    sent += blob.size
            self._files.pipe_file(self._named(key), to_rows(blob for blob, _ in blobs))
            self._files.pipe_file(self._entry(key), document)
        return sent + len(document)

    def discard(self, blob: Blob) -> None:
        """Delete a blob."""
        with self._asked(), suppress(FileNotFoundError):
            self._files.rm_file(self._blob(blob.digest))

    def entries(self) -> Iterator[CacheUse]:
        """Yield every entry; blobs that several have count for each."""
        with self._asked():
            rows = self._keys()
        for key, (size, used) in rows.items():
            with suppress(FileNotFoundError, InputRefused):
                yield CacheUse(key=key, size=size + sum(self._blobs_of(key).values()), used=used)

    def remove(self, keys: Collection[Digest]) -> int:
        """Delete entries, then blobs that no entry names."""
        freed, gone = 0, set[str]()
        with self._asked():
            for key in keys:
                with suppress(FileNotFoundError, InputRefused):
                    gone.update(self._blobs_of(key))
                freed += self._forget(key)
            named = set[str]()
            for key in self._keys():
                try:
                    named.update(self._blobs_of(key))
                except (FileNotFoundError, InputRefused):  # unknown blobs: it goes before them
                    freed += self._forget(key)
            # By the clock that stamps objects here.
            mark = f"{self._place}/now/{secrets.token_hex(8)}"  # two may clean at once
            self._files.pipe_file(mark, b"")
            try:
                young = _time(self._files.info(mark)) - _BEING_WRITTEN
            finally:
                self._files.rm_file(mark)
            for path, row in self._files.find(f"{self._place}/blobs", detail=True).items():
                name = path.rpartition("/")[2]
                if name not in named and (name in gone or _time(row) < young):
                    self._files.rm_file(path)
                    freed += int(row["size"])
        return freed

    def _keys(self) -> dict[Digest, tuple[int, float]]:
        found = {}
        for path, row in self._files.find(f"{self._place}/entries", detail=True).items():
            name = path.rpartition("/")[2]
            with suppress(ValueError):  # something else
                if name.endswith(".json"):
                    key = Digest(f"sha256:{name.removesuffix('.json')}")
                    found[key] = int(row["size"]), _time(row)
        return found

    def _forget(self, key: Digest) -> int:
        freed = 0
        for path in (self._entry(key), self._named(key)):
            freed += self._size(path) or 0
            with suppress(FileNotFoundError):
                self._files.rm_file(path)
        return freed

    def _put(self, path: str, chunks: Iterator[bytes]) -> None:
        # Nothing is at `path` before `commit`: closing a file that is not whole would put it there.
        file = self._files.open(path, "wb", autocommit=False)
        try:
            for chunk in chunks:
                file.write(chunk)
            file.close()
        except BaseException:
            with suppress(Exception):
                file.discard()
            file.closed = True
            raise
        file.commit()

    def _size(self, path: str) -> int | None:
        try:
            return int(self._files.info(path)["size"])
        except FileNotFoundError:
            return None

    def _blobs_of(self, key: Digest) -> dict[str, int]:
        path = self._named(key)
        with self._asked():
            return of_rows(self._small(path), path)

    def _small(self, path: str) -> bytes:
        """Return an object of a few megabytes at most; InputRefused for a larger one."""
        size = int(self._files.info(path)["size"])
        if size > _SMALL:
            raise InputRefused(f"{path} has {size} bytes, more than {_SMALL}", hint="delete it")
        return bytes(self._files.cat_file(path, end=size)) if size else b""

    def _entry(self, key: Digest) -> str:
        return f"{self._place}/entries/{key.hex}.json"

    def _named(self, key: Digest) -> str:
        return f"{self._place}/entries/{key.hex}.blobs"

    def _blob(self, digest: Digest) -> str:
        return f"{self._place}/blobs/{digest.hex[:2]}/{digest.hex}"

    @contextmanager
    def _asked(self) -> Iterator[None]:
        """Turn botocore's errors into ours; those of files stay as they are.

        An endpoint that is no URL is a ValueError.
        """
        try:
            yield
        except (WeightsmithError, OSError):
            raise
        except Exception as error:
            raise EnvironmentFailure(
                f"{self.where}: {' '.join(str(error).split())[:300]}",
                hint="check the credentials, the region and AWS_ENDPOINT_URL",
            ) from error


def _time(row: Mapping[str, object]) -> float:
    written = row.get("LastModified")
    return written.timestamp() if isinstance(written, datetime) else 0.0
