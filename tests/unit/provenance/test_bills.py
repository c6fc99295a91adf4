"""The bill of materials says where a model comes from and how it did, the same every time."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit

import pytest
from weightsmith.core.resources import engine_source
from weightsmith.core.values import Digest, FileEntry, Json, Score
from weightsmith.provenance.bills import Ancestor, BilledModel, engine_bom, license_of, ml_bom
from weightsmith.recipe.schema import Card

DIGEST = Digest.of(b"x")


def facts(**more: Json) -> BilledModel:
    given: dict[str, Json] = {
        "name": "bot",
        "version": "1.2.0",
        "digest": DIGEST,
        "files": [FileEntry(path="m.gguf", size=1, digest=DIGEST)],
        "format": "q4_k_m",
        "model_type": "llama",
        "architecture": "LlamaForCausalLM",
        "license": "apache-2.0",
        "ancestors": [
            Ancestor(name="base", pin="hf://a/b@c", digest=DIGEST, license="apache-2.0"),
            Ancestor(name="v3", pin="sha", digest=DIGEST, version="v3", license="llama3"),
        ],
        "scores": {"image": Score(score=0.97, n=33, metric="contains")},
        "card": Card(description="Answers.", intended_use="Support.", limitations="English."),
        **more,
    }
    return BilledModel(**given)


def test_what_it_says():
    bill = ml_bom(facts())
    model = bill["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    assert model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert [a["name"] for a in model["pedigree"]["ancestors"]] == ["base", "v3"]
    assert model["pedigree"]["ancestors"][1]["licenses"] == [{"license": {"name": "llama3"}}]
    card = model["modelCard"]
    assert card["modelParameters"]["modelArchitecture"] == "LlamaForCausalLM"
    metric = {"type": "contains", "value": "0.9700", "slice": "image, 33"}
    assert card["quantitativeAnalysis"]["performanceMetrics"] == [metric]
    assert card["considerations"]["useCases"] == ["Support."]
    assert bill["components"][0]["hashes"] == [{"alg": "SHA-256", "content": DIGEST.hex}]
    # What it was made from does not state its licence.
    assert "licenses" not in ml_bom(facts(license=""))["metadata"]["component"]


def test_the_same_model_has_the_same_bill():
    assert ml_bom(facts()) == ml_bom(facts())
    assert ml_bom(facts())["serialNumber"] != ml_bom(facts(version="2"))["serialNumber"]


def test_an_engine_of_our_own():
    source = engine_source("llamacpp")
    bill = engine_bom("llamacpp", source, DIGEST)
    assert source["llama_cpp"]["commit"] in bill["metadata"]["component"]["purl"]
    assert {row["name"] for row in bill["components"]} == set(source["compiler"])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\ntags: [a]\n---\n# X\n", "mit"),
        ("---\nlicense: [mit]\n---\n", ""),
        ("---\n: [\n---\n", ""),
        ("# no card", ""),
    ],
)
def test_a_licence_from_a_model_card(tmp_path, text, found):
    (tmp_path / "README.md").write_text(text)
    assert license_of(tmp_path) == found
    assert license_of(tmp_path / "none") == ""


def test_all_of_cyclonedx_is_kept():
    """Held against the schema where the library that has it is installed."""
    validation = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    check = validation.JsonStrictValidator(schema.SchemaVersion.V1_6)
    for bill in (ml_bom(facts()), engine_bom("llamacpp", engine_source("llamacpp"), DIGEST)):
        assert check.validate_str(json.dumps(bill)) is None
        assert all(urlsplit(url).netloc and url.isascii() for url in urls(bill))


def urls(value: Any) -> list[str]:
    """Return the addresses in a bill; the library checks their form only where it has a grammar."""
    if isinstance(value, list):
        return [url for inner in value for url in urls(inner)]
    if not isinstance(value, dict):
        return []
    own = [value["url"]] if isinstance(value.get("url"), str) else []
    return [*own, *(url for inner in value.values() for url in urls(inner))]
