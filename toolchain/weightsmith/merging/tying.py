"""Tied embeddings and heads: find the shared weight.

If an adapter changes one use of a shared tensor, the checkpoint gets a second one, and the other
use keeps its values. Changing both, as `merge_and_unload` does, gave an error larger than the
logits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from weightsmith.merging.outputs import StoredTensor, TensorSource

EMBEDDINGS = (
    *("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "shared"),
    *("embeddings", "tokens_embed", "word_embedding", "w"),
)
HEADS = ("lm_head", "embed_out", "output_layer")
_TABLE = "tied_heads.json"
_NEVER_TIED = frozenset({"BigBirdPegasusForCausalLM", "CpmAntForCausalLM"})
"""Classes that tie nothing (`_tied_weights_keys`), although their configuration says so."""
_NOT_WRITTEN = frozenset(
    {
        *("LukeForMaskedLM", "T5Gemma2ForConditionalGeneration", "UdopForConditionalGeneration"),
        *("ZambaForCausalLM", "Zamba2ForCausalLM", "DiffusionGemmaForBlockDiffusion"),
    }
)
"""Classes with further tied tensors, which would have to be untied along with the head."""
_SEAMLESS = ("shared", "lm_head", "text_decoder.embed_tokens")
_OWN: dict[str, tuple[str, ...]] = {
    "LukeForMaskedLM": (
        "luke.entity_embeddings.entity_embeddings",
        "entity_predictions.decoder",
    ),
    "Pix2StructForConditionalGeneration": ("decoder.embed_tokens", "decoder.lm_head"),
    "Kosmos2_5ForConditionalGeneration": ("text_model.model.embed_tokens", "text_model.lm_head"),
    "ShieldGemma2ForImageClassification": (
        "model.model.language_model.embed_tokens",
        "model.lm_head",
    ),
    "BlipForQuestionAnswering": (
        "text_decoder.bert.embeddings.word_embeddings",
        "text_decoder.cls.predictions.decoder",
    ),
    "FSMTForConditionalGeneration": (
        "model.decoder.embed_tokens",
        "model.decoder.output_projection",
        "model.encoder.embed_tokens",
    ),
    "ProphetNetForCausalLM": (
        "prophetnet.word_embeddings",
        "lm_head",
        "prophetnet.decoder.word_embeddings",
    ),
    "ProphetNetForConditionalGeneration": (
        "prophetnet.word_embeddings",
        "lm_head",
        "prophetnet.encoder.word_embeddings",
        "prophetnet.decoder.word_embeddings",
    ),
    **{
        f"SeamlessM4T{version}{kind}": (*_SEAMLESS, *more)
        for version in ("", "v2")
        for kind, more in (
            ("ForTextToText", ("text_encoder.embed_tokens",)),
            ("ForSpeechToText", ()),
        )
    },
}
"""Classes whose tied tensors have names of their own: embedding, head, further tables."""
_LOOSE = re.compile(
    r"(?:Pix2Struct|Kosmos2_5|FSMT|Luke|Blip2|InstructBlip(?:Video)?|ProphetNet|SeamlessM4T(?:v2)?)For.*"
    r"|Blip2Model|BlipForQuestionAnswering|ShieldGemma2.*|Marian.*"
)
"""Classes whose head does not follow tokens that PEFT trains.

PEFT goes by the whole class's `_tied_weights_keys` and by `get_input_embeddings()`; these have the
one in a part, or the other elsewhere.
"""
_AMBIGUOUS = "output"
"""A head's name (GIT's) that other layers have, too."""
_WITH_HEAD = (
    *("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining", "GenerationDecoder"),
    *("DoubleHeadsModel", "ForSpeechToText", "ForTextToText", "ForVisionText2Text", "MTModel"),
    "Blip2Model",  # and others whose text model has its head
)


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
    follows: bool = True
    """False if PEFT does not apply tokens trained for the embedding to the head too."""


def is_embedding(module: str) -> bool:
    """Return whether a module is an embedding."""
    return module.rpartition(".")[2] in EMBEDDINGS


def is_head(module: str) -> bool:
    """Return whether a module is a head."""
    return module.rpartition(".")[2] in HEADS or f".{module}".endswith(_endings())


def find_tie(
    config: Mapping[str, object],
    names: Mapping[str, object],
    loaded: Mapping[str, str] | None = None,
) -> Tie | None:
    """Return the shared weight of a model with tied embeddings, or None.

    transformers ties if `tie_word_embeddings` is true, unless the file has both (`stored_apart`); a
    checkpoint without a head's weight can only be tied. If config.json does not set it, the class
    decides. `loaded` has the tensors that transformers renames: name in the model -> in the file.
    """
    renamed = loaded or {}
    part = config.get("decoder")
    if isinstance(part, dict) and _kind(config).endswith("encoder-decoder"):
        return _tie_of_decoder(part, names)
    kinds, with_head = _classes(config), has_head(config)
    own = next((_OWN[kind] for kind in kinds if kind in _OWN), ())
    # A part that reads pictures for a text model may have words of its own.
    embeddings = [n for n in _tables(names) if not n.startswith("qformer.")]
    embeddings = embeddings or [renamed[name] for name in _tables(renamed)]
    heads = _heads(config, names) or [renamed[name] for name in _heads(config, renamed)]
    if own:
        table, *ends = (f"{name}.weight" for name in own)
        embeddings, heads = [n for n in names if n == table], [n for n in ends[:1] if n in names]
    text = config.get("text_config")
    nested = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    told = config.get("tie_word_embeddings", nested)
    tied = _default(config)[1] if told is None else bool(told)
    if not embeddings or not (with_head or own) or not (tied or not heads):
        return None
    if _NEVER_TIED & {*kinds}:
        return None
    embedding = min(embeddings, key=lambda name: (name.count("."), name))
    outer = "language_model." if embedding.startswith("language_model.model.") else ""
    head = heads[0] if heads else f"{own[1] if own else outer + _default(config)[0]}.weight"
    bias, outer = f"{head.removesuffix('.weight')}.bias", head.rpartition(".decoder.")[0]
    # BERT's decoder also has a second name for the head's bias.
    twice = head.endswith(".decoder.weight") and f"{outer}.bias" in names and bias not in names
    also: tuple[tuple[str, str], ...] = ((bias, f"{outer}.bias"),) if twice else ()
    causal = not kinds or any("CausalLM" in kind or "LMHead" in kind for kind in kinds)
    shares = bool(config.get("is_encoder_decoder"))  # their head is `lm_head`
    known = bool(heads or own) or causal or _kind(config) in _table() or shares
    known = known and not _NOT_WRITTEN & {*kinds}
    outer = embedding.removesuffix("shared.weight")
    further = [f"{name}.weight" for name in own[2:]]
    if not own and shares and outer != embedding and "t5" not in str(config.get("model_type", "")):
        # Encoder's and decoder's embeddings are untied with the head, but T5's class ties them.
        further = [f"{outer}{stack}.embed_tokens.weight" for stack in ("encoder", "decoder")]
    also += tuple((table, embedding) for table in further if table not in names)
    if _kind(config) == "neomme" and "unembedding_projection.weight" not in names:
        # What widens its embedding's rows narrows the head's.
        end = ".embedding_projection.weight"
        also += tuple(("unembedding_projection.weight", n) for n in names if n.endswith(end))
    follows = not any(map(_LOOSE.fullmatch, kinds))
    return Tie(embedding=embedding, head=head, also=also, known=known, follows=follows)


def _tie_of_decoder(config: Mapping[str, object], names: Mapping[str, object]) -> Tie | None:
    """Return the tie inside the decoder of a model that is put together of two.

    It is not untied: the flag is in the decoder's part of config.json.
    """
    start = "decoder."
    found = find_tie(config, {n.removeprefix(start): n for n in names if n.startswith(start)})
    if found is None:
        return None
    return Tie(
        embedding=start + found.embedding, head=start + found.head, known=False, follows=False
    )


def stored_apart(tie: Tie, sources: Mapping[str, TensorSource]) -> bool:
    """Return whether the base has different weights for embedding and head.

    transformers then does not tie them (`PreTrainedModel.tie_weights`).
    """
    head, embedding = sources.get(tie.head), sources[tie.embedding]
    # A tensor of another shape only has a head's name.
    if head is None or head.shape != embedding.shape:
        return False
    if not (isinstance(head, StoredTensor) and isinstance(embedding, StoredTensor)):
        return True
    return not head.same_bytes(embedding)


def has_head(config: Mapping[str, object]) -> bool:
    """Return whether the model's class has a head; True if the class is unknown."""
    kinds = _classes(config)
    return not kinds or any(
        kind.endswith(_WITH_HEAD) or "ConditionalGeneration" in kind for kind in kinds
    )


def _classes(config: Mapping[str, object]) -> list[str]:
    listed = config.get("architectures")
    return [str(kind) for kind in listed] if isinstance(listed, list) else []


def _tables(names: Iterable[str]) -> list[str]:
    return [n for n in names if n.endswith(".weight") and is_embedding(n.removesuffix(".weight"))]


def _heads(config: Mapping[str, object], names: Mapping[str, object]) -> list[str]:
    """Return the tensors of heads: the class's own if the file has it.

    A model whose head has a name of its own, or is of no known type, may have one of another name.
    """
    own = f".{_default(config)[0]}.weight"
    listed = [name for name in names if f".{name}".endswith(own)]
    if not listed and _default(config)[0] == "lm_head":
        return [name for name in names if name.removesuffix(".weight").endswith(HEADS)]
    return listed or [name for name in names if is_head(name.removesuffix(".weight"))]


def _kind(config: Mapping[str, object]) -> str:
    return str(config.get("model_type", ""))


def _default(config: Mapping[str, object]) -> tuple[str, bool]:
    """Return the name of the class's head, and whether it is tied if config.json does not say."""
    return _table().get(_kind(config), ("lm_head", False))


@cache
def _table() -> dict[str, tuple[str, bool]]:
    """Return model type -> head and whether it is tied by default.

    Those with `lm_head` and not tied are left out, but for models that see or hear, or fill gaps.
    A test compares the file with transformers, whose older configurations omit defaults.
    """
    text = resources.files(__package__).joinpath(_TABLE).read_text("utf-8")
    return {kind: (head, tied) for kind, (head, tied) in json.loads(text).items()}


@cache
def _endings() -> tuple[str, ...]:
    return tuple({f".{head}" for head, _ in _table().values() if head != _AMBIGUOUS})
