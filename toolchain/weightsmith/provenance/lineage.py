"""Finds the statements about an image: about its digest, or about a step that led to it.

Anyone who can write to a repository can copy statements there that a key signed for other images.
So a statement counts by its subject and not by the image that it is attached to.
https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md (subject)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from weightsmith.core.values import Digest
from weightsmith.provenance.evidence import AttachedDocument, resource_of
from weightsmith.provenance.statements import TEST_RESULT, Resource, Statement

_OF_IMAGES = ("bake", "rebase")
_OF_WEIGHTS = (("split", "artifact"), ("quantize", "checkpoint"), ("merge", ""))
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
    """`split`, `quantize` and `merge`, if their result is the next step's input."""
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
        return self.images[0] in statement.subjects.values()

    def describe_unrelated(self, statement: Statement) -> str:
        """Describe the subject of a statement that is not about this image."""
        kind = statement.kind
        if kind in dict(_OF_WEIGHTS):
            return f"{kind} of other weights ({statement.tree[7:19]})"
        others = [digest for digest in statement.subjects.values() if digest != self.images[0]]
        return f"about another image ({others[0][7:19]})" if others else "about no image"

    def names(self, document: AttachedDocument) -> bool:
        """Say whether a statement about the image names a document: its name, type and digest."""
        return resource_of(document) in self.byproducts


def trace(image: Digest, stated: Iterable[Statement]) -> Lineage:
    """Return the chain of statements about an image; of several that match, the last one."""
    statements = list(stated)
    images: list[str] = [image]
    own = baked = _image_made(image, statements)
    while baked is not None and baked.kind == "rebase":
        before = baked.dependencies.get("image", "")
        baked = None if before in images else _image_made(before, statements)
        images.append(before)
    steps, made = _steps(baked, statements)
    about = [one for one in statements if one.kind in _OF_IMAGES and one.image in images]
    return Lineage(
        images=tuple(images),
        own=own,
        baked=baked,
        steps=steps,
        made=made,
        results=_results(images, statements),
        byproducts=frozenset().union(*(one.byproducts for one in about)),
    )


def _image_made(image: str, statements: Sequence[Statement]) -> Statement | None:
    found = [one for one in statements if one.kind in _OF_IMAGES and one.image == image]
    return found[-1] if image and found else None


def _steps(
    baked: Statement | None, statements: Sequence[Statement]
) -> tuple[dict[str, Statement], dict[str, str]]:
    """Return the steps before baking, and the result that each must have."""
    steps: dict[str, Statement] = {}
    made: dict[str, str] = {}
    used = baked.dependencies.get("artifact", "") if baked else ""
    for kind, source in _OF_WEIGHTS:
        made[kind] = used
        fitting = [one for one in statements if one.kind == kind and one.tree == used]
        if fitting:
            steps[kind] = fitting[-1]
            used = fitting[-1].dependencies.get(source, "")
    return steps, made


def _results(images: Sequence[str], statements: Sequence[Statement]) -> tuple[Statement, ...]:
    results = [one for one in statements if one.predicate_type == TEST_RESULT]
    of_each = ([one for one in results if one.image == image] for image in images)
    return tuple(next((found for found in of_each if found), ()))
