"""SPDX 3.0 of a model: its AI package, what it was made from, its files and its questions.

https://spdx.github.io/spdx-spec/v3.0.1/model/AI/Classes/AIPackage/
https://spdx.github.io/spdx-spec/v3.0.1/model/Dataset/Classes/DatasetPackage/

It says the same as the CycloneDX bill, in the form that files for authorities are made of. What is
not known is left out, and so is every profile whose required facts are not known, such as dates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from weightsmith import __version__
from weightsmith.core.values import Digest, JsonValue, key_of
from weightsmith.provenance.bills import SPDX_LICENSES, BilledModel

_CONTEXT = "https://spdx.org/rdf/3.0.1/spdx-context.jsonld"
_NOTHING = "https://spdx.org/rdf/3.0.1/terms/ExpandedLicensing/NoAssertionLicense"
_Element = dict[str, JsonValue]


def spdx_document(model: BilledModel, created: str) -> _Element:
    """Return the document in JSON-LD; the same model has the same one, with the image's date."""
    elements = list(_elements(model))
    facts = key_of([elements, created])
    space = f"https://weightsmith.dev/spdx/{facts.removeprefix('sha256:')}#"
    listed = [str(one["spdxId"]) for one in elements]
    agent: _Element = {
        "type": "SoftwareAgent",
        "spdxId": "agent",
        "name": f"weightsmith {__version__}",
    }
    document: _Element = {
        "type": "SpdxDocument",
        "spdxId": "document",
        "name": f"{model.name} {model.version}",
        "profileConformance": ["core", "software", "simpleLicensing"],
        "rootElement": ["model"],
        "element": ["agent", *listed],
    }
    creation: _Element = {
        "type": "CreationInfo",
        "@id": "_:creation",
        "specVersion": "3.0.1",
        "created": created,
        "createdBy": [f"{space}agent"],
    }
    made = [_placed(one, space) for one in (document, agent, *elements)]
    return {"@context": _CONTEXT, "@graph": [creation, *made]}


def _elements(model: BilledModel) -> Iterator[_Element]:
    about = _package("model", model.name, model.version, model.digest)
    card: _Element = {
        "description": model.card.description,
        "ai_typeOfModel": [one for one in (model.model_type, model.architecture) if one],
        "ai_informationAboutApplication": model.card.intended_use,
        "ai_limitation": model.card.limitations,
        "ai_metric": [
            {"type": "DictionaryEntry", "key": f"{who}: {one.metric}, n={one.n}",
             "value": f"{one.score:.4f}"}
            for who, one in sorted(model.scores.items())
        ],
    }  # fmt: skip
    yield {**about, "comment": f"format: {model.format}", **{k: v for k, v in card.items() if v}}
    yield from _licensed("model", model.license)
    for number, ancestor in enumerate(model.ancestors):
        name = f"ancestor-{number}"
        made = _package(name, ancestor.name, ancestor.version, ancestor.digest)
        yield {**made, "summary": ancestor.description, "comment": f"pin: {ancestor.pin}"}
        yield from _licensed(name, ancestor.license)
        yield _related(f"{name}-of", name, "ancestorOf", "model")
    names = []
    for number, file in enumerate(model.files):
        names.append(f"file-{number}")
        yield {"type": "software_File", "spdxId": names[-1], "name": file.path,
               "verifiedUsing": [_hash(file.digest)]}  # fmt: skip
    if names:
        yield _related("contents", "model", "contains", *names)
    asked = {one.n for one in model.scores.values()}
    if asked:
        yield {
            "type": "dataset_DatasetPackage",
            "spdxId": "questions",
            "name": f"questions to {model.name}",
            "software_primaryPurpose": "data",
            "dataset_datasetType": ["text"],
            "dataset_datasetSize": max(asked),
            "dataset_intendedUse": "evaluation of the model before it is published",
        }
        yield _related("tests", "model", "testedOn", "questions")


def _package(spdx_id: str, name: str, version: str, digest: Digest) -> _Element:
    found: _Element = {
        "type": "ai_AIPackage",
        "spdxId": spdx_id,
        "name": name,
        "software_primaryPurpose": "model",
        "verifiedUsing": [_hash(digest)],
    }
    return {**found, **({"software_packageVersion": version} if version else {})}


def _licensed(of: str, name: str) -> Iterator[_Element]:
    """Yield the declared licence; an unknown one is declared as unknown."""
    if not name:
        yield _related(f"{of}-declared", of, "hasDeclaredLicense", _NOTHING)
        return
    expression = SPDX_LICENSES.get(name.lower()) or f"LicenseRef-{_plain(name)}"
    yield {"type": "simplelicensing_LicenseExpression", "spdxId": f"{of}-license",
           "simplelicensing_licenseExpression": expression}  # fmt: skip
    yield _related(f"{of}-declared", of, "hasDeclaredLicense", f"{of}-license")


def _plain(name: str) -> str:
    return "".join(one if one.isascii() and one.isalnum() else "-" for one in name)


def _related(spdx_id: str, origin: str, kind: str, *to: str) -> _Element:
    return {
        "type": "Relationship",
        "spdxId": spdx_id,
        "from": origin,
        "relationshipType": kind,
        "to": list(to),
    }


def _placed(element: Mapping[str, JsonValue], space: str) -> _Element:
    """Return an element with full names in place of those within this document."""

    def full(value: JsonValue) -> JsonValue:
        if isinstance(value, list):
            return [full(one) for one in value]
        return value if str(value).startswith("https://") else f"{space}{value}"

    names = {k: full(element[k]) for k in ("spdxId", "from", "to", "rootElement", "element")
             if k in element}  # fmt: skip
    return {**element, **names, "creationInfo": "_:creation"}


def _hash(digest: Digest) -> _Element:
    return {"type": "Hash", "algorithm": "sha256", "hashValue": digest.hex}
