"""In-toto statements with SLSA provenance, one per transformation.

https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
https://slsa.dev/spec/v1.0/provenance
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from weightsmith import __version__
from weightsmith.oci.image import Image
from weightsmith.values import Blob, Digest, FileEntry, Json, Tree

STATEMENT = "https://in-toto.io/Statement/v1"
SLSA = "https://slsa.dev/provenance/v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"

_HEX = re.compile(r"[0-9a-f]{64}")
_PROJECT = "https://github.com/weightsmith/weightsmith"
BUILD_TYPE = f"{_PROJECT}/provenance/"
"""Prefix of a transformation's name: `merge`, `quantize`, `bake`, `rebase`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """A ResourceDescriptor: a name and a digest."""

    name: str
    digest: Digest
    uri: str = ""
    media_type: str = ""
    annotations: Mapping[str, Json] | None = None

    def row(self) -> dict[str, Json]:
        """Return it as JSON."""
        found: dict[str, Json] = {"name": self.name, "digest": {"sha256": self.digest.hex}}
        extra = {"uri": self.uri, "mediaType": self.media_type, "annotations": self.annotations}
        return found | {key: value for key, value in extra.items() if value}


def tree_resource(name: str, digest: Digest, uri: str = "") -> Resource:
    """Return the resource of a folder; its digest is sha256 over its sorted `sha256sum` list."""
    return Resource(name=name, digest=digest, uri=uri, annotations={"of": "sha256sum list"})


def file_resources(tree: Tree | Iterable[FileEntry]) -> list[Resource]:
    """Return one resource per file of a tree."""
    files = tree.files if isinstance(tree, Tree) else tree
    return [Resource(name=file.path, digest=file.digest) for file in files]


def provenance(
    kind: str,
    subjects: Sequence[Resource],
    *,
    parameters: Mapping[str, Json],
    dependencies: Sequence[Resource],
    builder: Sequence[Resource] = (),
    byproducts: Sequence[Resource] = (),
) -> dict[str, Json]:
    """Return the statement of one transformation; the same inputs give the same statement.

    It has no times, which would change the digest with every run; they are in build.json.
    """
    details: dict[str, Json] = {
        "builder": {
            "id": f"{_PROJECT}@{__version__}",
            "version": {"weightsmith": __version__},
            **({"builderDependencies": [item.row() for item in builder]} if builder else {}),
        }
    }
    if byproducts:
        details["byproducts"] = [item.row() for item in byproducts]
    return statement(
        subjects,
        SLSA,
        {
            "buildDefinition": {
                "buildType": BUILD_TYPE + kind,
                "externalParameters": dict(parameters),
                "resolvedDependencies": [item.row() for item in dependencies],
            },
            "runDetails": details,
        },
    )


def statement(
    subjects: Sequence[Resource], predicate_type: str, predicate: Json
) -> dict[str, Json]:
    """Return an in-toto statement about the subjects."""
    return {
        "_type": STATEMENT,
        "subject": [subject.row() for subject in subjects],
        "predicateType": predicate_type,
        "predicate": predicate,
    }


def image_resource(image: Blob) -> Resource:
    """Return an image's resource; it has no reference, so that the image may be copied."""
    return Resource(name="image", digest=image.digest, media_type=image.media_type)


def layer_resources(image: Image) -> list[Resource]:
    """Return one resource per layer, bottom first, and one for the configuration."""
    rows = [
        Resource(name=f"layer {n}: {layer.file}" if layer.file else f"layer {n}",
                 digest=layer.digest, media_type=layer.media_type)
        for n, layer in enumerate(image.layers)
    ]  # fmt: skip
    config = image.config_blob
    return [*rows, Resource(name="config", digest=config.digest, media_type=config.media_type)]


def kind_of(statement: Mapping[str, Json]) -> str:
    """Return the transformation in one of our statements; empty for any other statement."""
    if statement.get("predicateType") != SLSA:
        return ""
    definition = _at(statement, "predicate", "buildDefinition")
    return str(definition.get("buildType", "")).removeprefix(BUILD_TYPE)


def digests_of(rows: Json) -> dict[str, str]:
    """Return resource descriptors as name -> `sha256:…`.

    Malformed descriptors are left out, and so are names that occur more than once.
    """
    found: dict[str, set[str]] = {}
    for row in rows if isinstance(rows, list) else []:
        digest = row.get("digest") if isinstance(row, dict) else None
        if isinstance(digest, dict) and _HEX.fullmatch(str(digest.get("sha256"))):
            found.setdefault(str(row.get("name")), set()).add(f"sha256:{digest['sha256']}")
    return {name: digests.pop() for name, digests in found.items() if len(digests) == 1}


def subjects_of(statement: Mapping[str, Json]) -> dict[str, str]:
    """Return a statement's subjects: name -> digest."""
    return digests_of(statement.get("subject"))


def image_of(statement: Mapping[str, Json]) -> str:
    """Return the image that one of our statements is about; empty if there is none, or several.

    `bake` and `rebase` also have the image's layers as subjects, others only the image.
    """
    rows = statement.get("subject")
    alone = bool(kind_of(statement)) or (isinstance(rows, list) and len(rows) == 1)
    return subjects_of(statement).get("image", "") if alone else ""


def dependencies_of(statement: Mapping[str, Json]) -> dict[str, str]:
    """Return a transformation's inputs: name -> digest."""
    return digests_of(_at(statement, "predicate", "buildDefinition").get("resolvedDependencies"))


def dependency_uris(statement: Mapping[str, Json]) -> dict[str, str]:
    """Return the stated origins of a transformation's inputs: name -> URI."""
    rows = _at(statement, "predicate", "buildDefinition").get("resolvedDependencies")
    listed = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return {str(row.get("name")): str(row.get("uri", "")) for row in listed}


def byproducts_of(statement: Mapping[str, Json]) -> dict[str, str]:
    """Return a transformation's by-products: name -> digest."""
    return digests_of(_at(statement, "predicate", "runDetails").get("byproducts"))


def parameters_of(statement: Mapping[str, Json]) -> Mapping[str, Json]:
    """Return a transformation's parameters."""
    found = _at(statement, "predicate", "buildDefinition").get("externalParameters")
    return found if isinstance(found, dict) else {}


def predicate_of(statement: Mapping[str, Json]) -> Mapping[str, Json]:
    """Return a statement's predicate; {} if it is malformed."""
    return _at(statement, "predicate")


def _at(statement: Mapping[str, Json], *keys: str) -> Mapping[str, Json]:
    value: Json = statement
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}
