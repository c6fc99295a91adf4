"""What a checkpoint is asked for: text, vectors, scores of pairs, or labels of texts or tokens.

Told from names and small files alone: the class in config.json, sentence-transformers' files beside
it, and the head that an adapter brings. Nothing is imported and no weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import SMALL, TOKENIZER, json_object, parse, read_bytes, read_json
from weightsmith.core.values import JsonValue
from weightsmith.models.safetensors import read_header

Kind = Literal["generate", "embed", "rerank", "classify", "token-classify", "other"]
"""`generate` continues texts, and may chat. `embed` gives one vector for a text. `rerank` gives one
number for a pair of texts, and `classify` a number per label for a text. `token-classify` gives a
number per label for each token. `other` is anything else, which `ModelTask.does` names."""

_GENERATES = re.compile(
    r"For(?:CausalLM|ConditionalGeneration|BlockDiffusion)|(?<!BERT)LMHead|Chat|Omni(?:Model|_)"
    r"|Ultravox|DecoderModel"
)
"""In names of classes that continue texts."""
_CLASSES: tuple[tuple[str, Kind, str], ...] = (
    (r"ForTokenClassification", "token-classify", "gives scores"),
    (r"ForSequenceClassification", "classify", "gives scores"),
    (r"For\w*Classification|ForMultipleChoice|ForNextSentence|Reward", "other", "gives scores"),
    (r"ForMaskedLM|ForPreTraining|BERTLMHead", "other", "fills gaps in texts"),
    (r"ForQuestionAnswering", "other", "marks an answer in a text"),
    (r"For(?:CTC|RNNT|TDT)$", "other", "writes down speech"),
    (r"For[A-Z]", "other", "is for something else than to continue texts"),
    (
        r"(?:Model|Encoder|Backbone|Transformer|BERT)$|bert|^t5encoder$|-embedding$",
        "embed",
        "gives vectors",
    ),
)
"""Pattern in the name of a class, or of a GGUF architecture -> its kind, and what it does."""
_ADAPTERS: Mapping[str, tuple[Kind, str]] = {
    "SEQ_CLS": ("classify", "gives scores"),
    "TOKEN_CLS": ("token-classify", "gives scores"),
    "QUESTION_ANS": ("other", "marks an answer in a text"),
    "FEATURE_EXTRACTION": ("embed", "gives vectors"),
}
"""PEFT's `task_type` -> the kind of model that base and adapter are together."""
_HEAD = re.compile(r"(?:^|\.)(?:score|classifier)(?:\.|$)")
_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Keys of a Pooling module's config.json -> its mode (sentence-transformers 6.2, pooling.py)."""
BY_TOKENS = "scores pairs by the logits of two tokens (so its modules.json says)"
"""What a CrossEncoder with a LogitScore module does, such as Qwen3-Reranker."""
_SETTINGS = ("sentence_bert_config.json", "sentence_roberta_config.json")
_MOST_LABELS = 100_000
MODULES = "modules.json"
_SENTENCE_FILES = re.compile(
    r"modules\.json|config_sentence_transformers\.json|sentence_[\w-]+_config\.json"
    r"|\d+_\w+/(?:config\.json|model\.safetensors)"
)
_ORDER = ("Transformer", "Pooling", "Dense", "Normalize")
"""Modules that are computed here and by engines; there may be several of Dense alone."""
_DENSE_TYPES = frozenset(
    {"sentence_transformers.models.Dense", "sentence_transformers.base.modules.dense.Dense"}
)
"""As vLLM knows them (0.32, transformers_utils/config.py); it leaves out others silently."""
ACTIVATIONS = frozenset({"Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU"})
"""Classes of torch, behind a Dense module, that vLLM has too (0.32, layers/activation.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """A matrix that makes another vector of a text's."""

    path: str
    """Its folder, which holds model.safetensors."""
    outputs: int
    """Numbers of the new vector."""
    activation: str
    """The name of torch's class that is applied to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SentenceTransformers:
    """What sentence-transformers' files in a folder say; all empty without a modules.json."""

    modules: tuple[str, ...] = ()
    """Class names of its modules in order, such as Transformer, Pooling, Dense, Normalize."""
    model_type: str = ""
    """SentenceTransformer, CrossEncoder, SparseEncoder or MultiVectorEncoder; "" before 5.0."""
    pooling: str = ""
    """How tokens' vectors become one: mean, cls, lasttoken, max, weightedmean or
    mean_sqrt_len_tokens; several that are concatenated are joined by `+`."""
    includes_prompt: bool = True
    """Whether a prompt's own tokens are pooled too, as they nearly always are."""
    prompts: tuple[tuple[str, str], ...] = ()
    """Name -> what is put before a text of that kind, such as `query` -> `query: `."""
    default_prompt: str = ""
    """The name of the one that is put before texts of no kind; "" for none."""
    similarity: str = ""
    """How vectors are compared, which orders documents: cosine, dot, euclidean or manhattan; ""
    where it is not set, which is cosine."""
    most_tokens: int = 0
    """Texts are cut off after so many tokens; 0 for the model's own length."""
    lower_case: bool = False
    """Whether texts are made lower-case before they are tokenized."""
    activation: str = ""
    """Of a CrossEncoder's scores: the name of torch's class, such as `Sigmoid` or `Identity`."""
    dense: tuple[Dense, ...] = ()
    """In order; they follow the pooling."""
    tokens: tuple[int, int] | None = None
    """Of a LogitScore module: a pair's score is the logit of the first token less the second's."""
    token_names: tuple[str, str] | None = None
    """These tokens, as tokenizer.json writes them; None where it has none of these numbers."""
    begins_answer: bool = False
    """Whether the chat template that words a pair gets `add_generation_prompt`."""
    odd: str = ""
    """The first module that is not known, or not in its place; "" if there is none."""

    @property
    def normalizes(self) -> bool:
        """Whether vectors are given the length 1."""
        return "Normalize" in self.modules

    def pair(self, query: str, document: str) -> tuple[Mapping[str, JsonValue], ...]:
        """Return the messages that the chat template of a model with `tokens` words a pair from."""
        system = dict(self.prompts).get(self.default_prompt, "")
        said = [("query", query), ("document", document)]
        return tuple(
            {"role": role, "content": text}
            for role, text in ([("system", system), *said] if system else said)
        )


NO_SENTENCES = SentenceTransformers()
"""Of a folder without a modules.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTask:
    """The kind of a checkpoint, or of a base with its adapter, and what describes its outputs."""

    kind: Kind
    does: str = ""
    """What it does in place of continuing texts, such as `gives vectors`; "" for `generate`."""
    labels: tuple[str, ...] = ()
    """Of a head, in the order of its outputs; one label makes a model a reranker."""
    problem: str = ""
    """config.json's `problem_type`: single_label_classification, multi_label_classification or
    regression; "" where it is not set."""
    activation: str = ""
    """How a head's logits become the scores that users see: softmax, sigmoid or identity, as
    sentence-transformers says or does it for a reranker, and transformers' pipelines for others;
    "" without a head."""
    sentence: SentenceTransformers = NO_SENTENCES

    @property
    def gives_sets(self) -> bool:
        """Whether a head decides on each label by itself, so that a text may have any number."""
        return self.problem == "multi_label_classification"

    @property
    def tokens(self) -> tuple[int, int] | None:
        """The true and the false token of a reranker without a head; None of any other model."""
        return self.sentence.tokens if self.kind == "rerank" else None


def read_task(folder: Path, adapter: Path | None = None) -> ModelTask:
    """Return the kind of the checkpoint in a folder, or of that base with a LoRA adapter's head.

    Raises InputRefused for a config.json, adapter_config.json or a file of sentence-transformers
    that cannot be read.
    """
    config = read_json(folder / "config.json")
    sentence = read_sentence_transformers(folder)
    if adapter is None:
        return task_of(config, sentence)
    task_type = str(read_json(adapter / "adapter_config.json").get("task_type") or "")
    outputs = head_outputs(adapter)
    if (adapter / MODULES).is_file():
        sentence = read_sentence_transformers(adapter)
    elif outputs and task_type in _ADAPTERS:
        sentence = NO_SENTENCES  # the base's files say how vectors are made, which are no more
    return task_of(config, sentence, task_type=task_type, outputs=outputs)


def task_of(
    config: Mapping[str, JsonValue],
    sentence: SentenceTransformers = NO_SENTENCES,
    *,
    task_type: str = "",
    outputs: int = 0,
) -> ModelTask:
    """Return the kind that a config.json and files of sentence-transformers say.

    `task_type` and `outputs` are those of an adapter and of its new head; with a head of another
    length than config.json lists labels, labels are LABEL_0 and so on, as the merge writes them.
    """
    kind, does = _ADAPTERS.get(task_type) or _of_files(config, sentence)
    if kind not in {"classify", "token-classify"}:
        return ModelTask(kind=kind, does=does, sentence=sentence)
    labels = _labels(config)
    if outputs and (task_type in _ADAPTERS and outputs != len(labels)):
        labels = tuple(f"LABEL_{number}" for number in range(outputs))
    problem = _text(config.get("problem_type"))
    return ModelTask(
        kind="rerank" if kind == "classify" and len(labels) == 1 else kind,
        does=does,
        labels=labels,
        problem=problem,
        activation=_activation(config, sentence, problem, len(labels)),
        sentence=sentence,
    )


def _of_files(config: Mapping[str, JsonValue], sentence: SentenceTransformers) -> tuple[Kind, str]:
    """Return the kind by sentence-transformers' files, else by the name of the class."""
    if sentence.model_type == "CrossEncoder":
        if "LogitScore" in sentence.modules:
            known = sentence.tokens and sentence.modules == ("Transformer", "LogitScore")
            return "rerank" if known else "other", BY_TOKENS
    elif sentence.modules:
        known = sentence.model_type in {"", "SentenceTransformer"}
        does = "vectors" if known else f"the vectors of a {sentence.model_type}"
        return "embed" if known else "other", f"gives {does} (so its modules.json says)"
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else ""
    return of_class(name if isinstance(name, str) else "")


def of_class(name: str) -> tuple[Kind, str]:
    """Return the kind of a class of transformers, or of a GGUF architecture, and what it does."""
    if not name or _GENERATES.search(name):
        return "generate", ""
    found = ((kind, does) for pattern, kind, does in _CLASSES if re.search(pattern, name))
    return next(found, ("generate", ""))


def _activation(
    config: Mapping[str, JsonValue], sentence: SentenceTransformers, problem: str, outputs: int
) -> str:
    """Return a head's activation; sentence-transformers before 5.4 stated it in config.json."""
    own = config.get("sentence_transformers")
    stated = own.get("activation_fn") if isinstance(own, Mapping) else None
    stated = sentence.activation or stated or config.get("sbert_ce_default_activation_function")
    named = _text(stated).rpartition(".")[2].lower()
    if named in {"softmax", "sigmoid", "identity"}:
        return named
    if problem == "regression":
        return "identity"
    return "softmax" if outputs > 1 and problem != "multi_label_classification" else "sigmoid"


def _labels(config: Mapping[str, JsonValue]) -> tuple[str, ...]:
    """Return a configuration's labels, else as many as transformers assumes: 2 if nothing is said.

    Raises InputRefused where they are not numbered from 0 on.
    """
    named, count = config.get("id2label"), config.get("num_labels")
    if not isinstance(named, Mapping) or not named:
        number = count if isinstance(count, int) and 0 < count <= _MOST_LABELS else 2
        return tuple(f"LABEL_{one}" for one in range(number))
    found = {str(key): value for key, value in named.items()}
    labels = [found.get(str(number)) for number in range(len(found))]
    texts = tuple(label for label in labels if isinstance(label, str))
    if len(texts) != len(named):
        raise InputRefused(
            "config.json: id2label does not name the outputs 0, 1 and so on with texts",
            hint="check the checkpoint's config.json",
        )
    return texts


def head_outputs(adapter: Path) -> int:
    """Return the outputs of the head among an adapter's weights; 0 if it brings none.

    Raises InputRefused for a file of weights that cannot be read.
    """
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        return 0
    stored = read_header(file).tensors
    return outputs_of((info.name, info.shape) for info in stored if ".lora_" not in info.name)


def outputs_of(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    """Return the outputs of the last head's matrix among tensors by name; 0 without one.

    What comes before a head may be trained with it: DistilBERT's `pre_classifier`, RoBERTa's
    `classifier.dense`, ModernBERT's `head.dense`.
    """
    found = sorted(tensors)
    heads = [shape[0] for name, shape in found if len(shape) == 2 and _HEAD.search(name)]
    return heads[-1] if heads else 0


def is_of_sentences(name: str) -> bool:
    """Say whether a file, by its path in a model's folder, is one of sentence-transformers'."""
    return _SENTENCE_FILES.fullmatch(name) is not None


def read_sentence_transformers(folder: Path) -> SentenceTransformers:
    """Return what a folder's files of sentence-transformers say.

    Raises InputRefused for one that cannot be read, or that names a file outside the folder.
    """
    listed = _value(folder / MODULES)
    if listed is None:
        return SentenceTransformers()
    rows = listed if isinstance(listed, list) and listed else [None]
    kinds: list[str] = []
    pooling: Mapping[str, JsonValue] = {}
    dense: list[Dense] = []
    scored: Mapping[str, JsonValue] = {}
    odd = ""
    for row in rows:
        kind, path = (row.get("type"), row.get("path")) if isinstance(row, Mapping) else (None,) * 2
        if not isinstance(kind, str) or not isinstance(path, str) or not _is_inside(path):
            raise InputRefused(
                f"{folder / MODULES} does not list modules with a type and a path in the folder",
                hint="export the model again with sentence-transformers",
            )
        kinds.append(kind.rpartition(".")[2])
        if kinds[-1] == "Pooling":
            pooling = read_json(folder / path / "config.json")
        elif kinds[-1] == "Dense":
            known = _dense(folder, path) if kind in _DENSE_TYPES else None
            dense += [known] if known else []
            odd = odd or ("" if known else "Dense")
        elif kinds[-1] == "LogitScore":
            scored = read_json(folder / path / "config.json")
    said = _object(folder / "config_sentence_transformers.json")
    bert = next((found for name in _SETTINGS if (found := _object(folder / name))), {})
    prompts, default = said.get("prompts"), said.get("default_prompt_name")
    return SentenceTransformers(
        modules=tuple(kinds),
        model_type=_text(said.get("model_type")),
        pooling=_pooling(pooling),
        includes_prompt=pooling.get("include_prompt") is not False,
        prompts=tuple(
            (name, text)
            for name, text in (prompts if isinstance(prompts, Mapping) else {}).items()
            if isinstance(text, str)
        ),
        default_prompt=_text(default),
        similarity=_text(said.get("similarity_fn_name")),
        most_tokens=_count(bert.get("max_seq_length")),
        lower_case=bert.get("do_lower_case") is True,
        activation=_text(said.get("activation_fn")).rpartition(".")[2],
        dense=tuple(dense),
        odd=odd or _odd(kinds),
        tokens=_tokens(scored),
        token_names=_names(folder, _tokens(scored)),
        begins_answer=_begins_answer(bert),
    )


def _tokens(settings: Mapping[str, JsonValue]) -> tuple[int, int] | None:
    """Return the two tokens of a LogitScore module; None of one that has a single token."""
    ids = [settings.get(f"{word}_token_id") for word in ("true", "false")]
    true, false = (one if type(one) is int and one >= 0 else None for one in ids)
    return None if true is None or false is None or true == false else (true, false)


def _names(folder: Path, tokens: tuple[int, int] | None) -> tuple[str, str] | None:
    """Return two tokens' texts in a folder's tokenizer.json, None without these."""
    file = folder / "tokenizer.json"
    if tokens is None or not file.is_file():
        return None
    said = read_json(file, largest=TOKENIZER, unique=False)
    model, added = said.get("model"), said.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    found: dict[JsonValue, JsonValue] = {}
    if isinstance(vocabulary, Mapping):
        found = {number: text for text, number in vocabulary.items() if isinstance(number, int)}
    for row in added if isinstance(added, list) else []:
        if isinstance(row, Mapping) and isinstance(row.get("id"), int):
            found[row["id"]] = row.get("content")
    true, false = (found.get(token) for token in tokens)
    return (true, false) if isinstance(true, str) and isinstance(false, str) else None


def _begins_answer(settings: Mapping[str, JsonValue]) -> bool:
    given = settings.get("processing_kwargs")
    chat = given.get("chat_template") if isinstance(given, Mapping) else None
    return isinstance(chat, Mapping) and chat.get("add_generation_prompt") is True


def _odd(kinds: Sequence[str]) -> str:
    """Return the first module whose vectors nothing here computes, "" if there is none."""
    last = 0
    for kind in kinds:
        if kind == "Dropout":  # does nothing after training
            continue
        place = _ORDER.index(kind) if kind in _ORDER else -1
        if place < last or (place > 1 and "Pooling" not in kinds):
            return kind
        last = place if kind == "Dense" else place + 1
    return ""


def _dense(folder: Path, path: str) -> Dense | None:
    """Return a Dense module by its files; None for one that nothing here computes.

    Raises InputRefused if its weights are missing.
    """
    settings = read_json(folder / path / "config.json")
    activation = _text(settings.get("activation_function")).rpartition(".")[2]
    outputs = _count(settings.get("out_features"))
    given = [settings.get(f"module_{end}_name") for end in ("input", "output")]
    elsewhere = any(name not in (None, "sentence_embedding") for name in given)
    if activation not in ACTIVATIONS or not outputs or elsewhere:
        return None
    whole = any(folder.glob("*.safetensors"))  # else these are a model's small files alone
    if whole and not (folder / path / "model.safetensors").is_file():
        raise InputRefused(
            f"{folder / path} has no model.safetensors, so vectors would lack a module",
            hint="load the model with sentence-transformers, and save it with save_pretrained: it"
            " writes safetensors",
        )
    return Dense(path=path, outputs=outputs, activation=activation)


def _pooling(settings: Mapping[str, JsonValue]) -> str:
    modes = settings.get("pooling_mode") or [key for key in _MODES if settings.get(key) is True]
    listed = modes if isinstance(modes, list) else [modes]
    return "+".join(_MODES.get(str(mode), str(mode)) for mode in listed) or "mean"


def _is_inside(path: str) -> bool:
    found = PurePosixPath(path)
    return not found.is_absolute() and ".." not in found.parts and "\0" not in path


def _value(path: Path) -> JsonValue:
    """Return a small file's JSON, None if there is no such file."""
    if not path.is_file():
        return None
    try:
        found: JsonValue = parse(read_bytes(path, SMALL), unique=True)
    except ValueError as error:
        raise InputRefused(
            f"{path} holds no valid JSON: {error}", hint="download or export the model again"
        ) from None
    return found


def _object(path: Path) -> Mapping[str, JsonValue]:
    return json_object(read_bytes(path, SMALL), str(path)) if path.is_file() else {}


def _text(value: JsonValue) -> str:
    return value if isinstance(value, str) else ""


def _count(value: JsonValue) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
