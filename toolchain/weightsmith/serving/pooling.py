"""Models that do not chat on engines: which are served, and how vectors and scores are made.

An encoder reads a text once, all tokens together, so it keeps no keys and values. A decoder that
gives vectors or scores has the cache that it has anyway.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from weightsmith.core.errors import UsageError
from weightsmith.core.values import JsonValue
from weightsmith.models.facts import ModelFacts
from weightsmith.models.task import Kind
from weightsmith.serving.architectures import is_known_decoder

_ENCODERS = re.compile(
    r"(?:Bert|Camembert|DistilBert|ModernBert|Roberta|XLMRoberta)(?:Model|For\w+)"
    r"|bert|modern-bert"
)
"""Classes, and architectures of GGUF files, of encoders that engines here serve."""
POOLED = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
"""sentence-transformers' ways of pooling that the engines have -> llama.cpp's name."""


BY_LENGTH = frozenset({"dot", "euclidean", "manhattan"})
"""sentence-transformers' similarities for which the length of a vector counts."""


def keeps_cache(model: ModelFacts) -> bool:
    """Say whether a model keeps keys and values of what it read, as decoders do."""
    return model.task.kind == "generate" or not _ENCODERS.fullmatch(model.architecture)


def pooling_of(model: ModelFacts) -> str:
    """Return how a model's vectors are made, by sentence-transformers' name.

    Without a file that says so, as sentence-transformers does: the mean of an encoder's, else the
    last token's.
    """
    return model.task.sentence.pooling or ("lasttoken" if keeps_cache(model) else "mean")


def width_of(model: ModelFacts) -> int:
    """Return how many numbers a model's vector of a text has; 0 if that is not known."""
    dense = model.task.sentence.dense
    return dense[-1].outputs if dense else model.hidden


def lacks_vectors(model: ModelFacts) -> str:
    """Return why no engine here makes a model's vectors as sentence-transformers does, or ""."""
    sentence = model.task.sentence
    if model.sees_images or model.encoder_decoder:
        return "makes vectors of texts by encoders and decoders alone"
    if sentence.odd:
        return f"makes vectors without the module {sentence.odd}, as its modules.json has it"
    if (mode := pooling_of(model)) not in POOLED:
        return f"has no pooling {mode}; it has {', '.join(POOLED)}"
    if not sentence.includes_prompt:
        return "pools a prompt's tokens too, and this model was trained without"
    return ""


def notes_of(model: ModelFacts, *, normalizes: bool) -> list[str]:
    """Return what to know of a server for a model that does not chat.

    `normalizes` says that the engine gives every vector the length 1.
    """
    sentence, kind = model.task.sentence, model.task.kind
    notes = []
    if kind == "embed" and not sentence.pooling:
        notes.append(
            f"no file says how vectors are made: planned with {pooling_of(model)}; a modules.json"
            " of sentence-transformers beside the model says it"
        )
    if kind == "embed" and normalizes and not sentence.normalizes:
        notes.append(
            "the server gives vectors the length 1, which sentence-transformers does not for this"
            " model: their directions are the same"
        )
    if sentence.lower_case:
        notes.append("sentence-transformers makes texts lower-case first: send them so")
    if any(text for _, text in sentence.prompts):
        names = ", ".join(name for name, text in sentence.prompts if text)
        notes.append(f"prompts ({names}) are put before texts by clients: no server adds them")
    return notes


def require_no_cache_type(model: ModelFacts, wanted: str) -> None:
    """Refuse a type for a cache that a model does not have."""
    if wanted and not keeps_cache(model):
        raise UsageError(
            f"kv_cache_dtype {wanted}: {model.architecture} keeps no keys and values",
            hint="leave it out",
        )


ASKED: Mapping[Kind, tuple[str, Mapping[str, JsonValue]]] = {
    "generate": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64},
    ),
    "embed": ("/v1/embeddings", {"input": "The cat sleeps."}),
    "rerank": (
        "/v1/rerank",
        {"query": "Who sleeps?", "documents": ["The cat sleeps.", "It rains."]},
    ),
    "classify": ("/classify", {"input": "The cat sleeps."}),
    "token-classify": ("/pooling", {"input": "The cat sleeps."}),
}
"""Kind of a model -> the path of its server and the body of a request, but for the model's name."""


VLLM_CLASSES: dict[Kind, frozenset[str]] = {
    "embed": frozenset(
        {
            "BertForMaskedLM", "BertModel", "ModernBertModel", "RobertaForMaskedLM", "RobertaModel",
            "XLMRobertaModel",
        }
    ),
    "classify": frozenset(
        {
            "BertForSequenceClassification", "ModernBertForSequenceClassification",
            "RobertaForSequenceClassification", "XLMRobertaForSequenceClassification",
        }
    ),
    "token-classify": frozenset(
        {
            "BertForTokenClassification", "ModernBertForTokenClassification",
            "RobertaForTokenClassification", "XLMRobertaForTokenClassification",
        }
    ),
}  # fmt: skip
"""Encoders that vLLM has classes for (0.32 and 0.33, models/registry.py)."""


def vllm_settings(model: ModelFacts) -> dict[str, JsonValue]:
    """Return vLLM's options for a model that does not chat (0.33, config/model.py, pooler.py)."""
    kind, found = model.task.kind, dict[str, JsonValue]({"runner": "pooling"})
    if keeps_cache(model):
        found["convert"] = "embed" if kind == "embed" else "classify"
    if kind == "embed":
        # Without modules.json, vectors get the length 1 as vLLM's own default has it.
        normalizes = model.task.sentence.normalizes or not model.task.sentence.modules
        mode = POOLED[pooling_of(model)].upper()
        found["pooler-config"] = {"seq_pooling_type": mode, "use_activation": normalizes}
    elif kind == "token-classify":
        found["pooler-config"] = {"task": "token_classify"}
    elif names := model.task.sentence.token_names:
        # Its head is the true token's row less the false one's (0.32, models/adapters.py).
        found["hf-overrides"] = {
            "architectures": ["Qwen3ForSequenceClassification"],
            "classifier_from_token": [*reversed(names)],
            "is_original_qwen3_reranker": True,
        }
        found["chat-template"] = pair_template(model)
    return found


def pair_template(model: ModelFacts) -> str:
    """Return the chat template that words a pair of a reranker by two tokens.

    vLLM gives a template the query and the document alone, and uses none unless it is told to
    (0.32, entrypoints/pooling/scoring/io_processor.py): the default prompt, as the system's
    message, and the answer's beginning are set before the model's own template. The line breaks
    there are no text: transformers trims them.
    """
    sentence, before = model.task.sentence, ""
    (*system, _, _) = sentence.pair("", "")
    if system:
        said = json.dumps(system, ensure_ascii=False)
        before += f"{{%- set messages = {said} + messages %}}\n"
    if sentence.begins_answer:
        before += "{%- set add_generation_prompt = true %}\n"
    return before + model.chat_template


def bases(model: ModelFacts) -> str:
    """Return on which bases a head like a model's can be trained to be served; "" for no head."""
    known = VLLM_CLASSES.get("classify" if model.task.kind == "rerank" else model.task.kind)
    if model.task.kind == "embed" or model.task.tokens or not known:
        return ""
    names = ", ".join(sorted(name.partition("For")[0] for name in known))
    return f": train the adapter on a base that target vllm serves with such a head ({names})"


LLAMACPP_PAIRS = frozenset(
    {
        "ModernBertForSequenceClassification", "RobertaForSequenceClassification",
        "XLMRobertaForSequenceClassification",
    }
)  # fmt: skip
"""Rerankers whose scores llama.cpp's server gives as transformers does (compared for all
three)."""
BY_TOKENS = frozenset({"Qwen3ForCausalLM"})
"""Rerankers by the logits of two tokens that both engines know: llama.cpp's graph ends in the
softmax of both for these alone (src/llama-graph.cpp, build_pooling); of vLLM no others were tried.
"""
_NO_POOLER = (
    "leaves out BERT's pooler when it converts, and gives both texts of a pair the same type: its"
    " scores would be others"
)
_NO_RELU = (
    "takes tanh after pre_classifier, where DistilBERT has ReLU (src/llama-graph.cpp,"
    " build_pooling): its scores would be others"
)


def lacks_llamacpp(model: ModelFacts) -> str:
    """Return why llama.cpp's server does not serve a model that does not chat, or ""."""
    name = model.architecture
    match model.task.kind:
        case "embed" if keeps_cache(model) and not is_known_decoder(name):
            return "is not known here to make vectors of this class"
        case "embed" if model.task.sentence.dense:
            return "makes vectors without the module Dense, which its modules.json lists"
        case "embed" if (kind := model.task.sentence.similarity) in BY_LENGTH and not (
            model.task.sentence.normalizes
        ):
            return f"gives every vector the length 1, and they are compared by {kind}"
        case "embed":
            return lacks_vectors(model)
        case "rerank" if name in (BY_TOKENS if model.task.tokens else LLAMACPP_PAIRS):
            return ""
        case "rerank" if model.task.tokens:
            return f"scores pairs by two tokens of {', '.join(sorted(BY_TOKENS))} alone"
        case "rerank" if name == "BertForSequenceClassification":
            return _NO_POOLER
        case "rerank" if name == "DistilBertForSequenceClassification":
            return _NO_RELU
        case "rerank":
            known = ", ".join(sorted(LLAMACPP_PAIRS))
            return f"scores pairs by these classes alone: {known}"
        case "classify":
            return "has no endpoint for labels: its server gives the first label's score alone"
        case _:
            return "has no endpoint for scores of single tokens"


def llamacpp_settings(model: ModelFacts) -> dict[str, JsonValue]:
    """Return llama-server's options for a model that does not chat."""
    if model.task.kind == "rerank":
        return {"reranking": True}
    return {"embedding": True, "pooling": POOLED[pooling_of(model)]}


def lacks_vllm(model: ModelFacts) -> str:
    """Return why vLLM's pooling runner does not serve a model, or ""."""
    kind, name = model.task.kind, model.architecture
    if kind == "embed" and (why := lacks_vectors(model)):
        return why
    if model.task.tokens and name not in BY_TOKENS:
        return f"scores pairs by two tokens of {', '.join(sorted(BY_TOKENS))} alone"
    if model.task.tokens and not (model.task.sentence.token_names and model.chat_template):
        return "scores pairs by two tokens of a tokenizer.json, with a chat template"
    if is_known_decoder(name):
        return ""
    known = VLLM_CLASSES["classify" if kind == "rerank" else kind]
    if name in known:
        return ""
    return f"has no class for it (0.32 and 0.33); it has {', '.join(sorted(known))}"
