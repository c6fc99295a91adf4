"""SPDX of a model, held against the bindings that its makers generate from the specification."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from weightsmith.core.values import Digest
from weightsmith.provenance.spdx import spdx_document

from tests.unit.provenance.test_bills import facts

DATE = "2026-01-01T00:00:00Z"


def read(document: Any, folder: Path) -> Any:
    """Return all objects of a document; raises if one lacks something, or has something else."""
    model = pytest.importorskip("spdx_python_model", reason="spdx-python-model is not installed")
    (folder / "x.json").write_text(json.dumps(document))
    bindings, objects = model.load(folder / "x.json")
    bindings.JSONLDSerializer().write(objects, io.BytesIO())  # checks what each class must have
    return bindings, objects


@pytest.mark.parametrize("more", [{}, {"license": ""}, {"scores": {}, "ancestors": []}])
def test_its_makers_read_it(tmp_path: Path, more: Any) -> None:
    _, objects = read(spdx_document(facts(**more), DATE), tmp_path)
    assert not objects.missing_ids - {f"{NOTHING}NoAssertionLicense"}


NOTHING = "https://spdx.org/rdf/3.0.1/terms/ExpandedLicensing/"


def test_a_fault_in_it_would_be_found(tmp_path: Path) -> None:
    for where, key, value in ((-1, "relationshipType", "loves"), (3, "ai_nothing", 1)):
        document: Any = spdx_document(facts(), DATE)
        document["@graph"][where][key] = value
        with pytest.raises((ValueError, KeyError, TypeError)):
            read(document, tmp_path)


def test_what_it_says(tmp_path: Path) -> None:
    """The model, what it was made from with its licences, its files, and how it was tested."""
    bindings, objects = read(spdx_document(facts(), DATE), tmp_path)
    packages = {one.name: one for one in objects.foreach_type(bindings.ai_AIPackage)}
    model = packages["bot"]
    assert {*packages} == {"bot", "base", "v3"}
    assert model.software_packageVersion == "1.2.0"
    assert model.ai_informationAboutApplication == "Support."
    assert model.ai_limitation == "English."
    assert [*model.ai_typeOfModel] == ["llama", "LlamaForCausalLM"]
    assert [(one.key, one.value) for one in model.ai_metric] == [
        ("image: contains, n=33", "0.9700")
    ]
    (whole,) = model.verifiedUsing
    assert f"sha256:{whole.hashValue}" == Digest.of(b"x")
    related = {
        (str(one.relationshipType).rpartition("/")[2], getattr(one.from_, "name", ""),
         getattr(to, "name", "") or getattr(to, "simplelicensing_licenseExpression", ""))
        for one in objects.foreach_type(bindings.Relationship)
        for to in one.to
    }  # fmt: skip
    assert related == {
        ("hasDeclaredLicense", "bot", "Apache-2.0"),
        ("hasDeclaredLicense", "base", "Apache-2.0"),
        ("hasDeclaredLicense", "v3", "LicenseRef-llama3"),
        ("ancestorOf", "base", "bot"),
        ("ancestorOf", "v3", "bot"),
        ("contains", "bot", "m.gguf"),
        ("testedOn", "bot", "questions to bot"),
    }


def test_the_same_model_has_the_same_document() -> None:
    assert spdx_document(facts(), DATE) == spdx_document(facts(), DATE)
    other = spdx_document(facts(version="2"), DATE)
    assert not _ids(other) & _ids(spdx_document(facts(), DATE))


def _ids(document: Any) -> set[str]:
    return {one["spdxId"] for one in document["@graph"] if "spdxId" in one}
