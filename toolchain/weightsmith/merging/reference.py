"""Reference answers: base, or base with unmerged adapters, greedy, in float32.

Also log-likelihoods of an item's choices.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch

from weightsmith.core.errors import InputRefused
from weightsmith.core.jobs import Chat, Question, SeenPicture, in_parts
from weightsmith.core.safe_parse import parse, read_json
from weightsmith.core.time_limits import doing
from weightsmith.core.values import JsonValue
from weightsmith.forward.adapters import IncompatibleAdapters, with_adapters
from weightsmith.forward.greedy import Keep, Questions, Tokens, Written, greedy
from weightsmith.forward.heads import some_logits
from weightsmith.forward.libraries import load_tokenizer, stay_offline
from weightsmith.forward.lockstep import Lockstep
from weightsmith.forward.network import fill, skeleton_with_weights
from weightsmith.forward.pictures import Sight, load_processor, sight_of
from weightsmith.forward.views import view
from weightsmith.forward.walk import Count, Progress, walk
from weightsmith.merging.adapter_config import read_adapter_config
from weightsmith.models.facts import text_part
from weightsmith.models.folder import check_adapter_folder, check_model_folder
from weightsmith.models.templates import own_template, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from weightsmith.forward.kinds import Model

Message = Mapping[str, str]
Rows: TypeAlias = list[dict[str, JsonValue]]
"""Answers, one per item; `answered` says what each has."""

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_LARGEST_JOURNAL = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class UnmergedModel:
    """A checkpoint with unmerged adapters, each times its weight."""

    model: Path
    adapters: Sequence[tuple[Path, float]] = ()
    speakers: Sequence[Path] = ()
    """Adapters whose tokenizer and chat template word the questions; by default, its own."""
    draft: str = ""
    """Name of the subject whose answers this one probably gives too."""
    draft_texts: Sequence[str] = ()
    """Its probable answers, if they are known."""

    @property
    def checkpoint(self) -> Path:
        """The folder with the model's weights."""
        return self.model

    @property
    def source(self) -> Hashable:
        """The folder, whose matrices are read once for all subjects."""
        return self.model

    def streamed(self, lockstep: Lockstep, number: int) -> Model:
        """Return the model with its weights in files; raise InputRefused if one is missing."""
        check_model_folder(self.model)
        with loading(self.adapters):
            network = view(self.model, self.adapters, lockstep, number)
        weigh(network, [weight for _, weight in self.adapters])
        return network

    def whole(self) -> Model:
        """Return the model with its weights in memory."""
        return load_network(self.model, self.adapters)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A subject, its chats, and the maximum length of an answer in tokens."""

    subject: UnmergedModel
    items: Sequence[Chat]
    max_tokens: int
    tools: Sequence[str] = ()
    """Per item, the tools that may be called, as JSON; () for none anywhere."""
    pictures: Mapping[int, Sequence[SeenPicture]] = field(default_factory=dict)
    """Those of items with any, by the item's number."""
    folder: Path = Path()
    """The pictures' folder."""
    drafts: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """Probable answers in tokens, by the item's number."""


def answers(
    subjects: Mapping[str, UnmergedModel],
    items: Sequence[Chat],
    max_tokens: int,
    progress: Progress | None = None,
    *,
    batch_bytes: int = 0,
    tools: Sequence[str] = (),
) -> dict[str, Rows]:
    """Return one greedy answer per item of each subject, in order; see `answered`."""
    asked = {
        name: GenerationRequest(subject=one, items=items, max_tokens=max_tokens, tools=tools)
        for name, one in subjects.items()
    }
    count = Count(len(items) * len(subjects), progress)
    found = answered(asked, count, batch_bytes=batch_bytes)
    return {name: one.rows for name, one in found.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One subject's answers."""

    rows: Rows
    texts: tuple[tuple[Sequence[int], Sequence[int]], ...]
    """Per item, the tokens that were asked and those of the answer."""


def answered(
    subjects: Mapping[str, GenerationRequest],
    count: Callable[[int], None] = lambda _: None,
    *,
    batch_bytes: int = 0,
    journal: AnswerJournal | None = None,
    finished: Callable[[str, Rows], None] = lambda *_: None,
) -> dict[str, Answered]:
    """Return one greedy answer per item of each subject, in order, from local files only.

    Each has `answer`; `finish_reason`: `stop` if the model ended it, `length` if it was cut off;
    `prompt_tokens`, the number of tokens it was asked with; `token_ends`, the length of the text
    after each of its tokens, in characters; `margins`, the nats by which each token was likelier
    than the second likeliest. Both are numbers in one text: as lists, those of 100,000 answers
    would take gigabytes of everybody's memory.

    Adapters stay unmerged and act in parallel, each times its weight, as in training. Items are
    chat messages, rendered by the model's chat template (or an adapter's, if it has one, also for
    the base alone); without a template, an item's single message is completed as plain text.
    Weights are streamed from their files for all subjects at once; a model that does not support
    this is loaded. `count` is called with the number of new answers; `batch_bytes` is the memory
    for the items of all subjects that are read at a time, 0 for a usual amount. What an interrupted
    call left in the `journal` is read as drafts. `finished` is called with a subject's answers as
    soon as it has all of them, in a thread. Raises InputRefused for folders that need custom code.
    """
    stay_offline()
    loaded: Tokenizers = {}
    asked, found = dict[str, _Asked](), dict[str, Answered]()
    for name, one in subjects.items():
        model, tokenizer = one.subject.model, speaker(one.subject, loaded)
        tools = one.tools or ("",) * len(one.items)
        sights = _sights(one, tokenizer, tools)
        prompts = [
            sights[n].tokens if n in sights else prompt_tokens(tokenizer, item, model, tools[n])
            for n, item in enumerate(one.items)
        ]
        questions = Questions(
            prompts=prompts, ends=_ends(model, tokenizer), most=one.max_tokens, sights=sights
        )
        asked[name] = _Asked(
            subject=one.subject, tokenizer=tokenizer, questions=questions, tools=tools
        )
    for round_ in (False, True):
        names = [name for name, one in asked.items() if bool(one.subject.draft) is round_]
        for name in names:
            asked[name].questions.drafts = subjects[name].drafts or _drafts(asked[name], found)
            if journal:
                journal.go_on(name, asked[name].questions)
            if batch_bytes:
                asked[name].questions.batch_bytes = batch_bytes // len(names)
        chosen = {name: asked[name].subject for name in names}
        ask = {
            name: partial(_answered, asked[name], count, partial(finished, name)) for name in names
        }
        found |= walk(chosen, ask) if names else {}
    return {name: found[name] for name in subjects}


def _sights(
    asked: GenerationRequest, tokenizer: PreTrainedTokenizerBase, tools: Sequence[str]
) -> dict[int, Sight]:
    """Return the items with pictures as the model's processor prepares them, by their numbers."""
    found: dict[int, Sight] = {}
    processor = load_processor(asked.subject.model, tokenizer) if asked.pictures else None
    for number, pictures in asked.pictures.items():
        chat = in_parts(asked.items[number], pictures, lambda _: {"type": "image"})
        if not tokenizer.chat_template:
            raise InputRefused(
                f"{asked.subject.model} has no chat template, and a question has a picture",
                hint="add chat_template.jinja to the model or the adapter",
            )
        text = render_chat(tokenizer, chat, answer=True, tools=tools[number])
        found[number] = sight_of(processor, text, asked.folder, pictures)
    return found


@dataclass(slots=True, kw_only=True)
class _Asked:
    subject: UnmergedModel
    tokenizer: PreTrainedTokenizerBase
    questions: Questions
    tools: Sequence[str]

    def decode(self, number: int, rows: Sequence[Sequence[int]]) -> list[str]:
        """Return texts of an item's tokens; with tools, special ones stay: they mark calls."""
        skip, ends = not self.tools[number], set(self.questions.ends)
        kept = rows if skip else [[token for token in row if token not in ends] for row in rows]
        return list(self.tokenizer.batch_decode(kept, skip_special_tokens=skip))


def _drafts(asked: _Asked, found: Mapping[str, Answered]) -> Mapping[int, Sequence[int]]:
    if asked.subject.draft in found:
        return {n: answer for n, (_, answer) in enumerate(found[asked.subject.draft].texts)}
    end = asked.questions.ends[:1]
    # With tools, what a text says of special tokens is read back as such.
    return {
        number: [*asked.tokenizer(text, add_special_tokens=False)["input_ids"], *end]
        for number, text in enumerate(asked.subject.draft_texts)
        if text
    }


def _answered(
    asked: _Asked,
    count: Callable[[int], None],
    finished: Callable[[Rows], None],
    network: Model,
    lockstep: Lockstep,
) -> Answered:
    found, prompts = greedy(network, asked.questions, count), asked.questions.prompts
    ends = set(asked.questions.ends)
    with lockstep.away():
        rows: Rows = [
            {
                "answer": str(asked.decode(number, [row])[0]),
                "finish_reason": "stop" if set(row) & ends else "length",
                "prompt_tokens": len(prompt),
                # How many characters of the answer each token completes.
                "token_ends": " ".join(
                    str(len(part))
                    for part in asked.decode(number, [row[: n + 1] for n in range(len(row))])
                ),
                "margins": " ".join(f"{round(margin, 4):g}" for margin in margins),
            }
            for number, (row, margins, prompt) in enumerate(
                zip(found.tokens, found.margins, prompts, strict=True)
            )
        ]
        finished(rows)
    return Answered(rows=rows, texts=tuple(zip(prompts, found.tokens, strict=True)))


def speaker(subject: UnmergedModel, loaded: Tokenizers | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer and chat template that word a subject's questions.

    The base alone is asked as the adapter is, unless it has no embeddings for the adapter's tokens.
    Those that others were asked with are `loaded`: a large vocabulary takes 100 MB.
    """
    loaded = {} if loaded is None else loaded
    if subject.speakers:
        tokenizer = _tokenizer(subject.model, subject.speakers, loaded)
        known = text_part(read_json(subject.model / "config.json")).get("vocab_size")
        if not isinstance(known, int) or len(tokenizer) <= known:
            return tokenizer
    return _tokenizer(subject.model, [root for root, _ in subject.adapters], loaded)


Tokenizers: TypeAlias = "dict[tuple[Path, Path, str, Path], PreTrainedTokenizerBase]"
"""By model, folder of the tokenizer, chat template that replaces its own, and whose that is."""


def _tokenizer(
    model: Path, adapters: Sequence[Path], loaded: Tokenizers
) -> PreTrainedTokenizerBase:
    """Return tokenizer and chat template of the last adapter that has them, else the base's."""
    folder, template, author = model, "", model
    for root in adapters:
        files = check_adapter_folder(root)
        if any(name in files for name in _TOKENIZERS):
            folder, template, author = root, "", root
        if own := own_template(root):
            template, author = own, root
    voice = model, folder, template, author
    if voice in loaded:
        return loaded[voice]
    tokenizer = load_tokenizer(folder, padding_side="left")
    if folder != model and not tokenizer.chat_template:
        tokenizer.chat_template, author = load_tokenizer(model).chat_template, model
    if template:
        tokenizer.chat_template = template
    tokenizer.name_or_path = str(author)  # for error messages about the template
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded[voice] = tokenizer
    return tokenizer


def load_network(model: Path, adapters: Sequence[tuple[Path, float]]) -> Model:
    """Load the model in float32 with all adapters active."""
    check_model_folder(model)
    with doing(f"loading {model}"):
        network, weights = skeleton_with_weights(model)
        fill(network, weights)
    if adapters:
        with doing("loading the adapters"), loading(adapters):
            network = with_adapters(network, adapters)
        weigh(network, [weight for _, weight in adapters])
    return network


@contextmanager
def loading(adapters: Sequence[tuple[Path, float]]) -> Iterator[None]:
    """Raise InputRefused for adapters that PEFT cannot run together.

    Of weighted sums its forward pass can compute low-rank terms alone: PEFT scales only B·A, also
    inside DoRA's norms, and activates one set of saved modules.
    """
    whole = ("use_dora", "kasa_config", "modules_to_save", "trainable_token_indices")
    alone = len(adapters) == 1 and adapters[0][1] == 1.0
    for root, _ in () if alone else adapters:
        config = read_adapter_config(root)
        used = [name for name in whole if config.raw.get(name)]
        used += ["bias"] if config.raw.get("bias", "none") != "none" else []
        if config.kind != "LORA" or used:
            raise InputRefused(
                f"{root} is {config.kind} with {', '.join(used) or 'no low-rank factors'}: "
                "PEFT cannot evaluate it unmerged in a weighted sum",
                hint="evaluate it alone at weight 1, or omit the comparison with the adapter",
            )
    try:
        yield
    except IncompatibleAdapters as error:
        together = " and ".join(str(root) for root, _ in adapters)
        raise InputRefused(
            f"PEFT cannot load these adapters together: {together}: {error}",
            hint="evaluate each adapter by itself",
        ) from None


def weigh(network: Model, weights: Sequence[float]) -> None:
    """Multiply what each LoRA adapter adds by its weight."""
    from peft.tuners.lora import LoraLayer

    for layer in network.modules():
        if isinstance(layer, LoraLayer):
            for number, weight in enumerate(weights):
                if (name := f"adapter_{number}") in layer.scaling:
                    layer.scaling[name] *= weight


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, item: Sequence[Message], model: Path, tools: str = ""
) -> list[int]:
    """Return an item's token ids; raise InputRefused if there are none to continue."""
    if tokenizer.chat_template:
        text = render_chat(tokenizer, item, answer=True, tools=tools)
        with doing(f"tokenizing with the tokenizer of {model}"):
            # The template adds the begin token.
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    elif len(item) != 1:
        raise InputRefused(
            f"{model} has no chat template, but an item has {len(item)} messages",
            hint="give plain prompts, or add chat_template.jinja to the model or the adapter",
        )
    else:
        ids = list(tokenizer(item[0]["content"])["input_ids"])
    if not ids:
        raise InputRefused(
            f"a question has no tokens by the tokenizer of {model}: its text is empty",
            hint="remove the question, or give it a text; no model can answer nothing",
        )
    return ids


def _ends(model: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    for path in (model / "generation_config.json", model / "config.json"):
        value = read_json(path).get("eos_token_id") if path.is_file() else None
        given = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int for token in given):
            raise InputRefused(
                f"{path}: eos_token_id is {str(value)[:80]!r}, not a token's number",
                hint="set it to the number of the token that ends an answer, or to a list of them",
            )
        ends += given
    return sorted(set(ends))


def likelihoods(
    subjects: Mapping[str, tuple[UnmergedModel, Sequence[Question]]],
    count: Callable[[int], None] = lambda _: None,
    finished: Callable[[str, list[list[float]]], None] = lambda *_: None,
) -> dict[str, list[list[float]]]:
    """Return each choice's log-likelihood (natural logarithm, float32 forward), item by item.

    A choice continues a plain question's single message as text, after a space, without a chat
    template. The sum is over the tokens that the choice adds to the context. `count` and `finished`
    are called as by `answered`, which also says what it raises.
    """
    stay_offline()
    loaded: Tokenizers = {}
    ask = {}
    for name, (subject, items) in subjects.items():
        tokens = partial(_choice_tokens, speaker(subject, loaded), subject.model)
        pairs = [[tokens(item, choice) for choice in item.choices] for item in items]
        ask[name] = partial(_scores, pairs, count, partial(finished, name))
    return walk({name: subject for name, (subject, _) in subjects.items()}, ask)


def _scores(
    items: Sequence[Sequence[tuple[list[int], int]]],
    count: Callable[[int], None],
    finished: Callable[[list[list[float]]], None],
    network: Model,
    lockstep: Lockstep,
) -> list[list[float]]:
    found = []
    for pairs in items:
        found.append([_score(network, whole, shared) for whole, shared in pairs])
        count(1)
    with lockstep.away():
        finished(found)
    return found


def _choice_tokens(
    tokenizer: PreTrainedTokenizerBase, model: Path, item: Question, choice: str
) -> tuple[list[int], int]:
    """Return the token ids of context plus choice, and the number of context tokens among them."""
    messages: Sequence[Message] = item.messages
    if item.plain:
        context = messages[0]["content"]
        apart = context[-1:].isspace() or choice[:1].isspace()
        before = list(tokenizer(context)["input_ids"])
        whole = list(tokenizer(context + ("" if apart else " ") + choice)["input_ids"])
    else:
        before = prompt_tokens(tokenizer, messages, model)
        whole = before + list(tokenizer(choice, add_special_tokens=False)["input_ids"])
    shared = next(
        (n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b),
        min(len(before), len(whole)),
    )
    return whole, max(1, shared)


@torch.inference_mode()
def _score(network: Model, tokens: Sequence[int], shared: int) -> float:
    """Return the log-likelihood of the tokens after the first `shared` ones."""
    columns = torch.arange(shared - 1, len(tokens) - 1)
    places = (torch.zeros_like(columns), columns)
    parts = some_logits(network, torch.tensor([tokens]), places, use_cache=False)
    rows = (row for part in parts for row in part)
    # Row by row: in float64, all of them can be many times the model's activations.
    scores = [
        torch.log_softmax(row.double(), dim=-1)[token]
        for row, token in zip(rows, tokens[shared:], strict=True)
    ]
    return float(torch.stack(scores).sum()) if scores else 0.0


class AnswerJournal:
    """The tokens of answers that are still being generated, with which a killed job goes on.

    They are drafts: the job that continues reads them in one pass and keeps what the model
    confirms. So a journal that is damaged, or of another model, costs time and changes no answer.

    It is a file of JSON lines `[subject, [[question, position, [token, …]], …]]`; a subject is its
    name and a digest of its prompts. Lines that cannot be read are left out: the
    last one may be incomplete.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._found: dict[str, dict[int, list[int]]] = {}
        if path.is_file() and path.stat().st_size <= _LARGEST_JOURNAL:
            for line in path.read_bytes().splitlines():
                self._replay(line)

    def go_on(self, name: str, questions: Questions) -> None:
        """Use what an interrupted job found as the begin of drafts, and write new tokens down."""
        drafts = dict(questions.drafts)
        for number, written in self.partial_answers(name, questions.prompts).items():
            drafts[number] = [*written, *drafts.get(number, [])[len(written) :]]
        questions.drafts, questions.keep = drafts, self.keep(name, questions.prompts)

    def partial_answers(self, subject: str, prompts: Sequence[Tokens]) -> Mapping[int, list[int]]:
        """Return the tokens that an interrupted job found, by the question's number."""
        return self._found.get(_journal_name(subject, prompts), {})

    def keep(self, subject: str, prompts: Sequence[Tokens]) -> Keep:
        """Return what writes a subject's new tokens down, for the next process."""
        name = _journal_name(subject, prompts)

        def written(rows: Sequence[Written]) -> None:
            # The line before may be incomplete, if that process was killed.
            line = "\n" + json.dumps([name, rows], separators=(",", ":"))
            with self._lock:
                handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                try:
                    os.write(handle, line.encode())
                finally:
                    os.close(handle)

        return written

    def _replay(self, line: bytes) -> None:
        try:
            subject, rows = parse(line)
            for number, position, tokens in rows:
                if not all(type(n) is int and n >= 0 for n in (number, position, *tokens)):
                    continue
                row = self._found.setdefault(str(subject), {}).setdefault(number, [])
                row[position:] = tokens if position <= len(row) else []
        except (ValueError, TypeError):
            return


def _journal_name(subject: str, prompts: Sequence[Tokens]) -> str:
    asked = [list(prompt) for prompt in prompts]
    return f"{subject} {sha256(json.dumps(asked).encode()).hexdigest()[:16]}"
