"""Checks whether an image is what its statements say, one question at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from weightsmith.core.values import Digest, FileEntry, tree_digest
from weightsmith.evaluating.results import NOT_PROVEN
from weightsmith.oci.image import Image
from weightsmith.provenance import statements
from weightsmith.provenance.evidence import (
    ADAPTER_TYPE,
    EVALUATION_TYPE,
    AttachedDocument,
    document_name,
    resource_of,
)
from weightsmith.provenance.labels import PREFIX, TESTED, VERDICT
from weightsmith.provenance.lineage import Lineage, trace
from weightsmith.provenance.statements import Statement

_PASSED = ("PASSED", "WARNED")
"""Results of a test whose image may be served; a warned one says why it proves nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question and its answer; `ok` is None if it could not be answered."""

    name: str
    ok: bool | None
    found: str


def check_chain(
    image: Image,
    stated: Sequence[Statement],
    documents: Sequence[AttachedDocument],
    files: Mapping[str, str],
) -> Iterator[Check]:
    """Yield the checks of an image against its statements.

    `files` are the files read from the weight layers: path -> digest.
    """
    lineage = trace(image.digest, stated)
    own, baked = lineage.own, lineage.baked
    if own is None:
        yield Check(name="statement", ok=False, found=_unknown(image, stated))
        return
    kind = own.kind
    yield Check(name="statement", ok=True, found=f"{kind} of {image.digest.short}")
    yield _contents(image, own)
    if kind == "rebase":
        yield _rebased(lineage)
    if baked is None:
        yield Check(name="weights", ok=False, found="no statement says where the weights come from")
        return
    yield _weights(baked, files)
    yield from _sources(image, lineage)
    yield _documents(own, documents)
    yield from _unnamed(lineage, documents)
    if gate := _gate(image, lineage):
        yield gate


def _unknown(image: Image, stated: Sequence[Statement]) -> str:
    others = [s for one in stated if (s := one.subjects.get("image"))]
    if not others:
        return "no statement says how this image was made"
    changed = _changes(image, stated)
    return f"about another image ({others[0][7:19]}), not this one{changed}"


def _changes(image: Image, stated: Sequence[Statement]) -> str:
    """Say which layers differ from those in a statement."""
    for one in stated:
        named = one.subjects
        if "config" not in named:
            continue
        layers = [row.digest for row in statements.layer_resources(image)]
        wanted = list(named.values())[1:]
        if len(layers) != len(wanted):
            return f": it has {len(layers) - 1} layers instead of {len(wanted) - 1}"
        rows = zip(statements.layer_resources(image), wanted, strict=True)
        bad = [row.name for row, digest in rows if row.digest != digest]
        spelled = ["labels or configuration" if name == "config" else name for name in bad]
        return f": changed: {', '.join(spelled)}" if spelled else ""
    return ""


def _contents(image: Image, own: Statement) -> Check:
    named = own.subjects
    bad = [
        row.name for row in statements.layer_resources(image) if named.get(row.name) != row.digest
    ]
    more = len(named) - 1 - len(statements.layer_resources(image))
    if bad or more:
        what = ", ".join(bad) or f"{abs(more)} layers too few or too many"
        return Check(name="contents", ok=False, found=f"do not match the statement: {what}")
    return Check(name="contents", ok=True, found="layers and configuration match the statement")


def _rebased(lineage: Lineage) -> Check:
    if lineage.own is None or lineage.baked is None:
        return Check(name="rebase", ok=False, found="the original image's statement is missing")
    before, first = lineage.images[1], lineage.images[-1]
    ok = lineage.own.parameters.get("first_image") in (None, first)
    found = f"from {before[7:19]}, first baked as {first[7:19]}"
    return Check(name="rebase", ok=ok, found=found if ok else "its original image does not match")


def _weights(baked: Statement, files: Mapping[str, str]) -> Check:
    stated = {
        name.removeprefix("file:"): digest
        for name, digest in baked.dependencies.items()
        if name.startswith("file:")
    }
    bad = sorted(
        {path for path in stated if files.get(path) != stated[path]} | (set(files) - set(stated))
    )
    if bad:
        return Check(
            name="weights", ok=False, found=f"do not match the statement: {', '.join(bad[:5])}"
        )
    artifact = baked.dependencies.get("artifact")
    if _tree(stated) != artifact:
        return Check(name="weights", ok=False, found="the statement contradicts itself")
    return Check(name="weights", ok=True, found=f"{len(stated)} files match the statement")


def _sources(image: Image, lineage: Lineage) -> Iterator[Check]:
    artifact = lineage.made["split"]
    label = image.labels.get(PREFIX + "artifact.digest", "")
    yield Check(
        name="label artifact",
        ok=label == artifact,
        found=f"{label[7:19]}" + ("" if label == artifact else f", stated: {artifact[7:19]}"),
    )
    for kind in lineage.steps:
        yield Check(name=kind, ok=True, found=f"made {lineage.made[kind][7:19]}")
    if merged := lineage.steps.get("merge"):
        yield from _labels(image, merged.dependencies)
    elif PREFIX + "base.digest" in image.labels:
        digest = image.labels[PREFIX + "base.digest"]
        ok = digest == lineage.made["merge"]
        found = "served as it is" if ok else "not the model that was quantized or served"
        yield Check(name="base", ok=ok, found=found)


def _labels(image: Image, sources: Mapping[str, str]) -> Iterator[Check]:
    for name, digest in sources.items():
        key = PREFIX + name.replace(":", ".") + ".digest"
        label = image.labels.get(key, "")
        found = (label[7:19] or "none") + ("" if label == digest else f", stated: {digest[7:19]}")
        yield Check(name=f"label {name}", ok=label == digest, found=found)


def _documents(own: Statement, documents: Sequence[AttachedDocument]) -> Check:
    stated, there = own.byproducts, set(map(resource_of, documents))
    missing = sorted(one.name for one in stated - there)
    if missing:
        return Check(name="documents", ok=False, found=f"missing or changed: {', '.join(missing)}")
    names = sorted(one.name for one in stated)
    return Check(name="documents", ok=True, found=", ".join(names) or "none")


def _unnamed(lineage: Lineage, documents: Sequence[AttachedDocument]) -> Iterator[Check]:
    """Yield attached documents that no statement names; those that look like ours are wrong."""
    for document in documents:
        name = document_name(document)
        if lineage.names(document):
            continue
        ours = document.artifact_type in (EVALUATION_TYPE, ADAPTER_TYPE)
        wrong = ours or name in {one.name for one in lineage.byproducts}
        found = "does not match the statement" if wrong else "no statement of the image names it"
        yield Check(name=f"document {name}", ok=False if wrong else None, found=found)


def _gate(image: Image, lineage: Lineage) -> Check | None:
    if not lineage.results:
        scored = any(key.startswith(PREFIX + "score.image") for key in image.labels)
        tested = image.labels.get(TESTED, "")
        if tested and tested not in lineage.images:
            found = f"the same weights were tested in the image {tested[:19]}, not this form"
            if not scored:
                found = f"not proven: the image {tested[:19]} was started, but asked nothing"
            return Check(name="gate", ok=None, found=found)
        if scored:
            return Check(name="gate", ok=False, found="scores without a result")
        if image.labels.get(VERDICT) == NOT_PROVEN:
            found = "not proven: no image with these weights was started"
            return Check(name="gate", ok=None, found=found)
        return None
    # One failed result counts, however many passed; then one with a warning.
    results = [one.predicate for one in lineage.results]
    worst = [one for one in results if one.get("result") not in _PASSED]
    worst += [one for one in results if one.get("result") != "PASSED"]
    predicate = next(iter(worst), results[-1])
    tests = [predicate.get(key) for key in ("warnedTests", "passedTests")]
    findings = "; ".join(str(row) for rows in tests if isinstance(rows, list) for row in rows)[:200]
    asked = lineage.results[-1].image
    result = predicate.get("result")
    passed = result in _PASSED
    if asked == image.digest:
        return Check(name="gate", ok=passed, found=f"{result}: {findings}")
    found = f"{result} is of {asked[7:19]}, before its base was replaced: {findings}"
    found = f"not proven: {found}" if passed else found
    return Check(name="gate", ok=None if passed else False, found=found)


def _tree(files: Mapping[str, str]) -> Digest:
    return tree_digest(
        FileEntry(path=path, size=0, digest=Digest(digest)) for path, digest in files.items()
    )
