"""Reads the bills of materials of a base image: attached to it, or listed in its index.

BuildKit writes them as statements, in a separate manifest that names its image:
https://github.com/moby/buildkit/blob/master/docs/attestations/attestation-storage.md
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from weightsmith.core.errors import WeightsmithError
from weightsmith.core.resources import engine_source
from weightsmith.oci import manifests
from weightsmith.oci.attachments import LARGEST_PART, Attachment
from weightsmith.oci.image import Image
from weightsmith.oci.layers import TITLE
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.provenance.evidence import SPDX_TYPE, AttachedDocument, titled
from weightsmith.provenance.mlbom import MEDIA_TYPE, engine_bom

OWN_ENGINE = "engine:"
"""Prefix of bases that are a folder of images/engines/, assembled here from its tools."""

ENGINE_BILL, MODEL_BILL = "engine.cdx.json", "model.cdx.json"
_TYPES = (MEDIA_TYPE, SPDX_TYPE)
_PREDICATES = {
    "https://spdx.dev/Document": (SPDX_TYPE, "base.spdx.json"),
    "https://cyclonedx.org/bom": (MEDIA_TYPE, "base.cdx.json"),
}
"""Predicate type -> media type of the predicate, and its file name."""
_PREDICATE = "in-toto.io/predicate-type"
_ABOUT, _KIND = "vnd.docker.reference.digest", "vnd.docker.reference.type"
_MOST = 20


def base_documents(
    base: Image | None, name: str, registry: Registry
) -> tuple[AttachedDocument, ...]:
    """Return the bills of materials of what is below the weights: its makers', or ours."""
    if base is None or not name:
        return ()
    if not name.startswith(OWN_ENGINE):
        return read_bills(Reference.parse(name), base, registry)
    engine = name.removeprefix(OWN_ENGINE)
    bill = engine_bom(engine, engine_source(engine), base.digest)
    return (titled(MEDIA_TYPE, ENGINE_BILL, bill),)


def read_bills(
    reference: Reference, base: Image, registry: Registry
) -> tuple[AttachedDocument, ...]:
    """Return a base's bills of materials; () if none can be read.

    They are optional, so a registry's error is ignored here.
    """
    readers: Sequence[Callable[[Reference, Image, Registry], Iterator[AttachedDocument]]]
    readers = (_attached, _in_index)
    found: list[AttachedDocument] = []
    for reader in readers:
        with suppress(WeightsmithError):
            found += reader(reference, base, registry)
    return tuple(found)


def _attached(reference: Reference, base: Image, registry: Registry) -> Iterator[AttachedDocument]:
    there = reference.at(base.digest)
    for blob, _ in registry.attached(there, base.digest, tagged=False)[:_MOST]:
        one = registry.read_attachment(there, blob)
        titles = {part.annotations.get(TITLE) for part in one.parts}
        if MODEL_BILL in titles:
            continue  # the base is an image of ours, and its model is not the one that is served
        if one.artifact_type in _TYPES and _size(one) <= LARGEST_PART:
            yield AttachedDocument(
                artifact_type=one.artifact_type, parts=one.parts, annotations=one.annotations
            )


def _in_index(reference: Reference, base: Image, registry: Registry) -> Iterator[AttachedDocument]:
    body, kind = registry.read_manifest(reference)
    if kind not in manifests.INDEXES:
        return
    for row in manifests.listed(
        manifests.read_json(body, str(reference)), "manifests", str(reference)
    ):
        notes = row.get("annotations") if isinstance(row, dict) else None
        if not isinstance(notes, dict) or notes.get(_KIND) != "attestation-manifest":
            continue
        if notes.get(_ABOUT) == base.digest:
            kinds = (manifests.OCI_MANIFEST,)
            blob = manifests.descriptor(row, str(reference), kinds, manifests.LARGEST_MANIFEST)
            yield from _stated(registry.read_attachment(reference, blob))


def _stated(attestation: Attachment) -> Iterator[AttachedDocument]:
    for part in attestation.parts[:_MOST]:
        media_type, name = _PREDICATES.get(part.annotations.get(_PREDICATE, ""), ("", ""))
        if not media_type:
            continue
        bill = manifests.read_json(part.read(), name, LARGEST_PART).get("predicate")
        if isinstance(bill, dict):
            yield titled(media_type, name, bill)


def _size(attachment: Attachment) -> int:
    return sum(part.blob.size for part in attachment.parts)
