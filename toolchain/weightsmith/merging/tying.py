"""Embeddings and heads that share one weight: which tensor, and what a model without a head is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

EMBEDDINGS = (
    *("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared"),
    "embeddings",
)
HEADS = ("lm_head", "embed_out", "output_layer")
_HEAD_NAMES = {
    "gpt_neox": "embed_out",
    **dict.fromkeys(("bert", "deberta", "deberta-v2", "mobilebert"), "cls.predictions.decoder"),
    "albert": "predictions.decoder",
    "distilbert": "vocab_projector",
    "electra": "generator_lm_head",
    "modernbert": "decoder",
    "roberta": "lm_head.decoder",
    "xlm-roberta": "lm_head.decoder",
}
_TIED_MODELS = (
    *("gpt2", "gemma", "gemma2", "gemma3", "gemma3_text", "falcon", "bloom", "opt", "mpt"),
    *("cohere", "cohere2", "t5", "bert", "roberta"),
)
"""Models whose class ties where config.json does not say: older files leave defaults out."""
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """A weight that the model uses twice: to look tokens up, and to score them."""

    embedding: str
    """The base tensor's name."""
    head: str
    """The name that the head's own weight has, or would have."""
    also: tuple[tuple[str, str], ...] = ()
    """More tensors that are tied with it: (name when untied, base tensor)."""
    known: bool = True
    """False where the head's name is a guess, so that it cannot be written."""


def is_embedding(module: str) -> bool:
    """Say whether a module looks tokens up."""
    return module.rpartition(".")[2] in EMBEDDINGS


def is_head(module: str) -> bool:
    """Say whether a module scores tokens."""
    last = module.rpartition(".")[2]
    return last in HEADS or any(f".{module}".endswith(f".{name}") for name in _HEAD_NAMES.values())


def find_tie(config: Mapping[str, object], names: Mapping[str, object]) -> Tie | None:
    """Return the shared weight of a model with tied embeddings, or None.

    transformers ties where `tie_word_embeddings` is true, whatever the file holds; a checkpoint
    without a head's weight can only be tied. Where config.json is silent, the class decides.
    """
    embeddings = [name for name in names if is_embedding(name.removesuffix(".weight"))]
    embeddings = [name for name in embeddings if name.endswith(".weight")]
    kinds, with_head = _classes(config), has_head(config)
    heads = [name for name in names if is_head(name.removesuffix(".weight"))]
    if not embeddings or not with_head or not (_flag(config) or not heads):
        return None
    embedding = min(embeddings, key=lambda name: (name.count("."), name))
    head = heads[0] if heads else _head_name(config, embedding)
    bias, outer = f"{head.removesuffix('.weight')}.bias", head.rpartition(".decoder.")[0]
    # BERT's decoder has a second name for the head's bias too.
    twice = head.endswith(".decoder.weight") and f"{outer}.bias" in names and bias not in names
    also: tuple[tuple[str, str], ...] = ((bias, f"{outer}.bias"),) if twice else ()
    causal = not kinds or any("CausalLM" in kind or "LMHead" in kind for kind in kinds)
    listed_type = str(config.get("model_type", "")) in _HEAD_NAMES or _shares(config)
    known = bool(heads) or causal or listed_type
    also += _stacks(config, embedding, names)
    return Tie(embedding=embedding, head=head, also=also, known=known)


def has_head(config: Mapping[str, object]) -> bool:
    """Say whether the model's class scores tokens; one that is not named may."""
    kinds = _classes(config)
    return not kinds or any(
        kind.endswith(_WITH_HEAD) or "ConditionalGeneration" in kind for kind in kinds
    )


def _classes(config: Mapping[str, object]) -> list[str]:
    listed = config.get("architectures")
    return [str(kind) for kind in listed] if isinstance(listed, list) else []


def _shares(config: Mapping[str, object]) -> bool:
    """Say whether encoder and decoder share a table; the head above them is `lm_head`."""
    return bool(config.get("is_encoder_decoder"))


def _stacks(
    config: Mapping[str, object], embedding: str, names: Mapping[str, object]
) -> tuple[tuple[str, str], ...]:
    """Return the tables of encoder and decoder, which an untied head takes with it.

    Not those of T5's kin, whose class ties them whatever config.json says.
    """
    outer = embedding.removesuffix("shared.weight")
    if not _shares(config) or outer == embedding or "t5" in str(config.get("model_type", "")):
        return ()
    tables = (f"{outer}{stack}.embed_tokens.weight" for stack in ("encoder", "decoder"))
    return tuple((table, embedding) for table in tables if table not in names)


def _flag(config: Mapping[str, object]) -> bool:
    text = config.get("text_config")
    nested = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    absent = str(config.get("model_type", "")) in _TIED_MODELS
    found = config.get("tie_word_embeddings", nested)
    return absent if found is None else bool(found)


def _head_name(config: Mapping[str, object], embedding: str) -> str:
    head = _HEAD_NAMES.get(str(config.get("model_type", "")), "lm_head")
    outer = "language_model." if embedding.startswith("language_model.model.") else ""
    return f"{outer}{head}.weight"
