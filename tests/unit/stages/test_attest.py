"""Statements name what a step ran in: the builder's pins, and its image where there was one."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolchain.oci.image import ImageConfig, assemble
from toolchain.provenance.statements import kind_of
from toolchain.recipe_file import check_recipe
from toolchain.stages.attest import Made, evidence
from toolchain.values import (
    SAFETENSORS,
    AdapterSnapshot,
    Artifact,
    Checkpoint,
    Digest,
    FileEntry,
    Snapshot,
    Sources,
    Tree,
)

IMAGE = "sha256:" + "5" * 64


def tree(folder: Path, name: str) -> Tree:
    (folder / name).write_text(name)
    entry = FileEntry(path=name, size=len(name), digest=Digest.of(name.encode()))
    return Tree(root=folder, files=(entry,))


@pytest.mark.parametrize("details", [{}, {"builder_image": IMAGE}])
def test_the_builder_of_a_merge(details: dict[str, str], tmp_path: Path) -> None:
    merged = tree(tmp_path, "merged")
    artifact = Artifact(format=SAFETENSORS, tree=merged, made_from=())
    base, adapter = (
        Snapshot(tree=tree(tmp_path, name), source="./x", pin="x", pinned=False)
        for name in ("base", "adapter")
    )
    made = Made(
        image=assemble((), (), config=ImageConfig(), epoch=0),
        artifact=artifact,
        served=artifact,
        base=None,
        base_name="",
        name="x",
        version="1",
        parameters={},
        sources=Sources(base=base, adapters=(AdapterSnapshot(snapshot=adapter),)),
        checkpoint=Checkpoint(tree=merged, made_from=(), details=details),
        recipe=check_recipe({"name": "x", "base": {"source": "./x"}}, "test"),
    )

    (told,) = [one for one in evidence(made).statements if kind_of(one) == "merge"]

    rows = told["predicate"]["runDetails"]["builder"]["builderDependencies"]
    found = {row["name"]: row["digest"]["sha256"] for row in rows}
    assert len(found.pop("builder:merge")) == 64
    assert found == ({"builder image:merge": "5" * 64} if details else {})
