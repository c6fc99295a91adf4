"""Sources in object stores, through fsspec: `s3://` with s3fs, `gs://` with gcsfs.

A folder is a prefix. What identifies an object is its version (S3, where a bucket keeps versions)
or generation (GCS), else its ETag; that version is what is read, and its checksum is compared where
the store has one. A pin is the digest of a list: where S3 keeps versions, a folder that was changed
since is read as it was at the moment whose list has that digest. Credentials, region and endpoint
are those of the stores' own tools.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from operator import itemgetter
from typing import TYPE_CHECKING, Protocol

from weightsmith.core.errors import Altered, EnvironmentFailure, InputRefused, WeightsmithError
from weightsmith.core.ports import Progress
from weightsmith.core.values import Digest, Json, without_passwords
from weightsmith.models.folder import is_used
from weightsmith.outside.remote import (
    Broken,
    Place,
    RemoteFile,
    SourceKind,
    check_names,
    list_pin,
    require_pin,
)
from weightsmith.outside.s3_cache import CLIENT
from weightsmith.recipe.sources import BUCKET, LIST_PIN, is_archive

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_CHUNK = 16 << 20
"""Bytes of one request."""
_MOST_MOMENTS = 1000
"""Of a folder's past that are looked at."""
_MD5 = re.compile(r"[0-9a-f]{32}")
_UNKEPT = "null"
"""The version of an object that was written when its bucket kept none."""
_TAG = re.compile(r"[0-9a-f]{32}(-[0-9]+)?")
_QUERY = re.compile(r"\?\S*")
_LONGEST = 60
"""Letters of a store's code of an error."""


class ObjectStore(SourceKind, Protocol):
    """One kind of object store, as fsspec shows it."""

    @property
    def hint(self) -> str:
        """Where its credentials are from."""

    def connect(self) -> AbstractFileSystem:
        """Return its file system; nothing is asked yet."""

    def describe(
        self, files: AbstractFileSystem, bucket: str, key: str, path: str, version: str = ""
    ) -> RemoteFile:
        """Return what it says of a version of an object, or of the object now."""

    def past(self, files: AbstractFileSystem, bucket: str, key: str) -> Iterable[Mapping[str, str]]:
        """Yield the versions by key of what was below a prefix at earlier moments, newest first."""

    def read(
        self, files: AbstractFileSystem, place: str, version: str, start: int, end: int
    ) -> bytes:
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
            below = f"{root}/".lstrip("/")
            found_now = dict.fromkeys((f"{below}{path}" for path in paths), "")
            known: dict[tuple[str, str], RemoteFile] = {}
            rows = self._rows(files, bucket, below, found_now, known, single=single)
            digest = _pin(rows, single=single)
            if revision and digest != revision:
                whole = key if single else below
                for moment in self._store.past(files, bucket, whole):
                    then = {one: moment[one] for one in moment if not single or one == key}
                    check_names([RemoteFile(path=n.removeprefix(below)) for n in then], source)
                    earlier = self._rows(files, bucket, below, then, known, single=single)
                    if _pin(earlier, single=single) == revision:
                        rows, digest = earlier, revision
                        break
        if not rows:
            raise InputRefused(f"{source} does not exist, or is empty", hint="check its path")
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

    def _rows(
        self,
        files: AbstractFileSystem,
        bucket: str,
        below: str,
        found: Mapping[str, str],
        known: dict[tuple[str, str], RemoteFile],
        *,
        single: bool,
    ) -> list[RemoteFile]:
        # Each is asked for by itself, and only a model's own: lists have no checksums.
        rows = []
        for key, version in found.items():
            path = key.removeprefix(below)
            about = known.get((key, version)) or RemoteFile(path=path)
            if about.size < 0 and (single or is_used(path)):
                about = self._store.describe(files, bucket, key, path, version)
            known[key, version] = about
            rows.append(about)
        return rows

    @staticmethod
    def _paths(files: AbstractFileSystem, bucket: str, key: str) -> list[str]:
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
        self,
        files: AbstractFileSystem,
        place: str,
        file: RemoteFile,
        part: tuple[int, int],
        source: str,
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
                now = self._store.describe(files, bucket, key, file.path, file.version)
            if now != file:
                raise Altered(
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
        except PermissionError as error:
            raise InputRefused(
                f"{source}: access is denied{_why(error)}",
                hint=f"check the credentials: {self._store.hint}",
            ) from None
        except Exception as error:  # noqa: BLE001 - each client has its own, without a common base
            text = _QUERY.sub("?…", without_passwords(" ".join(str(error).split())))
            what = f"{type(error).__name__}: {text[:200]}"
            if again and "redentials" not in type(error).__name__:
                raise Broken(what) from None
            raise EnvironmentFailure(f"{source}: {what}", hint=self._store.hint) from None


def _why(error: PermissionError) -> str:
    """Return a store's word for why it denies access, such as ExpiredToken; else empty."""
    with suppress(AttributeError, LookupError, TypeError):
        code = str(error.__cause__.response["Error"]["Code"])  # type: ignore[union-attr]
        return f" ({code})" if code.isalpha() and code.isascii() and len(code) < _LONGEST else ""
    return ""


def _pin(rows: Sequence[RemoteFile], *, single: bool) -> str:
    """Return the digest of a list, or of what is known of one file."""
    if not (single and rows):
        return list_pin(rows)
    (file,) = rows
    return str(Digest.of(repr((file.path, file.size, file.version or file.md5)).encode()))


class S3:
    """Amazon S3, and what speaks its protocol (AWS_ENDPOINT_URL)."""

    scheme = "s3"
    packages = ("s3fs",)
    extra = "s3"
    hint = "set AWS_PROFILE or AWS_ACCESS_KEY_ID and its secret, AWS_REGION and AWS_ENDPOINT_URL"

    def connect(self) -> AbstractFileSystem:
        """Return s3fs."""
        from fsspec import get_filesystem_class

        return get_filesystem_class("s3")(
            use_listings_cache=False, skip_instance_cache=True, config_kwargs=CLIENT
        )

    def describe(
        self, files: AbstractFileSystem, bucket: str, key: str, path: str, version: str = ""
    ) -> RemoteFile:
        """Return size, version and checksum of an object."""
        one = {"VersionId": version} if version and not _TAG.fullmatch(version) else {}
        said: Mapping[str, Json] = files.call_s3(
            "head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED", **one
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
            version=version if version not in ("", _UNKEPT) else tag,
        )

    def read(
        self, files: AbstractFileSystem, place: str, version: str, start: int, end: int
    ) -> bytes:
        """Return a part of an object, of a version where its bucket keeps them."""
        # An ETag names no version: that the object is still the same one is asked afterwards.
        one = None if _TAG.fullmatch(version) else version
        return bytes(files.cat_file(place, version_id=one, start=start, end=end))

    def past(self, files: AbstractFileSystem, bucket: str, key: str) -> Iterable[Mapping[str, str]]:
        """Yield what was there after each change, by the times of versions and delete markers.

        S3 tells seconds: changes within one are one.
        """
        history: dict[str, list[tuple[datetime, str | None]]] = {}  # None: it was deleted
        marks: dict[str, str] = {}
        with suppress(OSError):  # the right to list versions is one of its own
            while True:
                said = files.call_s3("list_object_versions", Bucket=bucket, Prefix=key, **marks)
                for one in (*said.get("Versions", ()), *said.get("DeleteMarkers", ())):
                    version = str(one["VersionId"]) if "ETag" in one else None
                    history.setdefault(one["Key"], []).append((one["LastModified"], version))
                if not said.get("IsTruncated"):
                    break
                marks = {name: said[f"Next{name}"] for name in ("KeyMarker", "VersionIdMarker")}
        if all(version == _UNKEPT for rows in history.values() for _, version in rows):
            return
        for rows in history.values():
            rows.sort(key=itemgetter(0), reverse=True)
        moments = sorted({time for rows in history.values() for time, _ in rows}, reverse=True)
        for moment in moments[:_MOST_MOMENTS]:
            then = {
                name: next((version for time, version in rows if time <= moment), None)
                for name, rows in sorted(history.items())
                if not name.endswith("/")
            }
            yield {
                name: "" if version == _UNKEPT else version
                for name, version in then.items()
                if version is not None
            }


class Gcs:
    """Google Cloud Storage."""

    scheme = "gs"
    packages = ("gcsfs",)
    extra = "gs"
    hint = "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"

    def connect(self) -> AbstractFileSystem:
        """Return gcsfs."""
        from fsspec import get_filesystem_class

        return get_filesystem_class("gs")(use_listings_cache=False, skip_instance_cache=True)

    def describe(
        self, files: AbstractFileSystem, bucket: str, key: str, path: str, version: str = ""
    ) -> RemoteFile:
        """Return size, generation and checksum of an object."""
        one = {"generation": version} if version.isdecimal() else {}
        said: Mapping[str, Json] = files.info(f"{bucket}/{key}", **one)
        md5 = ""
        with suppress(ValueError):
            md5 = base64.b64decode(str(said.get("md5Hash") or ""), validate=True).hex()
        return RemoteFile(
            path=path,
            size=int(said["size"]),
            md5=md5,
            version=str(said.get("generation") or said.get("etag") or ""),
        )

    def past(self, files: AbstractFileSystem, bucket: str, key: str) -> Iterable[Mapping[str, str]]:
        """Yield nothing: a list of generations has none that were deleted together."""
        del files, bucket, key
        return ()

    def read(
        self, files: AbstractFileSystem, place: str, version: str, start: int, end: int
    ) -> bytes:
        """Return a part of one generation of an object."""
        return bytes(
            files.cat_file(place, start=start, end=end, generation=version)
            if version.isdecimal()
            else files.cat_file(place, start=start, end=end)
        )


def _sha256(text: object) -> Digest | None:
    """Return a digest from base64, None for anything else."""
    with suppress(ValueError):
        return Digest(f"sha256:{base64.b64decode(str(text or ''), validate=True).hex()}")
    return None
