"""In-toto statements with SLSA provenance, one per transformation.

https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
https://slsa.dev/spec/v1.0/provenance
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from weightsmith import __version__
from weightsmith.core.values import (
    Blob,
    Digest,
    FileEntry,
    Json,
    JsonValue,
    Tree,
    Writable,
    canonical,
    tree_digest,
)
from weightsmith.oci.image import Image

STATEMENT = "https://in-toto.io/Statement/v1"
SLSA = "https://slsa.dev/provenance/v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"

VSA = "https://slsa.dev/verification_summary/v1"
LEVEL = "WEIGHTSMITH_PROVEN"
"""In a summary's `verifiedLevels`; with `_ON_` and a device or a node type, proven there."""

_HEX = re.compile(r"[0-9a-f]{64}")
PROJECT = "https://github.com/weightsmith/weightsmith"
BUILD_TYPE = f"{PROJECT}/provenance/"
"""Prefix of a transformation's name, one of:"""
WITHDRAWAL = f"{PROJECT}/withdrawal/v1"
"""Predicate type of a statement that withdraws images: its `reason` says why."""
_KINDS = ("merge", "quantize", "unmerged", "draft", "split", "bake", "rebase")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """A ResourceDescriptor: a name and a digest."""

    name: str
    digest: Digest
    uri: str = ""
    media_type: str = ""
    annotations: Mapping[str, JsonValue] | None = None

    def row(self) -> dict[str, JsonValue]:
        """Return it as JSON."""
        found: dict[str, JsonValue] = {"name": self.name, "digest": {"sha256": self.digest.hex}}
        extra = {"uri": self.uri, "mediaType": self.media_type, "annotations": self.annotations}
        return found | {key: value for key, value in extra.items() if value}


@dataclass(frozen=True, slots=True)
class Statement:
    """An in-toto statement, made here or by anyone; malformed parts read as empty."""

    document: Mapping[str, Json]
    signed: bool = False
    """Signed by the given key or identity; False without one."""
    fault: str = ""
    """Why an identity did not sign it, where that is known."""

    @property
    def content(self) -> bytes:
        """Its canonical JSON."""
        return canonical(self.document)

    @property
    def predicate_type(self) -> str:
        """What kind of predicate it has."""
        return str(self.document.get("predicateType", ""))

    @property
    def predicate(self) -> Mapping[str, Json]:
        """What it says about its subjects."""
        return self._at("predicate")

    @property
    def kind(self) -> str:
        """The transformation in one of our statements; empty for any other statement."""
        if self.predicate_type != SLSA:
            return ""
        return str(self._definition.get("buildType", "")).removeprefix(BUILD_TYPE)

    @property
    def is_ours(self) -> bool:
        """Whether it is of a kind that we make, and must be signed by our key."""
        return self.predicate_type in (TEST_RESULT, WITHDRAWAL) or self.kind in _KINDS

    @property
    def subjects(self) -> dict[str, str]:
        """Name -> digest."""
        return _digests(self.document.get("subject"))

    @property
    def digests(self) -> frozenset[str]:
        """The digests of all subjects, also of those that share a name."""
        rows = self.document.get("subject")
        one_each = map(_digests, ([row] for row in rows) if isinstance(rows, list) else ())
        return frozenset(digest for found in one_each for digest in found.values())

    @property
    def image(self) -> str:
        """The image that one of our statements is about; empty if there is none, or several.

        `bake` and `rebase` also have the image's layers as subjects, others only the image.
        """
        rows = self.document.get("subject")
        alone = bool(self.kind) or (isinstance(rows, list) and len(rows) == 1)
        return self.subjects.get("image", "") if alone else ""

    @property
    def tree(self) -> Digest:
        """The digest of a step's result: the files that are its subjects."""
        return tree_digest(
            FileEntry(path=path, size=0, digest=Digest(digest))
            for path, digest in self.subjects.items()
        )

    @property
    def time(self) -> str:
        """When it says that its result was made or seen, in UTC; empty if it does not.

        Our own builds have none. Others' have SLSA's, summaries and withdrawals have theirs.
        """
        details = self._at("predicate", "runDetails", "metadata")
        named = [details.get("finishedOn"), details.get("startedOn")]
        named += [self.predicate.get(key) for key in ("timeVerified", "time", "withdrawnOn")]
        return next((time for one in named if (time := utc_time(one))), "")

    @property
    def dependencies(self) -> dict[str, str]:
        """A transformation's inputs: name -> digest."""
        return _digests(self._definition.get("resolvedDependencies"))

    @property
    def dependency_uris(self) -> dict[str, str]:
        """The stated origins of a transformation's inputs: name -> URI."""
        rows = self._definition.get("resolvedDependencies")
        listed = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        return {str(row.get("name")): str(row.get("uri", "")) for row in listed}

    @property
    def builders(self) -> dict[str, str]:
        """What a transformation ran in, such as `builder:merge`: name -> digest."""
        return _digests(self._builder.get("builderDependencies"))

    @property
    def made_by(self) -> str:
        """The version of weightsmith that made it; empty if that is not stated."""
        found = self._builder.get("version")
        return str(found.get("weightsmith", "")) if isinstance(found, dict) else ""

    @property
    def byproducts(self) -> frozenset[Resource]:
        """A transformation's by-products; several may have one name, as a base's bills."""
        rows = self._at("predicate", "runDetails").get("byproducts")
        return frozenset(
            Resource(name=name, digest=Digest(digest), media_type=str(row.get("mediaType", "")))
            for row in (rows if isinstance(rows, list) else ())
            for name, digest in _digests([row]).items()
        )

    @property
    def parameters(self) -> Mapping[str, JsonValue]:
        """A transformation's parameters."""
        return self._at("predicate", "buildDefinition", "externalParameters")

    @property
    def _builder(self) -> Mapping[str, JsonValue]:
        return self._at("predicate", "runDetails", "builder")

    @property
    def _definition(self) -> Mapping[str, JsonValue]:
        return self._at("predicate", "buildDefinition")

    def _at(self, *keys: str) -> Mapping[str, JsonValue]:
        value: JsonValue = self.document
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value if isinstance(value, dict) else {}


def utc_time(value: Json) -> str:
    """Return a time of RFC 3339 in UTC, to the second; empty for anything else."""
    try:
        when = datetime.fromisoformat(value) if isinstance(value, str) else None
        known = when.astimezone(UTC) if when and when.tzinfo else None
    except (ValueError, OverflowError):
        return ""
    return known.strftime("%Y-%m-%dT%H:%M:%SZ") if known else ""


def _digests(rows: JsonValue) -> dict[str, str]:
    """Return resource descriptors as name -> `sha256:…`.

    Malformed descriptors are left out, and so are names that occur more than once.
    """
    found: dict[str, set[str]] = {}
    for row in rows if isinstance(rows, list) else []:
        digest = row.get("digest") if isinstance(row, dict) else None
        if isinstance(digest, dict) and _HEX.fullmatch(str(digest.get("sha256"))):
            found.setdefault(str(row.get("name")), set()).add(f"sha256:{digest['sha256']}")
    return {name: digests.pop() for name, digests in found.items() if len(digests) == 1}


def tree_resource(name: str, digest: Digest, uri: str = "") -> Resource:
    """Return the resource of a folder; its digest is sha256 over its sorted `sha256sum` list."""
    return Resource(name=name, digest=digest, uri=uri, annotations={"of": "sha256sum list"})


CONTENTS, BASE_FILES = "contents", "base files"
"""What the statement of a thin image names: all files in it but the engine's and the program's, and
of these the base's, perhaps split."""
MOUNTED = "mounted base"
"""The image that a thin image has its base from, if it has none itself."""


def file_resources(tree: Tree) -> list[Resource]:
    """Return one resource per file of a tree."""
    return [Resource(name=file.path, digest=file.digest) for file in tree.files]


def provenance(
    kind: str,
    subjects: Sequence[Resource],
    *,
    parameters: Mapping[str, JsonValue],
    dependencies: Sequence[Resource],
    builder: Sequence[Resource] = (),
    byproducts: Sequence[Resource] = (),
) -> Statement:
    """Return the statement of one transformation; the same inputs give the same statement.

    It has no times, which would change the digest with every run; they are in build.json.
    """
    details: dict[str, JsonValue] = {
        "builder": {
            "id": f"{PROJECT}@{__version__}",
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


def statement(subjects: Sequence[Resource], predicate_type: str, predicate: Writable) -> Statement:
    """Return an in-toto statement about the subjects."""
    return Statement(
        {
            "_type": STATEMENT,
            "subject": [subject.row() for subject in subjects],
            "predicateType": predicate_type,
            "predicate": predicate,
        }
    )


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
