"""Tied embeddings and heads: find the shared weight."""

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
"""Models tied by default: older config.json files omit defaults."""
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """A weight shared by embedding and head."""

    embedding: str
    """The base tensor's name."""
    head: str
    """The head's tensor name in the base, or after untying."""
    also: tuple[tuple[str, str], ...] = ()
    """Further tied tensors: (name when untied, base tensor)."""
    known: bool = True
    """False if the head's name is only a guess, so it cannot be written."""


def is_embedding(module: str) -> bool:
    """Return whether a module is an embedding."""
    return module.rpartition(".")[2] in EMBEDDINGS


def is_head(module: str) -> bool:
    """Return whether a module is a head."""
    last = module.rpartition(".")[2]
    return last in HEADS or any(f".{module}".endswith(f".{name}") for name in _HEAD_NAMES.values())


def find_tie(config: Mapping[str, object], names: Mapping[str, object]) -> Tie | None:
    """Return the shared weight of a model with tied embeddings, or None.

    transformers ties if `tie_word_embeddings` is true, regardless of the file; a checkpoint without
    a head's weight can only be tied. If config.json does not set it, the class decides.
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
    # BERT's decoder also has a second name for the head's bias.
    twice = head.endswith(".decoder.weight") and f"{outer}.bias" in names and bias not in names
    also: tuple[tuple[str, str], ...] = ((bias, f"{outer}.bias"),) if twice else ()
    causal = not kinds or any("CausalLM" in kind or "LMHead" in kind for kind in kinds)
    listed_type = str(config.get("model_type", "")) in _HEAD_NAMES or _shares(config)
    known = bool(heads) or causal or listed_type
    also += _stacks(config, embedding, names)
    return Tie(embedding=embedding, head=head, also=also, known=known)


def has_head(config: Mapping[str, object]) -> bool:
    """Return whether the model's class has a head; True if the class is unknown."""
    kinds = _classes(config)
    return not kinds or any(
        kind.endswith(_WITH_HEAD) or "ConditionalGeneration" in kind for kind in kinds
    )


def _classes(config: Mapping[str, object]) -> list[str]:
    listed = config.get("architectures")
    return [str(kind) for kind in listed] if isinstance(listed, list) else []


def _shares(config: Mapping[str, object]) -> bool:
    """Return whether encoder and decoder share an embedding; their head is `lm_head`."""
    return bool(config.get("is_encoder_decoder"))


def _stacks(
    config: Mapping[str, object], embedding: str, names: Mapping[str, object]
) -> tuple[tuple[str, str], ...]:
    """Return the embeddings of encoder and decoder, which are untied together with the head.

    Not those of T5 and its variants, whose class always ties them.
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
