"""Bills of materials: CycloneDX of a model with its card, or of an engine; a base's own.

https://cyclonedx.org/docs/1.6/json/ and https://cyclonedx.org/docs/1.7/json/

1.6 unless 1.7 is asked for: Trivy reads 1.7 since its pull request 10715 (May 2026),
Dependency-Track since 6703 and 6966 (August), and older ones refuse the whole bill. Nothing that is
written here needs 1.7, so only the number differs.

A base's are attached to it, or listed in its index.

BuildKit writes them as statements, in a separate manifest that names its image:
https://github.com/moby/buildkit/blob/master/docs/attestations/attestation-storage.md
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from weightsmith import __version__
from weightsmith.core.errors import WeightsmithError
from weightsmith.core.resources import engine_source
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import Digest, FileEntry, JsonValue, Scores, key_of
from weightsmith.models.model_card import front_matter
from weightsmith.oci import manifests
from weightsmith.oci.attachments import LARGEST_PART, Attachment
from weightsmith.oci.image import Image
from weightsmith.oci.layers import TITLE
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.provenance.evidence import SPDX_TYPE, titled
from weightsmith.recipe.schema import Card

MEDIA_TYPE = "application/vnd.cyclonedx+json"
_MODEL = "machine-learning-model"
SPDX_LICENSES = {
    name.lower(): name
    for name in (
        *("Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MPL-2.0", "Unlicense"),
        *("GPL-3.0-only", "AGPL-3.0-only", "LGPL-3.0-only", "CC0-1.0", "CC-BY-4.0", "WTFPL"),
        *("CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "Artistic-2.0", "OFL-1.1"),
    )
}
"""Licence in model cards -> SPDX identifier; others, such as `llama3`, are plain names."""
OWN_ENGINE = "engine:"
"""Prefix of bases that are a folder of images/engines/, assembled here from its tools."""
ENGINE_BILL, MODEL_BILL = "engine.cdx.json", "model.cdx.json"
SPDX_BILL = "model.spdx.json"
_TYPES = (MEDIA_TYPE, SPDX_TYPE)
_PREDICATES = {
    "https://spdx.dev/Document": (SPDX_TYPE, "base.spdx.json"),
    "https://cyclonedx.org/bom": (MEDIA_TYPE, "base.cdx.json"),
}
"""Predicate type -> media type of the predicate, and its file name."""
_PREDICATE = "in-toto.io/predicate-type"
_ABOUT, _KIND = "vnd.docker.reference.digest", "vnd.docker.reference.type"
_MOST = 20


def base_documents(base: Image | None, name: str, registry: Registry) -> tuple[Attachment, ...]:
    """Return the bills of materials of what is below the weights: its makers', or ours."""
    if base is None or not name:
        return ()
    if not name.startswith(OWN_ENGINE):
        return read_bills(Reference.parse(name), base, registry)
    engine = name.removeprefix(OWN_ENGINE)
    bill = engine_bom(engine, engine_source(engine), base.digest)
    return (titled(MEDIA_TYPE, ENGINE_BILL, bill),)


def read_bills(reference: Reference, base: Image, registry: Registry) -> tuple[Attachment, ...]:
    """Return a base's bills of materials; () if none can be read.

    They are optional, so a registry's error is ignored here.
    """
    found: list[Attachment] = []
    for reader in (_attached, _in_index):
        with suppress(WeightsmithError):
            found += reader(reference, base, registry)
    return tuple(found)


def _attached(reference: Reference, base: Image, registry: Registry) -> Iterator[Attachment]:
    there = reference.at(base.digest)
    for blob, _ in registry.attached(there, base.digest, tagged=False)[:_MOST]:
        one = registry.read_attachment(there, blob)
        if {MODEL_BILL, SPDX_BILL} & {part.annotations.get(TITLE) for part in one.parts}:
            continue  # the base is an image of ours, and its model is not the one that is served
        size = sum(part.blob.size for part in one.parts)
        if one.artifact_type in _TYPES and size <= LARGEST_PART:
            yield one


def _in_index(reference: Reference, base: Image, registry: Registry) -> Iterator[Attachment]:
    body, kind = registry.read_manifest(reference)
    if kind not in manifests.INDEXES:
        return
    where, kinds = str(reference), (manifests.OCI_MANIFEST,)
    for row in manifests.listed(manifests.read_json(body, where), "manifests", where):
        notes = row.get("annotations") if isinstance(row, dict) else None
        if not isinstance(notes, dict) or notes.get(_KIND) != "attestation-manifest":
            continue
        if notes.get(_ABOUT) == base.digest:
            blob = manifests.descriptor(row, where, kinds, manifests.LARGEST_MANIFEST)
            yield from _stated(registry.read_attachment(reference, blob))


def _stated(attestation: Attachment) -> Iterator[Attachment]:
    for part in attestation.parts[:_MOST]:
        media_type, name = _PREDICATES.get(part.annotations.get(_PREDICATE, ""), ("", ""))
        if not media_type:
            continue
        bill = manifests.read_json(part.read(), name, LARGEST_PART).get("predicate")
        if isinstance(bill, dict):
            yield titled(media_type, name, bill)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ancestor:
    """A model that this model was made from."""

    name: str
    pin: str
    digest: Digest
    license: str = ""
    version: str = ""
    description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BilledModel:
    """Facts about a model for its bill of materials."""

    name: str
    version: str
    digest: Digest
    files: Sequence[FileEntry]
    format: str
    model_type: str = ""
    architecture: str = ""
    license: str = ""
    ancestors: Sequence[Ancestor] = ()
    scores: Scores = field(default_factory=dict)
    card: Card = field(default_factory=Card)


def ml_bom(model: BilledModel, version: str = "1.6") -> dict[str, JsonValue]:
    """Return a model's bill of materials: identity, ancestors, scores and use.

    `version` is CycloneDX's: 1.6 or 1.7.
    """
    parents: list[JsonValue] = [
        {
            "type": _MODEL,
            "bom-ref": f"ancestor:{number}",
            "name": ancestor.name,
            "hashes": [_hash(ancestor.digest)],
            "properties": [{"name": "weightsmith:pin", "value": ancestor.pin}],
            **_given(
                version=ancestor.version,
                description=ancestor.description,
                licenses=_licenses(ancestor.license),
            ),
        }
        for number, ancestor in enumerate(model.ancestors)
    ]
    component: dict[str, JsonValue] = {
        "type": _MODEL,
        "bom-ref": "model",
        "name": model.name,
        "version": model.version,
        "hashes": [_hash(model.digest)],
        "modelCard": _card(model),
        "properties": [{"name": "weightsmith:format", "value": model.format}],
        **_given(
            description=model.card.description,
            licenses=_licenses(model.license),
            pedigree={"ancestors": parents} if parents else {},
        ),
    }
    files: list[Mapping[str, JsonValue]] = [
        {"type": "file", "bom-ref": f"file:{file.path}", "name": file.path,
         "hashes": [_hash(file.digest)]}
        for file in model.files
    ]  # fmt: skip
    return _document(component, files, version)


def engine_bom(name: str, source: Mapping[str, JsonValue], digest: Digest) -> dict[str, JsonValue]:
    """Return the bill of materials of an engine compiled here, from its `source.json`."""
    parts = [part for part in source.values() if isinstance(part, dict)]
    upstream = next((part for part in parts if "commit" in part), {})
    repository = str(upstream.get("repository", ""))
    component: dict[str, JsonValue] = {
        "type": "application",
        "bom-ref": "engine",
        "name": name,
        "version": str(upstream.get("version") or source.get("version") or "0"),
        "hashes": [_hash(digest)],
        **_given(licenses=_licenses(str(upstream.get("license") or ""))),
    }
    if repository:
        component["externalReferences"] = [{"type": "vcs", "url": repository}]
        path = repository.removeprefix("https://github.com/")
        component["purl"] = f"pkg:github/{path}@{upstream['commit']}"
    tools = source.get("compiler")
    rows: list[Mapping[str, JsonValue]] = [
        {"type": "library" if tool == "ziglang" else "application", "bom-ref": f"tool:{tool}",
         "name": tool, "version": str(version), "purl": f"pkg:pypi/{tool}@{version}"}
        for tool, version in sorted(tools.items() if isinstance(tools, dict) else ())
    ]  # fmt: skip
    return _document(component, rows)


def license_of(folder: Path) -> str:
    """Return the licence in a model card's front matter, or empty."""
    named = front_matter(folder).get("license")
    return named if isinstance(named, str) else ""


def license_in(bill: bytes, digest: str) -> str:
    """Return the licence that a bill of materials states of the model with this digest, or empty.

    Bills of other things are attached to images too: of the engine, or somebody's scan.
    """
    with suppress(ValueError, KeyError, TypeError, IndexError, AttributeError):
        component = parse(bill)["metadata"]["component"]
        if component["type"] == _MODEL and _hash(Digest(digest)) in component["hashes"]:
            stated = component["licenses"][0]["license"]
            return re.sub(r"\s+", " ", str(stated.get("id") or stated["name"]))[:100]
    return ""


def _card(model: BilledModel) -> dict[str, JsonValue]:
    metrics: list[JsonValue] = [
        {"type": score.metric, "value": f"{score.score:.4f}", "slice": f"{who}, {score.n}"}
        for who, score in sorted(model.scores.items())
    ]
    use, limits = model.card.intended_use, model.card.limitations
    return {
        "modelParameters": {
            "task": "text-generation",
            "inputs": [{"format": "string"}],
            "outputs": [{"format": "string"}],
            **_given(architectureFamily=model.model_type, modelArchitecture=model.architecture),
        },
        **_given(
            quantitativeAnalysis={"performanceMetrics": metrics} if metrics else {},
            considerations=_given(
                useCases=[use] if use else [], technicalLimitations=[limits] if limits else []
            ),
        ),
    }


def _given(**facts: JsonValue) -> dict[str, JsonValue]:
    return {name: value for name, value in facts.items() if value}


def _document(
    component: Mapping[str, JsonValue],
    rows: Sequence[Mapping[str, JsonValue]],
    version: str = "1.6",
) -> dict[str, JsonValue]:
    needs = [row["bom-ref"] for row in rows]
    facts = key_of([component, rows])
    return {
        "bomFormat": "CycloneDX",
        "specVersion": version,
        # Derived from the content, so that the same model has the same bill.
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, facts)}",
        "version": 1,
        "metadata": {
            "tools": {
                "components": [
                    {"type": "application", "name": "weightsmith", "version": __version__}
                ]
            },
            "component": dict(component),
        },
        "components": list(rows),
        "dependencies": [{"ref": component["bom-ref"], "dependsOn": needs}],
    }


def _hash(digest: Digest) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest.hex}


def _licenses(name: str) -> list[JsonValue]:
    known = SPDX_LICENSES.get(name.lower())
    return [{"license": {"id": known} if known else {"name": name}}] if name else []
