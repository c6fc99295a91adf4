"""Reference vectors, labels and scores: of a base, one with unmerged adapters, or a merged model.

Texts are read by transformers in float32. What becomes of their tokens is what
sentence-transformers does by the model's own files, and transformers' heads do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from weightsmith.core.errors import InputRefused
from weightsmith.core.jobs import Pooled, Question, words_text
from weightsmith.core.time_limits import doing
from weightsmith.core.values import JsonValue
from weightsmith.core.vectors import packed
from weightsmith.forward.adapters import with_adapters
from weightsmith.forward.greedy import bare, batches, takes
from weightsmith.forward.libraries import ModelFails, reading, running, stay_offline
from weightsmith.forward.lockstep import Lockstep
from weightsmith.forward.memory import BATCH_TOKENS
from weightsmith.forward.network import Head, fill, skeleton_with_weights
from weightsmith.forward.views import view_with_head
from weightsmith.forward.walk import walk
from weightsmith.merging.reference import Rows, Tokenizers, UnmergedModel, loading, speaker, weigh
from weightsmith.models.task import MODULES, ModelTask, SentenceTransformers, read_task
from weightsmith.models.templates import render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from weightsmith.forward.kinds import Model

_CLASSES: Mapping[Pooled, str] = {
    "vectors": "AutoModel",
    "label": "AutoModelForSequenceClassification",
    "label-set": "AutoModelForSequenceClassification",
    "relevance": "AutoModelForSequenceClassification",
    "word-labels": "AutoModelForTokenClassification",
}
_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Identity": lambda values: values,
    "Tanh": torch.tanh,
    "ReLU": torch.relu,
    "GELU": torch.nn.functional.gelu,
    "Sigmoid": torch.sigmoid,
    "SiLU": torch.nn.functional.silu,
}
_PADDING = 1024
_UNLIMITED = 1_000_000
"""A tokenizer's limit from which on it has none."""
_NO_LABEL = "-"
"""Of a word that is cut off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledModel(UnmergedModel):
    """A checkpoint with unmerged adapters that does not answer in words."""

    pooled: Pooled

    @property
    def task(self) -> ModelTask:
        """What its files say of it, and what the adapter with a head says."""
        alone = read_task(self.model)
        tasks = (read_task(self.model, root) for root, _ in self.adapters)
        return next((one for one in tasks if one != alone), alone)

    @property
    def sentence_folder(self) -> Path:
        """The folder whose files of sentence-transformers count."""
        own = (root for root, _ in self.adapters if (root / MODULES).is_file())
        return next(own, self.model)

    @property
    def head(self) -> Head:
        """What its network ends in."""
        return Head(self._class, self.task.labels)

    @property
    def _class(self) -> str:
        return "AutoModelForCausalLM" if self.task.tokens else _CLASSES[self.pooled]

    @property
    def source(self) -> tuple[Path, str]:
        """The folder, whose matrices have another order in another network."""
        return self.model, self._class

    def streamed(self, lockstep: Lockstep, number: int) -> Model:
        """Return the model with its weights in files; raise InputRefused if one is missing."""
        with loading(self.adapters):
            network = view_with_head(self.model, self.adapters, self.head, lockstep, number)
        weigh(network, [weight for _, weight in self.adapters])
        return network

    def whole(self) -> Model:
        """Return the model with its weights in memory."""
        with doing(f"loading {self.model}"):
            network, weights = skeleton_with_weights(self.model, self.head)
            fill(network, weights)
        if self.adapters:
            with doing("loading the adapters"), loading(self.adapters):
                network = with_adapters(network, self.adapters)
            weigh(network, [weight for _, weight in self.adapters])
        return network


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledRequest:
    """A model, its texts, and what is put before queries and documents."""

    subject: PooledModel
    questions: Sequence[Question]
    prompts: tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    """The tokens of one text, or of a query with a document."""

    ids: Sequence[int]
    types: Sequence[int]
    """0 in the first text, 1 in the second; () if the tokenizer does not say."""
    words: Sequence[int] = ()
    """The first token of each word; -1 if it was cut off."""


def pooled_answers(
    subjects: Mapping[str, PooledRequest],
    count: Callable[[int], None] = lambda _: None,
    finished: Callable[[str, Rows], None] = lambda *_: None,
) -> dict[str, Rows]:
    """Return what each model says of its texts, in order, in one walk over the weights.

    A row has `answer`: a vector, packed; a label; the labels whose probability is above one half,
    as JSON; words' labels with blanks between them; or the scores of a query's documents, before
    any activation. `prompt_tokens` are those that were read, `margins` and `token_ends` as in an
    answer in words: by how much a label's logit exceeds the second one, or one of a set is from
    zero, in nats. `probabilities` are those of all labels, of `word-labels` for each token in turn.
    Texts are cut off where sentence-transformers does. `count` and `finished` are called as by
    `answered`. Raises InputRefused for a model whose files ask for what is not computed here.
    """
    stay_offline()
    loaded: Tokenizers = {}
    ask: dict[str, Callable[[Model, Lockstep], Rows]] = {}
    for name, one in subjects.items():
        task = one.subject.task
        _check(one.subject, task, one.prompts)
        tokenizer = speaker(one.subject, loaded)
        texts = [_tokens(one, task, tokenizer, question) for question in one.questions]
        ask[name] = partial(_rows, one, task, texts, count, partial(finished, name))
    return walk({name: one.subject for name, one in subjects.items()}, ask)


def _check(subject: PooledModel, task: ModelTask, prompts: tuple[str, str]) -> None:
    sentence = task.sentence
    if subject.pooled != "vectors":
        return
    left = any(prompts) and not sentence.includes_prompt
    if sentence.odd or left:
        what = "pools without the prompt's tokens" if left else f"has the module {sentence.odd}"
        raise InputRefused(
            f"{subject.model}: by its sentence-transformers files the model {what}, which reference"
            " vectors do not have",
            hint="leave out the suite with metric embedding",
        )


def _tokens(
    one: PooledRequest, task: ModelTask, tokenizer: PreTrainedTokenizerBase, question: Question
) -> list[_Text]:
    """Return the tokens of a question's text; for `relevance`, with each document."""
    sentence, message = task.sentence, question.messages[0]
    text = one.prompts[message["role"] == "document"] + message["content"]
    text = text.lower() if sentence.lower_case else text
    most = min(_limits(one.subject, task, tokenizer), default=None)
    cut = {"truncation": most is not None, "max_length": most}
    if task.tokens:
        return [_pair(one.subject, tokenizer, sentence, text, d, most) for d in question.parts]
    offsets = one.subject.pooled == "word-labels"
    if offsets and not tokenizer.is_fast:
        raise InputRefused(
            f"the tokenizer of {one.subject.model} does not say which words its tokens are of",
            hint="save it with a tokenizer.json",
        )
    found = []
    with doing(f"tokenizing with the tokenizer of {one.subject.model}"):
        for second in question.parts if one.subject.pooled == "relevance" else (None,):
            made = tokenizer(text, second, **cut, return_offsets_mapping=offsets)
            ids, types = list(made["input_ids"]), list(made.get("token_type_ids", ()))
            if not ids:
                raise InputRefused(
                    f"a text has no tokens by the tokenizer of {one.subject.model}",
                    hint="remove it: no model can read nothing",
                )
            words = _word_starts(question.parts, made["offset_mapping"]) if offsets else ()
            found.append(_Text(ids=ids, types=types, words=words))
    return found


def _pair(
    subject: PooledModel,
    tokenizer: PreTrainedTokenizerBase,
    sentence: SentenceTransformers,
    query: str,
    document: str,
    most: int | None,
) -> _Text:
    """Return the tokens of a pair as the chat template words it; InputRefused if too long."""
    messages = sentence.pair(query, document)
    text = render_chat(tokenizer, messages, answer=sentence.begins_answer)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if most is not None and len(ids) > most:
        raise InputRefused(
            f"a query and a document have {len(ids)} tokens, and {subject.model} reads {most}: the"
            " end of its prompt would be cut off",
            hint=f"shorten the document, or remove it: {document[:60]!r}",
        )
    return _Text(ids=ids, types=())


def _limits(
    subject: PooledModel, task: ModelTask, tokenizer: PreTrainedTokenizerBase
) -> Iterator[int]:
    """Yield after how many tokens texts are cut off."""
    from weightsmith.models.facts import read_facts

    yield from (
        n for n in (task.sentence.most_tokens, tokenizer.model_max_length) if 0 < n < _UNLIMITED
    )
    yield from read_facts(subject.model).positions.lengths[:1]


def _word_starts(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Return the first token of each word of the words with blanks between them."""
    found, start = [], 0
    for word in words:
        covers = (n for n, (a, b) in enumerate(offsets) if a < start + len(word) and b > start)
        found.append(next(covers, -1))
        start += len(word) + 1
    return found


@torch.inference_mode()
def _rows(
    one: PooledRequest,
    task: ModelTask,
    texts: Sequence[Sequence[_Text]],
    count: Callable[[int], None],
    finished: Callable[[Rows], None],
    network: Model,
    lockstep: Lockstep,
) -> Rows:
    flat = [text for several in texts for text in several]
    said: dict[int, torch.Tensor] = {}
    projected = _projected(one.subject.sentence_folder, task)
    for batch in batches(
        {n: text.ids for n, text in enumerate(flat)},
        lambda rows, longest: rows * longest <= BATCH_TOKENS,
        _PADDING,
    ):
        outputs = _read(
            network, [flat[number] for number in batch], one.subject.pooled, task, projected
        )
        said |= dict(zip(batch, outputs, strict=True))
        count(len(batch) * len(texts) // len(flat))
    rows: Rows = []
    with lockstep.away():
        place = 0
        for several in texts:
            found = [said[place + n] for n in range(len(several))]
            place += len(several)
            tokens = sum(len(text.ids) for text in several)
            row = _row(found, several[0], one.subject.pooled, task.labels)
            rows.append({**row, "prompt_tokens": tokens})
        finished(rows)
    return rows


def _row(
    found: Sequence[torch.Tensor], text: _Text, pooled: Pooled, labels: Sequence[str]
) -> dict[str, JsonValue]:
    if pooled == "vectors":
        return {"answer": packed(found[0].tolist())}
    if pooled == "relevance":
        return {"answer": " ".join(repr(float(one[0])) for one in found)}
    odds = found[0].sigmoid() if pooled == "label-set" else found[0].softmax(-1)
    likely = {"probabilities": " ".join(f"{one:.6g}" for one in odds.flatten().tolist())}
    if pooled == "word-labels":
        best = found[0].argmax(-1).tolist()
        said = [_NO_LABEL if place < 0 else labels[best[place]] for place in text.words]
        return {"answer": words_text(said), **likely}
    if pooled == "label-set":
        answer = json.dumps([labels[n] for n, one in enumerate(found[0].tolist()) if one > 0])
        margin = float(found[0].abs().min())
    else:
        answer = labels[int(found[0].argmax())]
        first, second = found[0].topk(2).values.tolist()
        margin = first - second
    ends = {"token_ends": str(len(answer)), "margins": f"{round(margin, 4):g}"}
    return {"answer": answer, **ends, **likely}


_Projected = Callable[[torch.Tensor], torch.Tensor]


def _projected(folder: Path, task: ModelTask) -> _Projected:
    """Return what a model's Dense modules make of vectors [texts, width]; raises InputRefused."""
    layers: list[tuple[torch.Tensor, torch.Tensor | None, _Projected]] = []
    for dense in task.sentence.dense:
        path = folder / dense.path / "model.safetensors"
        with reading(str(path), "save the model again with sentence-transformers"):
            stored = load_file(path)
        weight, bias = stored.get("linear.weight"), stored.get("linear.bias")
        if (
            weight is None
            or weight.dim() != 2
            or len(weight) != dense.outputs
            or (bias is not None and bias.shape != weight.shape[:1])
        ):
            raise InputRefused(
                f"{path} has no linear.weight with {dense.outputs} rows, or another bias",
                hint="save the model again with sentence-transformers",
            )
        bias = None if bias is None else bias.float()
        layers.append((weight.float(), bias, _ACTIVATIONS[dense.activation]))

    def project(vectors: torch.Tensor) -> torch.Tensor:
        for weight, bias, activation in layers:
            if weight.shape[1] != vectors.shape[1]:
                raise InputRefused(
                    f"{folder}: a Dense module takes {weight.shape[1]} numbers, and vectors have"
                    f" {vectors.shape[1]}",
                    hint="compare the files of sentence-transformers with the published ones",
                )
            vectors = activation(torch.nn.functional.linear(vectors, weight, bias))
        return vectors

    return project


def _read(
    network: Model,
    texts: Sequence[_Text],
    pooled: Pooled,
    task: ModelTask,
    projected: _Projected,
) -> list[torch.Tensor]:
    """Return each text's vector or logits; of `word-labels`, its tokens'. Padded on the right."""
    config = network.config.get_text_config()
    lengths = torch.tensor([len(text.ids) for text in texts])
    width = int(lengths.max())
    filler = config.pad_token_id
    if filler is None:  # heads look for the last token that is not this one
        used = {token for text in texts for token in text.ids}
        filler = next(token for token in range(len(used) + 1) if token not in used)
    ids = torch.tensor([[*text.ids, *[filler] * (width - len(text.ids))] for text in texts])
    mask = (torch.arange(width) < lengths[:, None]).long()
    given: dict[str, torch.Tensor | bool] = {"input_ids": ids, "attention_mask": mask}
    if texts[0].types and takes(network, "token_type_ids"):
        given["token_type_ids"] = torch.tensor(
            [[*text.types, *[0] * (width - len(text.types))] for text in texts]
        )
    if takes(network, "use_cache"):
        given["use_cache"] = False
    ends = torch.tensor(sorted({len(text.ids) - 1 for text in texts}))
    if task.tokens and takes(network, "logits_to_keep"):  # of all places they would be gigabytes
        given["logits_to_keep"] = ends
    before, config.pad_token_id = config.pad_token_id, filler
    try:
        with running():
            output = bare(network)(**given)
    finally:
        config.pad_token_id = before
    found = output[0] if pooled == "vectors" else output.logits
    if task.tokens:
        places = lengths - 1
        if "logits_to_keep" in given:
            places = torch.searchsorted(ends, places)
        last = found[torch.arange(len(found)), places]
        found = last[:, [task.tokens[0]]] - last[:, [task.tokens[1]]]
    if not bool(torch.isfinite(found[mask.bool()] if found.dim() == 3 else found).all()):
        raise ModelFails("what the model returns is not finite")
    if pooled == "vectors":
        mode = task.sentence.pooling or _usual_pooling(network)
        vectors = projected(pooled_vectors(found, mask, mode))
        if task.sentence.normalizes:
            vectors = torch.nn.functional.normalize(vectors)
        return list(vectors)
    if pooled == "word-labels":
        return [row[:length] for row, length in zip(found, lengths.tolist(), strict=True)]
    return list(found)


def _usual_pooling(network: Model) -> str:
    """Return how engines pool where no file says it: an encoder's mean, a decoder's last token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    return "mean" if type(network.config) in MODEL_FOR_MASKED_LM_MAPPING else "lasttoken"


def pooled_vectors(states: torch.Tensor, mask: torch.Tensor, mode: str) -> torch.Tensor:
    """Return a vector [texts, …] of the tokens' states [texts, tokens, width], padded on the right.

    By the modes of sentence-transformers (6.2, pooling.py); several are joined by `+`. Raises
    InputRefused for an unknown one.
    """
    weights = mask[..., None].to(states.dtype)
    places = torch.arange(1, states.shape[1] + 1, dtype=states.dtype)[None, :, None]
    total = (states * weights).sum(1)
    found = []
    for one in mode.split("+"):
        match one:
            case "mean":
                found.append(total / weights.sum(1))
            case "mean_sqrt_len_tokens":
                found.append(total / weights.sum(1).sqrt())
            case "cls":
                found.append(states[:, 0])
            case "lasttoken":
                found.append(states[torch.arange(len(states)), mask.sum(1) - 1])
            case "max":
                found.append(states.masked_fill(weights == 0, -torch.inf).amax(1))
            case "weightedmean":
                found.append((states * weights * places).sum(1) / (weights * places).sum(1))
            case _:
                raise InputRefused(
                    f"sentence-transformers pools by {one!r}, which is not known",
                    hint="compare 1_Pooling/config.json with the published one",
                )
    return torch.cat(found, -1)
