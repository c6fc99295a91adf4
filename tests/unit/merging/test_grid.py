"""Kinds of adapters on real architectures, with embedding and head tied and not tied."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from weightsmith.core.errors import InputRefused

from tests.unit.merging.oracle import MakeBase, check

_USUAL = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "qwen3_moe", "mixtral", "gpt_oss")
NAMES = dict.fromkeys(_USUAL, ("v_proj", "embed_tokens", "lm_head")) | {
    "phi3": ("qkv_proj", "embed_tokens", "lm_head"),
    "gpt2": ("c_attn", "wte", "lm_head"),
    "falcon": ("query_key_value", "word_embeddings", "lm_head"),
    "bert": ("value", "word_embeddings", "decoder"),
    "t5": ("v", "shared", "lm_head"),
}
"""Architecture -> a linear layer, the embedding, the head."""
DIFFERENT = {"llama", "gpt2", "t5"}
"""Whose layers, heads and stacks are of different shapes; the others are like one of them."""
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["LINEAR"], "use_rslora": True},
    "dora": {"target_modules": ["LINEAR"], "use_dora": True},
    "embedding": {"target_modules": ["LINEAR", "EMBEDDING"]},
    "embedding-once": {"target_modules": ["LINEAR", "EMBEDDING"], "ensure_weight_tying": True},
    "head": {"target_modules": ["HEAD"]},
    "head-dora": {"target_modules": ["HEAD"], "use_dora": True},
    "both": {"target_modules": ["EMBEDDING", "HEAD"]},
    "tokens": {"target_modules": ["LINEAR"], "trainable_token_indices": {"EMBEDDING": [1, 5]}},
    "head-tokens": {"target_modules": ["LINEAR"], "trainable_token_indices": {"HEAD": [1, 5]}},
    "saved-embedding": {"target_modules": ["LINEAR"], "modules_to_save": ["EMBEDDING"]},
    "saved-embedding-once": {
        "target_modules": ["LINEAR"],
        "modules_to_save": ["EMBEDDING"],
        "ensure_weight_tying": True,
    },
    "saved-head": {"target_modules": ["LINEAR"], "modules_to_save": ["HEAD"]},
    "saved-both": {"target_modules": ["LINEAR"], "modules_to_save": ["EMBEDDING", "HEAD"]},
}
NO_BIAS = "whose bias PEFT ignores"
SHARED = "encoder and decoder"
REFUSED = {
    ("bert", "tokens-tied"): NO_BIAS,
    **{("bert", f"head-tokens{tied}"): NO_BIAS for tied in ("-tied", "")},
    **{
        ("t5", f"{where}embedding{how}{tied}"): SHARED
        for where in ("", "saved-")
        for how in ("", "-once")
        for tied in ("-tied", "")
    },
    **{("t5", f"{kind}both{tied}"): SHARED for kind in ("", "saved-") for tied in ("-tied", "")},
}


def named(value: Any, names: tuple[str, str, str]) -> Any:
    """Put an architecture's names in the place of the roles."""
    roles = dict(zip(("LINEAR", "EMBEDDING", "HEAD"), names, strict=True))
    match value:
        case str():
            return roles.get(value, value)
        case list():
            return [named(item, names) for item in value]
        case dict():
            return {named(key, names): named(item, names) for key, item in value.items()}
    return value


@pytest.mark.grid(12)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in DIFFERENT)) for name in NAMES],
)
def test_merged_as_unmerged(
    architecture: str, kind: str, tied: bool, bases: MakeBase, tmp_path: Path
) -> None:
    base = bases(architecture, tie_word_embeddings=tied)
    lora = named(KINDS[kind], NAMES[architecture])

    reason = REFUSED.get((architecture, kind + "-tied" * tied))
    with pytest.raises(InputRefused, match=reason) if reason else nullcontext():
        check(base, architecture, tmp_path, lora)


OTHERS = {
    "distilbert": ("v_lin", "word_embeddings", "vocab_projector"),
    "albert": ("value", "word_embeddings", "predictions.decoder"),
    "electra": ("value", "word_embeddings", "generator_lm_head"),
    "deberta": ("value_proj", "word_embeddings", "predictions.decoder"),
    "modernbert": ("Wqkv", "tok_embeddings", "decoder"),
    "mamba": ("x_proj", "embeddings", "lm_head"),
    "bart": ("v_proj", "shared", "lm_head"),
}
"""As `NAMES`: what other models call the head that shares the embedding's weight."""


@pytest.mark.slow
@pytest.mark.grid(3)
@pytest.mark.parametrize("kind", ["embedding", "head", "saved-embedding", "linear"])
@pytest.mark.parametrize("architecture", OTHERS)
def test_heads_of_other_names(
    architecture: str, kind: str, bases: MakeBase, tmp_path: Path
) -> None:
    lora = named(KINDS[kind], OTHERS[architecture])
    if architecture == "mamba" and kind != "linear":
        # PEFT refuses Mamba's projections beside others.
        lora = {name: value for name, value in lora.items() if name != "target_modules"}
        targets = {"embedding": ["embeddings"], "head": ["lm_head"], "saved-embedding": ["x_proj"]}
        lora["target_modules"] = targets[kind]
    refused = architecture == "bart" and "embedding" in kind
    with pytest.raises(InputRefused, match=SHARED) if refused else nullcontext():
        check(bases(architecture), architecture, tmp_path, lora)
