"""A shared cache in a repository of an OCI registry: one manifest per key, files as layers.

The tag is the key's 64 digits, the configuration is the entry's document, and the layers are those
that an image has of the same files, so that a push mounts them.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime

from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.core.ports import CacheUse, OpenedBlob
from weightsmith.core.values import Blob, Digest, canonical
from weightsmith.oci import manifests, transfers
from weightsmith.oci.attachments import EMPTY, EMPTY_TYPE
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.oci.session import RegistrySession

DOCUMENT_TYPE = "application/vnd.weightsmith.cache.entry.v1+json"
_CREATED = "org.opencontainers.image.created"
_INLINE = 64 << 10
"""Bytes of a document that is also in its manifest, which saves a request."""
_FEW = 2
"""Tries of a look-up: a build does not wait for a registry that is down."""
_MOST_PAGES = 1000
"""Of tags; a page has a hundred or a thousand."""
_NO_LIST = "ask who runs the registry, or use another repository as the cache"
_OK, _ACCEPTED, _MISSING = 200, 202, 404


class RegistryCache:
    """Entries in one repository, through a registry client."""

    def __init__(self, registry: Registry, repository: Reference) -> None:
        self._registry = registry
        self._place = Reference(repository.registry, repository.repository)
        self.where = f"oci://{repository.name}"
        self.origin = (repository.registry, repository.repository)

    def find(self, key: Digest, *, use: bool = True) -> bytes | None:
        """Return the entry's document, in one request if it is small; no use is marked."""
        del use
        found = transfers.manifest_or_none(self._pulling, self._tag(key), _FEW)
        if found is None:
            return None
        manifest = manifests.read_json(found[0], self.where, manifests.LARGEST_MANIFEST)
        blob = manifests.descriptor(
            manifest.get("config"), self.where, (DOCUMENT_TYPE,), manifests.LARGEST_CONFIG
        )
        with suppress(binascii.Error, ValueError):
            inline = base64.b64decode(str(manifest["config"].get("data", "")), validate=True)
            if Digest.of(inline) == blob.digest:
                return inline
        return b"".join(transfers.blob(self._pulling, blob))

    def read(self, blob: Blob) -> Iterator[bytes]:
        """Yield a blob's bytes; raises Altered at the end if they are others."""
        return transfers.blob(self._pulling, blob)

    def write(self, key: Digest, document: bytes, blobs: Sequence[OpenedBlob]) -> int:
        """Push the missing blobs, then the manifest under the key's tag."""
        config = Blob(digest=Digest.of(document), size=len(document), media_type=DOCUMENT_TYPE)
        empty = Blob(digest=Digest.of(EMPTY), size=len(EMPTY), media_type=EMPTY_TYPE)
        layers = list(blobs) or [(empty, lambda: iter((EMPTY,)))]
        inline = {"data": base64.b64encode(document).decode()} if config.size <= _INLINE else {}
        manifest = {
            "schemaVersion": 2,
            "mediaType": manifests.OCI_MANIFEST,
            "artifactType": DOCUMENT_TYPE,
            "config": manifests.described(config) | inline,
            "layers": [manifests.described(blob) for blob, _ in layers],
            "annotations": {_CREATED: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")},
        }
        pushed = self._registry.push_manifest(
            self._tag(key),
            canonical(manifest),
            manifests.OCI_MANIFEST,
            [(config, lambda: iter((document,))), *layers],
        )
        return pushed.uploaded_bytes

    def discard(self, blob: Blob) -> None:
        """Do nothing: a registry keeps a deleted blob's bytes, and never replaces them."""

    def entries(self) -> Iterator[CacheUse]:
        """Yield the entry of every tag that is a key; two requests for a hundred, one for each."""
        for tag in self._tags():
            try:
                key = Digest(f"sha256:{tag}")
            except ValueError:
                continue  # something else in the same repository
            if found := transfers.manifest_or_none(self._pulling, self._tag(key)):
                yield self._cache_use(key, found[0])

    def remove(self, keys: Collection[Digest]) -> int:
        """Delete manifests; the registry's own garbage collection frees their blobs."""
        freed, session = 0, self._registry.session(self._place, "pull,push,delete")
        for key in keys:
            found = transfers.manifest_or_none(session, self._tag(key))
            if found is None:
                continue
            what = f"cannot delete {self._tag(key)}"
            url = f"manifests/{Digest.of(found[0])}"
            reply = session.attempt(what, lambda url=url: session.call("DELETE", url))  # type: ignore[misc]
            if reply.status not in (_OK, _ACCEPTED, _MISSING):
                raise EnvironmentFailure(
                    f"{what}: {session.explain(reply)}",
                    hint="allow deletions in the registry, or set its own rule for old tags",
                )
            freed += self._cache_use(key, found[0]).size
        return freed

    def _cache_use(self, key: Digest, manifest: bytes) -> CacheUse:
        """Return what a manifest says of its entry; one that nobody wrote so is the first to go."""
        try:
            read = manifests.read_json(manifest, self.where)
            rows = [read["config"], *read["layers"]]
            written = datetime.fromisoformat(str(read["annotations"][_CREATED]))
            size = sum(int(row["size"]) for row in rows)
            return CacheUse(key=key, size=size, used=written.timestamp())
        except (InputRefused, LookupError, TypeError, ValueError, ArithmeticError):
            return CacheUse(key=key, size=len(manifest), used=0.0)

    @property
    def _pulling(self) -> RegistrySession:
        return self._registry.session(self._place, "pull")

    def _tag(self, key: Digest) -> Reference:
        return replace(self._place, tag=key.hex)

    def _tags(self) -> Iterator[str]:
        """Yield every tag; raises InputRefused for a list that is none or has no end."""
        session, url = self._pulling, "tags/list?n=1000"
        what = f"cannot list {self.where}"
        for _ in range(_MOST_PAGES):
            reply = session.attempt(
                what,
                lambda url=url: session.call("GET", url, limit=manifests.LARGEST_MANIFEST),  # type: ignore[misc]
            )
            if reply.status == _MISSING:
                return
            if reply.status != _OK:
                raise session.refusal(what, reply)
            document = manifests.read_json(reply.body, self.where, manifests.LARGEST_MANIFEST)
            tags = document.get("tags") or ()
            if not isinstance(tags, list | tuple):
                raise InputRefused(f"{what}: its tags are no list", hint=_NO_LIST)
            yield from map(str, tags)
            if not (url := session.next_page(reply)):
                return
        raise InputRefused(f"{what}: it has more than {_MOST_PAGES} pages", hint=_NO_LIST)
