"""What an image is and what its statements say: each difference is found, also in signed ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.core.values import Blob, Digest, FileEntry, tree_digest
from weightsmith.oci.image import Image, ImageConfig, assemble
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.provenance import evidence
from weightsmith.provenance.chain import check_chain
from weightsmith.provenance.labels import PREFIX
from weightsmith.provenance.statements import (
    Resource,
    Statement,
    image_resource,
    layer_resources,
    provenance,
)

OTHER = Digest.of(b"other")
WEIGHTS = Digest.of(b"weights")
FILES = {"tiny.gguf": WEIGHTS}


def tree(name: str, digest: Digest) -> Digest:
    return tree_digest([FileEntry(path=name, size=0, digest=digest)])


BASE, ADAPTER, MERGED = Digest.of(b"base"), Digest.of(b"adapter"), Digest.of(b"merged")
CHECKPOINT, ARTIFACT = tree("model.safetensors", MERGED), tree("tiny.gguf", WEIGHTS)
LABELS = {
    PREFIX + "artifact.digest": ARTIFACT,
    PREFIX + "base.digest": BASE,
    PREFIX + "adapter.0.digest": ADAPTER,
}


def image_of(labels: Mapping[str, str]) -> Image:
    layer = TarLayer(members=(Member.of_bytes("models/tiny.gguf", b"weights"),), epoch=0)
    return assemble((), (layer,), config=ImageConfig(labels=labels), epoch=0)


def step(
    kind: str, made: Sequence[Resource], used: Mapping[str, Digest], **parameters: str
) -> Statement:
    needed = [Resource(name=name, digest=digest) for name, digest in used.items()]
    return provenance(kind, made, parameters=parameters, dependencies=needed)


def baked(
    image: Image, artifact: Digest = ARTIFACT, contents: Sequence[Resource] | None = None
) -> Statement:
    inside = layer_resources(image) if contents is None else contents
    used = {"artifact": artifact, "file:tiny.gguf": WEIGHTS}
    return step("bake", [image_resource(image.manifest_blob), *inside], used)


STEPS = (
    step("quantize", [Resource(name="tiny.gguf", digest=WEIGHTS)], {"checkpoint": CHECKPOINT}),
    step(
        "merge",
        [Resource(name="model.safetensors", digest=MERGED)],
        {"base": BASE, "adapter:0": ADAPTER},
    ),
)


def wrong(image: Image, *stated: Statement) -> dict[str, str]:
    """Return what does not hold: check -> what was found."""
    return {one.name: one.found for one in check_chain(image, stated, (), FILES) if one.ok is False}


def test_what_was_stated_as_it_is_holds():
    image = image_of(LABELS)
    checks = list(check_chain(image, (baked(image), *STEPS), (), FILES))

    assert [one.name for one in checks if one.ok is not True] == []
    assert {"contents", "weights", "label artifact", "label base", "label adapter:0"} <= {
        one.name for one in checks
    }


def test_a_statement_of_other_layers():
    image = image_of(LABELS)
    layer, config = layer_resources(image)
    changed = Resource(name=layer.name, digest=OTHER)
    more = Resource(name="layer 1", digest=OTHER)

    contradicting = wrong(image, baked(image, artifact=OTHER))
    assert contradicting["weights"] == "the statement contradicts itself"
    assert wrong(image, baked(image, contents=[changed, config]), *STEPS) == {
        "contents": f"do not match the statement: {layer.name}"
    }
    assert wrong(image, baked(image, contents=[layer, config, more]), *STEPS) == {
        "contents": "do not match the statement: 1 layers too few or too many"
    }


@pytest.mark.parametrize("name", ["artifact", "base", "adapter:0"])
def test_a_label_that_names_another_source(name):
    key = f"{PREFIX}{name.replace(':', '.')}.digest"
    image = image_of({**LABELS, key: OTHER})

    assert list(wrong(image, baked(image), *STEPS)) == [f"label {name}"]


def test_a_base_that_is_served_as_it_is_and_is_another():
    labels = {PREFIX + "artifact.digest": ARTIFACT}
    own = image_of({**labels, PREFIX + "base.digest": ARTIFACT})
    other = image_of({**labels, PREFIX + "base.digest": BASE})

    assert wrong(own, baked(own)) == {}
    assert list(wrong(other, baked(other))) == ["base"]


def test_scores_that_no_test_gave():
    image = image_of({**LABELS, PREFIX + "score.image": "1.0000 contains n=33"})

    assert wrong(image, baked(image), *STEPS) == {"gate": "scores without a result"}


def test_a_rebase_that_names_another_first_image():
    image, first = image_of(LABELS), image_of({**LABELS, "version": "before"})

    def rebased(named: Digest) -> Statement:
        made = [image_resource(image.manifest_blob), *layer_resources(image)]
        return step("rebase", made, {"image": first.digest}, first_image=named)

    assert wrong(image, rebased(first.digest), baked(first), *STEPS) == {}
    assert list(wrong(image, rebased(OTHER), baked(first), *STEPS)) == ["rebase"]


def test_more_attachments_than_any_image_has_are_not_read(monkeypatch):
    monkeypatch.setattr(evidence, "_MOST_ATTACHED", 2)
    row = (Blob(digest=OTHER, size=1, media_type="x"), "")

    assert evidence.limited([row] * 2) == [row] * 2
    with pytest.raises(InputRefused, match="too many manifests are attached to the image: 3"):
        evidence.limited([row] * 3)
