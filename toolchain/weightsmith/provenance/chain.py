"""Finds the statements about an image, and checks whether it is what they say.

A statement counts by its subject, an image's digest or a step that led to it, and not by the image
that it is attached to: anyone who can write to a repository can copy statements there that a key
signed for other images.
https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md (subject)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from weightsmith.core.thin import ADAPTERS, OWN_FILES
from weightsmith.core.values import Digest, FileEntry, tree_digest
from weightsmith.evaluating.results import NOT_PROVEN
from weightsmith.oci.attachments import Attachment
from weightsmith.oci.image import Image
from weightsmith.provenance import statements
from weightsmith.provenance.evidence import (
    ADAPTER_TYPE,
    DRAFTED,
    EVALUATION_TYPE,
    UNMERGED,
    document_name,
    resource_of,
)
from weightsmith.provenance.labels import PREFIX, TESTED, VERDICT
from weightsmith.provenance.statements import (
    BASE_FILES,
    CONTENTS,
    MOUNTED,
    TEST_RESULT,
    Resource,
    Statement,
)
from weightsmith.recipe.schema import ADAPTER

_PASSED = ("PASSED", "WARNED")
"""Results of a test whose image may be served; a warned one says why it proves nothing."""
_OF_IMAGES = ("bake", "rebase")
_OF_WEIGHTS = (
    ("split", "artifact"), (DRAFTED, "model"), (UNMERGED, "weights"), ("quantize", "checkpoint"),
    ("merge", ""),
)  # fmt: skip
"""Steps before baking, last first, each with the name of its input: the next one's result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """The chain of statements about an image, from its own back to the sources."""

    images: tuple[str, ...]
    """The image's digest, then those it was rebased from; the last one was baked."""
    own: Statement | None = None
    """The statement about the image itself."""
    baked: Statement | None = None
    steps: Mapping[str, Statement] = field(default_factory=dict)
    """`split`, `draft`, `unmerged`, `quantize` and `merge`, if their result is the next one's."""
    made: Mapping[str, str] = field(default_factory=dict)
    """The result that each of them must have: kind -> digest of a tree."""
    results: tuple[Statement, ...] = ()
    """All test results of the image, or of the nearest image that it was rebased from."""
    byproducts: frozenset[Resource] = frozenset()
    """The documents named by statements about `images`."""

    def holds(self, statement: Statement) -> bool:
        """Say whether a statement is about this image, or about a step that led to it."""
        kind = statement.kind
        if kind in self.made:
            return statement.tree == self.made[kind]
        if kind in _OF_IMAGES or statement.predicate_type == TEST_RESULT:
            return statement.image in self.images
        return self.images[0] in statement.digests

    def describe_unrelated(self, statement: Statement) -> str:
        """Describe the subject of a statement that is not about this image."""
        kind = statement.kind
        if kind in dict(_OF_WEIGHTS):
            return f"{kind} of other weights ({statement.tree[7:19]})"
        others = [digest for digest in statement.subjects.values() if digest != self.images[0]]
        return f"about another image ({others[0][7:19]})" if others else "about no image"

    def names(self, document: Attachment) -> bool:
        """Say whether a statement about the image names a document: its name, type and digest."""
        return resource_of(document) in self.byproducts


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question and its answer; `ok` is None if it could not be answered."""

    name: str
    ok: bool | None
    found: str


def check_chain(
    image: Image,
    stated: Sequence[Statement],
    documents: Sequence[Attachment],
    files: Mapping[str, str],
) -> Iterator[Check]:
    """Yield the checks of an image against its statements.

    `files` are the files read from the weight layers: path -> digest.
    """
    lineage = trace(image.digest, stated)
    own, baked = lineage.own, lineage.baked
    if own is None:
        named = (one.subjects.get("image") for one in stated)
        others = [digest for digest in named if digest and digest != image.digest]
        found = "no statement says how this image was made"
        if others:
            changed = _changes(image, stated)
            found = f"about another image ({others[0][7:19]}), not this one{changed}"
        yield Check(name="statement", ok=False, found=found)
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
    if CONTENTS in baked.dependencies:
        yield from _thin(baked, lineage, files)
    yield _documents(own, documents)
    yield from _unnamed(lineage, documents)
    if gate := _gate(image, lineage):
        yield gate


def broken_at(image: Image, stated: Sequence[Statement]) -> str:
    """Return where an image's chain back to its sources breaks; empty if it is whole.

    Statements, manifest and configuration alone are compared: only `check_chain` reads layers.
    """
    lineage = trace(image.digest, stated)
    own, baked = lineage.own, lineage.baked
    if own is None:
        return "no statement says how it was made"
    checks = [_contents(image, own), *([_rebased(lineage)] if own.kind == "rebase" else [])]
    if bad := [one for one in checks if not one.ok]:
        return f"{bad[0].name}: {bad[0].found}"
    if baked is None:
        return "bake: no statement says where the weights come from"
    bad = [one for one in _sources(image, lineage) if one.ok is False]
    merged = lineage.steps.keys() & {"merge", UNMERGED}
    if not merged and f"{PREFIX}adapter.0.digest" in image.labels:
        return "merge: no statement says how base and adapters were merged"
    return f"{bad[0].name}: {bad[0].found}" if bad else ""


def _changes(image: Image, stated: Sequence[Statement]) -> str:
    for one in stated:
        named = one.subjects
        if "config" not in named:
            continue
        layers, wanted = statements.layer_resources(image), list(named.values())[1:]
        if len(layers) != len(wanted):
            return f": it has {len(layers) - 1} layers instead of {len(wanted) - 1}"
        pairs = zip(layers, wanted, strict=True)
        bad = [row.name for row, digest in pairs if row.digest != digest]
        spelled = ["labels or configuration" if name == "config" else name for name in bad]
        return f": changed: {', '.join(spelled)}" if spelled else ""
    return ""


def _contents(image: Image, own: Statement) -> Check:
    named, layers = own.subjects, statements.layer_resources(image)
    bad = [row.name for row in layers if named.get(row.name) != row.digest]
    more = len(named) - 1 - len(layers)
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
    whole = tree_digest(
        FileEntry(path=path, size=0, digest=Digest(digest)) for path, digest in stated.items()
    )
    if whole != baked.dependencies.get(CONTENTS, baked.dependencies.get("artifact")):
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
    sources = dict[str, str]()
    for made in (
        lineage.steps.get("merge") or lineage.steps.get(UNMERGED),
        lineage.steps.get(DRAFTED),
    ):
        inner = ("weights", "model")
        sources |= {k: v for k, v in made.dependencies.items() if k not in inner} if made else {}
    if sources:
        for name, digest in sources.items():
            label = image.labels.get(PREFIX + name.replace(":", ".") + ".digest", "")
            same = label == digest
            found = (label[7:19] or "none") + ("" if same else f", stated: {digest[7:19]}")
            yield Check(name=f"label {name}", ok=same, found=found)
    if "merge" not in lineage.steps and PREFIX + "base.digest" in image.labels:
        digest = image.labels[PREFIX + "base.digest"]
        ok, beside = digest == lineage.made["merge"], UNMERGED in lineage.steps
        served = "served with adapters beside it" if beside else "served as it is"
        if image.labels.get(PREFIX + "kind") == ADAPTER:
            made = lineage.steps.get("quantize")
            packed = f", quantized to {made.parameters.get('format')}" if made else ""
            served = f"the adapter was tested on it{packed}"
        found = served if ok else "not the model that was quantized or served"
        yield Check(name="base", ok=ok, found=found)


def _thin(baked: Statement, lineage: Lineage, files: Mapping[str, str]) -> Iterator[Check]:
    """Yield the checks of what a thin image merges: the base's own files, and each adapter's.

    Large files of a base may be split; that the parts are the base's is then the statement's word.
    """
    merged = lineage.steps.get("merge")
    sources = dict(merged.dependencies) if merged else {}
    groups: dict[str, list[FileEntry]] = {name: [] for name in sources}
    for path, digest in files.items():
        folder, number, *rest = [*path.split("/", 2), ""]
        if f"/{folder}" == ADAPTERS:
            name, path = f"adapter:{number}", rest[0]
        elif f"/{path}".startswith(f"{OWN_FILES}/"):
            continue
        else:
            name = "base"
        groups.setdefault(name, []).append(FileEntry(path=path, size=0, digest=Digest(digest)))
    mounted = baked.dependencies.get(MOUNTED)
    for name, group in sorted(groups.items()):
        if name == "base" and mounted and not group:
            found = f"mounted from the image {mounted[:19]}, compared where it merges"
            yield Check(name="files base", ok=None, found=found)
            continue
        whole, wanted = tree_digest(group), sources.get(name, "")
        split = name == "base" and wanted and whole == baked.dependencies.get(BASE_FILES) != wanted
        ok = whole == wanted or bool(split)
        said = f"{len(group)} files of {wanted[7:19]}" + (", split" if split else "")
        yield Check(name=f"files {name}", ok=ok, found=said if ok else "not those that were merged")


def _documents(own: Statement, documents: Sequence[Attachment]) -> Check:
    stated, there = own.byproducts, set(map(resource_of, documents))
    missing = sorted(one.name for one in stated - there)
    if missing:
        return Check(name="documents", ok=False, found=f"missing or changed: {', '.join(missing)}")
    names = sorted(one.name for one in stated)
    return Check(name="documents", ok=True, found=", ".join(names) or "none")


def _unnamed(lineage: Lineage, documents: Sequence[Attachment]) -> Iterator[Check]:
    """Yield attached documents that no statement names; those that look like ours are wrong."""
    for document in documents:
        if lineage.names(document):
            continue
        name = document_name(document)
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


def trace(image: Digest, stated: Iterable[Statement]) -> Lineage:
    """Return the chain of statements about an image; of several that match, the last one."""
    statements = list(stated)
    images: list[str] = [image]
    own = baked = _image_made(image, statements)
    while baked is not None and baked.kind == "rebase":
        before = baked.dependencies.get("image", "")
        baked = None if before in images else _image_made(before, statements)
        images.append(before)
    # The steps before baking, and the result that each must have.
    steps: dict[str, Statement] = {}
    made: dict[str, str] = {}
    used = baked.dependencies.get("artifact", "") if baked else ""
    for kind, source in _OF_WEIGHTS:
        made[kind] = used
        fitting = [one for one in statements if one.kind == kind and one.tree == used]
        if fitting:
            steps[kind] = fitting[-1]
            used = fitting[-1].dependencies.get(source, "")
    results = [one for one in statements if one.predicate_type == TEST_RESULT]
    of_each = ([one for one in results if one.image == image] for image in images)
    about = [one for one in statements if one.kind in _OF_IMAGES and one.image in images]
    return Lineage(
        images=tuple(images),
        own=own,
        baked=baked,
        steps=steps,
        made=made,
        results=tuple(next((found for found in of_each if found), ())),
        byproducts=frozenset().union(*(one.byproducts for one in about)),
    )


def _image_made(image: str, statements: Sequence[Statement]) -> Statement | None:
    found = [one for one in statements if one.kind in _OF_IMAGES and one.image == image]
    return found[-1] if image and found else None
