"""Sources in object stores, through fsspec: `s3://` with s3fs, `gs://` with gcsfs.

A folder is a prefix. What identifies an object is its version (S3, where a bucket keeps versions)
or generation (GCS), else its ETag; that version is what is read, and its checksum is compared where
the store has one. Credentials, region and endpoint are those of the stores' own tools.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from weightsmith.core.errors import EnvironmentFailure, InputRefused, WeightsmithError
from weightsmith.core.ports import Progress
from weightsmith.core.values import Digest, Json
from weightsmith.models.folder import is_used
from weightsmith.outside.remote import (
    Broken,
    Place,
    RemoteFile,
    check_names,
    list_pin,
    require_pin,
)
from weightsmith.outside.s3_cache import CLIENT
from weightsmith.recipe.sources import BUCKET, LIST_PIN, is_archive

_CHUNK = 16 << 20
"""Bytes of one request."""
_MD5 = re.compile(r"[0-9a-f]{32}")
_QUERY = re.compile(r"\?\S*")


class ObjectStore(Protocol):
    """One kind of object store, as fsspec shows it."""

    @property
    def scheme(self) -> str:
        """Of its sources."""

    @property
    def packages(self) -> Sequence[str]:
        """What must be installed, by the names that are imported."""

    @property
    def extra(self) -> str:
        """The extra that installs it."""

    @property
    def hint(self) -> str:
        """Where its credentials are from."""

    def connect(self) -> Any:
        """Return its file system; nothing is asked yet."""

    def describe(self, files: Any, bucket: str, key: str, path: str) -> RemoteFile:
        """Return what it says of an object now."""

    def read(self, files: Any, place: str, version: str, start: int, end: int) -> bytes:
        """Return a part of a version of an object."""


class ObjectRemote:
    """Folders and archives in buckets of one kind of store."""

    where = ""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.scheme, self.packages, self.extra = store.scheme, store.packages, store.extra

    def pin_of(self, source: str, revision: str, sha256: str) -> str:
        """Return the source with the digest of its list."""
        del sha256
        return f"{source}@{revision}" if LIST_PIN.fullmatch(revision) else ""

    def open(self, source: str, revision: str, sha256: str, progress: Progress) -> Place:
        """List a folder, or look at one file."""
        del sha256, progress
        found = BUCKET.fullmatch(source)
        if not found:
            raise AssertionError("a recipe's sources are checked")
        bucket, key = found["bucket"], (found["key"] or "").strip("/")
        single = is_archive(key) or key.endswith(".gguf")
        with self._asked(source):
            files = self._store.connect()
            root = key.rpartition("/")[0] if single else key
            paths = [key.rpartition("/")[2]] if single else self._paths(files, bucket, key)
            check_names([RemoteFile(path=path) for path in paths], source)
            # Each is asked for by itself, and only a model's own: lists have no checksums.
            rows = [
                self._store.describe(files, bucket, f"{root}/{path}".lstrip("/"), path)
                if single or is_used(path)
                else RemoteFile(path=path)
                for path in paths
            ]
        if not rows:
            raise InputRefused(f"{source} does not exist, or is empty", hint="check its path")
        digest = _archive_pin(rows[0]) if single else list_pin(rows)
        require_pin(source, revision, digest)
        place = f"{bucket}/{root}".rstrip("/")
        return Place(
            pin=f"{source}@{digest}",
            pinned=bool(revision),
            files=rows,
            read=lambda file, start, end: self._read(files, place, file, (start, end), source),
            hint=self._store.hint,
            is_archive=is_archive(key),
        )

    @staticmethod
    def _paths(files: Any, bucket: str, key: str) -> list[str]:
        root = f"{bucket}/{key}".rstrip("/")
        rows = files.find(root, detail=True)
        return sorted(
            str(name).removeprefix(f"{root}/")
            for name, row in rows.items()
            if row.get("type") != "directory"
            and str(name).startswith(f"{root}/")
            and not str(name).endswith("/")
        )

    def _read(
        self, files: Any, place: str, file: RemoteFile, part: tuple[int, int], source: str
    ) -> Iterator[bytes]:
        path, start = f"{place}/{file.path}", part[0]
        last = file.size if part[1] < 0 else min(part[1], file.size)
        while start < last:
            end = min(last, start + _CHUNK)
            with self._asked(source, again=True):
                data = self._store.read(files, path, file.version, start, end)
            if not data:
                raise Broken("the store sent nothing")
            yield data
            start += len(data)
        if start == file.size > 0:
            bucket, _, key = path.partition("/")
            with self._asked(source, again=True):
                now = self._store.describe(files, bucket, key, file.path)
            if now != file:
                raise InputRefused(
                    f"{source}: {file.path} was changed while it was read",
                    hint="try again when nobody writes there",
                )

    @contextmanager
    def _asked(self, source: str, *, again: bool = False) -> Iterator[None]:
        """Turn the errors of a store's client into ours; with `again`, of a part that is read."""
        try:
            yield
        except (WeightsmithError, Broken):
            raise
        except FileNotFoundError:
            raise InputRefused(
                f"{source} does not exist, or may not be read", hint="check bucket and path"
            ) from None
        except PermissionError:
            raise InputRefused(
                f"{source}: access is denied", hint=f"check the credentials: {self._store.hint}"
            ) from None
        except Exception as error:  # noqa: BLE001 - each client has its own, without a common base
            text = _QUERY.sub("?…", " ".join(str(error).split()))[:200]
            what = f"{type(error).__name__}: {text}"
            if again and "redentials" not in type(error).__name__:
                raise Broken(what) from None
            raise EnvironmentFailure(f"{source}: {what}", hint=self._store.hint) from None


def _archive_pin(file: RemoteFile) -> str:
    return str(Digest.of(repr((file.path, file.size, file.version or file.md5)).encode()))


class S3:
    """Amazon S3, and what speaks its protocol (AWS_ENDPOINT_URL)."""

    scheme = "s3"
    packages = ("s3fs",)
    extra = "s3"
    hint = "set AWS_PROFILE or AWS_ACCESS_KEY_ID and its secret, AWS_REGION and AWS_ENDPOINT_URL"

    def connect(self) -> Any:
        """Return s3fs."""
        from fsspec import get_filesystem_class

        return get_filesystem_class("s3")(
            use_listings_cache=False, skip_instance_cache=True, config_kwargs=CLIENT
        )

    def describe(self, files: Any, bucket: str, key: str, path: str) -> RemoteFile:
        """Return size, version and checksum of an object."""
        said: Mapping[str, Json] = files.call_s3(
            "head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED"
        )
        tag = str(said.get("ETag") or "").strip('"')
        version = str(said.get("VersionId") or "")
        digest = None
        if said.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT":
            digest = _sha256(said.get("ChecksumSHA256"))
        # https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html: an ETag is the content's
        # MD5 unless it was sent in parts (it then has a dash) or encrypted with a key of KMS or
        # the customer's.
        encrypted = str(said.get("ServerSideEncryption") or "").startswith("aws:kms")
        plain = bool(_MD5.fullmatch(tag)) and not encrypted and not said.get("SSECustomerAlgorithm")
        return RemoteFile(
            path=path,
            size=int(said["ContentLength"]),
            digest=digest,
            md5=tag if plain and digest is None else "",
            version=version if version not in ("", "null") else tag,
        )

    def read(self, files: Any, place: str, version: str, start: int, end: int) -> bytes:
        """Return a part of an object, of a version where its bucket keeps them."""
        # An ETag names no version: that the object is still the same one is asked afterwards.
        tagged = bool(re.fullmatch(r"[0-9a-f]{32}(-[0-9]+)?", version))
        return bytes(
            files.cat_file(place, version_id=None if tagged else version, start=start, end=end)
        )


class Gcs:
    """Google Cloud Storage."""

    scheme = "gs"
    packages = ("gcsfs",)
    extra = "gs"
    hint = "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"

    def connect(self) -> Any:
        """Return gcsfs."""
        from fsspec import get_filesystem_class

        return get_filesystem_class("gs")(use_listings_cache=False, skip_instance_cache=True)

    def describe(self, files: Any, bucket: str, key: str, path: str) -> RemoteFile:
        """Return size, generation and checksum of an object."""
        said: Mapping[str, Json] = files.info(f"{bucket}/{key}")
        md5 = ""
        with suppress(ValueError):
            md5 = base64.b64decode(str(said.get("md5Hash") or ""), validate=True).hex()
        return RemoteFile(
            path=path,
            size=int(said["size"]),
            md5=md5,
            version=str(said.get("generation") or said.get("etag") or ""),
        )

    def read(self, files: Any, place: str, version: str, start: int, end: int) -> bytes:
        """Return a part of one generation of an object."""
        return bytes(
            files.cat_file(place, start=start, end=end, generation=version)
            if version.isdecimal()
            else files.cat_file(place, start=start, end=end)
        )


def _sha256(text: Json) -> Digest | None:
    """Return a digest from base64, None for anything else."""
    with suppress(ValueError):
        return Digest(f"sha256:{base64.b64decode(str(text or ''), validate=True).hex()}")
    return None
