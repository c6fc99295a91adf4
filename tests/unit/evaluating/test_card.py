"""A model's card: its metadata by the hub's names, and nothing that a name could break."""

from __future__ import annotations

from typing import Any

import huggingface_hub
import pytest
import yaml
from weightsmith.evaluating.build_record import ScoreRecord
from weightsmith.evaluating.card import ModelCard, Parent, card_of_labels
from weightsmith.evaluating.pages import model_card

COMMIT = "a" * 40
BASE = Parent(name="hf://acme/base", pin=f"hf://acme/base@{COMMIT}")
ADAPTER = Parent(name="support-v3", pin=f"sha256:{'1' * 64}", version="v3", run_id="run/1")


def text(**facts: Any) -> str:
    files = facts.pop("files", ["config.json", "model.safetensors"])
    return model_card(ModelCard(**{"name": "bot"} | facts), "acme/bot", files)


def front(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---")[1])
    return found


@pytest.mark.parametrize(
    ("facts", "relation"),
    [
        ({"adapters": (ADAPTER,), "quantized": True}, "finetune"),
        ({"adapters": (ADAPTER,)}, "finetune"),
        ({"quantized": True}, "quantized"),
    ],
)
def test_a_base_on_the_hub_is_linked(facts: dict[str, Any], relation: str) -> None:
    card = text(base=BASE, method="sequential", format="awq", **facts)

    assert front(card)["base_model"] == ["acme/base"]
    assert front(card)["base_model_relation"] == relation
    assert f"| base | [acme/base](https://huggingface.co/acme/base) | {COMMIT} |" in card


def test_adapters_on_the_hub_are_linked_beside_the_base() -> None:
    adapters = (ADAPTER, Parent(name="hf://team/a", pin=f"hf://team/a@{COMMIT}"))
    card = text(base=BASE, adapters=adapters, method="sequential")

    data = huggingface_hub.ModelCard(card).data
    assert data.base_model == ["acme/base", "team/a"]
    assert data.to_dict()["base_model_relation"] == "merge"


def test_a_base_from_elsewhere_is_named_only_and_scores_have_intervals() -> None:
    scores = {"image": ScoreRecord(score=1.0, n=33, metric="contains")}
    base = Parent(name="base", pin="sha256:1")
    card = text(base=base, adapters=(ADAPTER,), method="ties", scores=scores, verdict="passed")

    assert "| image | 33 of 33 | 1.000 | 0.90 to 1.00 |" in card
    assert "Verdict: **passed**." in card
    assert "base_model" not in front(card)
    assert "| base | base | sha256:1 |" in card
    assert f"| adapter v3 | support-v3 | {ADAPTER.pin}, run run/1 |" in card
    assert "base with the adapter merged into its weights (ties)" in card


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("llama3", {"license": "llama3"}),
        (
            "ACME Research License 1",
            {"license": "other", "license_name": "acme-research-license-1"},
        ),
        ("", {}),
    ],
)
def test_a_licence_that_the_hub_does_not_know_has_a_name(said: str, expected: Any) -> None:
    found = front(text(license=said))
    assert {key: found[key] for key in found if key.startswith("license")} == expected


@pytest.mark.parametrize("name", ["# x", "a | b", "---", "[x](http://evil)", "<script>", "a\n\nb"])
def test_no_text_breaks_the_card(name: str) -> None:
    plain = text()
    card = text(description=name, limitations=name, license=name)

    assert front(card).keys() - {"license", "license_name"} == front(plain).keys()
    assert "<script>" not in card
    assert "](http://evil" not in card
    assert "\n# x" not in card


def test_labels_say_as_much_as_they_have() -> None:
    prefix = "dev.weightsmith."
    labels = {
        "org.opencontainers.image.title": "bot",
        f"{prefix}base.pin": BASE.pin,
        f"{prefix}adapter.0.pin": f"hf://acme/lora@{COMMIT}",
        f"{prefix}adapter.0.version": "v3",
        f"{prefix}adapter.1.pin": "sha256:2",
        f"{prefix}merge.method": "ties",
        f"{prefix}format": "q4_k_m",
        f"{prefix}score.image": "0.5000 exact n=4",
        f"{prefix}score.base": "who knows",
    }
    card = card_of_labels("x", labels, prefix, license_="mit", context=512, image="sha256:3")

    assert [parent.hub for parent in card.adapters] == ["acme/lora", ""]
    assert card.scores["image"] == ScoreRecord(score=0.5, n=4, metric="exact")
    assert "base" not in card.scores
    found = card_of_labels(
        "x", {f"{prefix}score.image": "0.5000 rerank n=4"}, prefix, license_="", context=0, image=""
    )
    assert found.scores["image"].right is None, "queries are more than right or wrong"
    assert card.quantized
    assert card.method == "ties"


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ({"score.image": "0.5000 exact n=4"}, "sha256:3"),
        ({"score.image": "0.5000 exact n=4", "tested.image": "sha256:4"}, "sha256:4"),
        ({"score.image": "0.5000 exact n=4", "tested.platform": "linux/amd64"}, ""),
        ({"score.image": "0.5000 exact n=4", "rebased.from": "sha256:4"}, ""),
        (
            {"score.image": "1 exact n=4", "rebased.from": "sha256:5", "tested.image": "sha256:4"},
            "sha256:4",
        ),
        ({"score.base": "0.5000 exact n=4"}, ""),
    ],
)
def test_only_an_image_that_was_asked_is_named(labels: dict[str, str], named: str) -> None:
    prefix = "dev.weightsmith."
    own = {prefix + key: text for key, text in labels.items()}
    card = card_of_labels("x", own, prefix, license_="", context=0, image="sha256:3")

    assert card.image == named
    assert bool(card.unproven) is ("rebased.from" in labels and bool(named))


@pytest.mark.parametrize(
    ("files", "tag"),
    [
        (["config.json", "model.safetensors"], "text-generation"),
        (["config.json", "model.safetensors", "preprocessor_config.json"], "image-text-to-text"),
        (["model.gguf", "processor_config.json"], "text-generation"),
        (["model.gguf", "mmproj-model.gguf"], "image-text-to-text"),
    ],
)
def test_the_hub_lists_a_model_by_what_it_reads(files: list[str], tag: str) -> None:
    card = text(files=files, license="MIT", base=BASE)
    assert front(card)["pipeline_tag"] == tag
    # The hub's own reader of cards.
    assert huggingface_hub.ModelCard(card).data.to_dict() == front(card)
