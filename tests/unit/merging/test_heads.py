"""Heads and embeddings: which are tied, and what an adapter on either leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from weightsmith.core.errors import InputRefused

from tests.unit.merging.tensors import close, delta, random, run


def test_a_head_that_the_base_has_not_is_refused(tmp_path: Path) -> None:
    base = {"model.q.weight": random(4, 4)}
    adapter = {
        "model.q.lora_A.weight": random(2, 4),
        "model.q.lora_B.weight": random(4, 2),
        "score.weight": random(3, 4),
    }

    with pytest.raises(InputRefused, match=r"has score\.weight, which the base does not have"):
        run(tmp_path, base, adapter, {"target_modules": ["q"], "modules_to_save": ["score"]})


@pytest.mark.parametrize(
    ("config", "head", "untied"),
    [
        ({"model_type": "gpt2"}, False, True),
        ({"model_type": "gemma2"}, True, True),
        ({"model_type": "llama"}, True, False),
        ({"model_type": "llama", "tie_word_embeddings": True}, True, True),
        ({"model_type": "llama", "tie_word_embeddings": False}, True, False),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, False, None),
    ],
)
def test_what_counts_as_tied(
    config: dict[str, Any], head: bool, untied: bool | None, tmp_path: Path
) -> None:
    """An adapter on the embedding alone leaves the head as it was, whoever ties it."""
    name, words = "model.embed_tokens", random(8, 4)
    own = words.clone() if untied else words + 1
    base = {f"{name}.weight": words} | ({"lm_head.weight": own} if head else {})
    a, b = random(2, 8), random(4, 2)

    found = run(
        tmp_path,
        base,
        {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b},
        {"target_modules": ["embed_tokens"]},
        **config,
    )

    close(found[f"{name}.weight"], words.double() + delta(a, b).T)
    assert ("lm_head.weight" in found) == (untied is not None)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    if untied is not None:
        assert torch.equal(found["lm_head.weight"], own)
        assert told["tie_word_embeddings"] is False


def test_both_pairs_of_a_head_are_untied(tmp_path: Path) -> None:
    """NeoMME's head also shares what projects the embedding's rows."""
    words, wide = "model.embed_tokens.word_embeddings", random(4, 4)
    base = {f"{words}.weight": random(8, 4), "model.embed_tokens.embedding_projection.weight": wide}
    a, b = random(2, 8), random(4, 2)

    found = run(
        tmp_path,
        base,
        {f"{words}.lora_embedding_A": a, f"{words}.lora_embedding_B": b},
        {"target_modules": ["word_embeddings"]},
        model_type="neomme",
        tie_word_embeddings=True,
        architectures=["NeoMMEForMaskedLM"],
    )

    close(found[f"{words}.weight"], base[f"{words}.weight"].double() + delta(a, b).T)
    assert torch.equal(found["lm_head.weight"], base[f"{words}.weight"])
    assert torch.equal(found["unembedding_projection.weight"], wide)


def test_a_head_that_computes_with_more_than_its_weight_is_refused(tmp_path: Path) -> None:
    base = {"model.q.weight": random(4, 4), "lm_head.weight": random(8, 4)}
    adapter = {"lm_head.lora_A.weight": random(2, 4), "lm_head.lora_B.weight": random(8, 2)}

    with pytest.raises(InputRefused, match="also computes with logit_scale"):
        run(
            tmp_path,
            base | {"lm_head.logit_scale": random(1)},
            adapter,
            {"target_modules": ["lm_head"]},
        )


@pytest.mark.parametrize("changed", ["head", "embed"])
@pytest.mark.parametrize(
    ("kind", "embedding", "stored"),
    [
        ("deepseek_v4", "model.embed_tokens", {"head": "head", "embed": "model.embed_tokens"}),
        (
            "mistral_large4",
            "model.language_model.embed_tokens",
            {"head": "output", "embed": "tok_embeddings"},
        ),
    ],
)
def test_a_head_that_the_base_stores_under_another_name_is_not_tied(
    kind: str, embedding: str, stored: dict[str, str], changed: str, tmp_path: Path
) -> None:
    base = {f"{name}.weight": random(8, 4) + n for n, name in enumerate(stored.values())}
    a, b = random(2, 4), random(8, 2)
    factors = {"head": {"lm_head.lora_A.weight": a, "lm_head.lora_B.weight": b}}
    tables = {f"{embedding}.lora_embedding_A": b.T, f"{embedding}.lora_embedding_B": a.T}
    factors["embed"] = tables

    found = run(
        tmp_path,
        base,
        factors[changed],
        {"target_modules": [{"head": "lm_head", "embed": "embed_tokens"}[changed]]},
        model_type=kind,
        tie_word_embeddings=False,
    )

    target = f"{stored[changed]}.weight"
    assert found.keys() == base.keys()
    close(found.pop(target), base[target].double() + delta(a, b))
    assert all(torch.equal(values, base[other]) for other, values in found.items())


@pytest.mark.parametrize(
    ("name", "config", "what"),
    [
        (
            "word_embeddings",
            {"architectures": ["NewForMaskedLM"]},
            "name of this model's head is unknown",
        ),
        ("words", {"architectures": ["NewForCausalLM"]}, "may be an embedding tied to the head"),
    ],
)
def test_models_whose_head_is_not_known_are_refused(
    name: str, config: dict[str, Any], what: str, tmp_path: Path
) -> None:
    """A guess would be a tensor that no class loads, and a head that changes with the embedding."""
    base = {f"new.{name}.weight": random(8, 4)}
    adapter = {
        f"new.{name}.lora_embedding_A": random(2, 8),
        f"new.{name}.lora_embedding_B": random(4, 2),
    }

    with pytest.raises(InputRefused, match=what):
        run(
            tmp_path,
            base,
            adapter,
            {"target_modules": [name]},
            model_type="new",
            vocab_size=8,
            **config,
        )
