"""Reference answers: base, or base with unmerged adapters, greedy, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import read_json
from weightsmith.core.time_limits import doing
from weightsmith.core.values import Json
from weightsmith.forward.adapters import IncompatibleAdapters, with_adapters
from weightsmith.forward.greedy import Answers, Questions, greedy
from weightsmith.forward.libraries import load_tokenizer, stay_offline
from weightsmith.forward.lockstep import Lockstep
from weightsmith.forward.network import fill, skeleton_with_weights
from weightsmith.forward.views import view
from weightsmith.forward.walk import Count, Progress, walk
from weightsmith.merging.adapter_config import read_adapter_config
from weightsmith.merging.answer_journal import AnswerJournal
from weightsmith.models.facts import text_part
from weightsmith.models.folder import check_adapter_folder, check_model_folder
from weightsmith.models.templates import own_template, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from weightsmith.forward.kinds import Model

Message = Mapping[str, str]

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


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
    def source(self) -> Path:
        """The folder, whose matrices are read once for all subjects."""
        return self.model

    def streamed(self, lockstep: Lockstep, number: int) -> Model:
        """Return the model with its weights in files; raise InputRefused if one is missing."""
        check_model_folder(self.model)
        with _loading(self.adapters):
            network = view(self.model, self.adapters, lockstep, number)
        _weigh(network, [weight for _, weight in self.adapters])
        return network

    def whole(self) -> Model:
        """Return the model with its weights in memory."""
        return load_network(self.model, self.adapters)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A subject, its chats, and the maximum length of an answer in tokens."""

    subject: UnmergedModel
    items: Sequence[Sequence[Message]]
    max_tokens: int


def answer(
    model: Path,
    adapters: Sequence[tuple[Path, float]],
    items: Sequence[Sequence[Message]],
    max_tokens: int,
    progress: Progress | None = None,
) -> list[dict[str, Json]]:
    """Return one greedy answer per item of a single subject; see `answers`."""
    subject = UnmergedModel(model=model, adapters=tuple(adapters))
    return answers({"": subject}, items, max_tokens, progress)[""]


def answers(
    subjects: Mapping[str, UnmergedModel],
    items: Sequence[Sequence[Message]],
    max_tokens: int,
    progress: Progress | None = None,
    *,
    batch_bytes: int = 0,
) -> dict[str, list[dict[str, Json]]]:
    """Return one greedy answer per item of each subject, in order; see `answered`."""
    asked = {
        name: GenerationRequest(subject=one, items=items, max_tokens=max_tokens)
        for name, one in subjects.items()
    }
    count = Count(len(items) * len(subjects), progress)
    found = answered(asked, count, batch_bytes=batch_bytes)
    return {name: one.rows for name, one in found.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One subject's answers."""

    rows: list[dict[str, Json]]
    """Per item; `answered` says what each has."""
    texts: tuple[tuple[Sequence[int], Sequence[int]], ...]
    """Per item, the tokens that were asked and those of the answer."""


def answered(
    subjects: Mapping[str, GenerationRequest],
    count: Callable[[int], None] = lambda _: None,
    *,
    batch_bytes: int = 0,
    journal: AnswerJournal | None = None,
    finished: Callable[[str, list[dict[str, Json]]], None] = lambda *_: None,
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
    loaded = dict[Voice, Any]()
    asked = {name: _asked(one, loaded) for name, one in subjects.items()}
    found: dict[str, Answered] = {}
    for round_ in (False, True):
        names = [name for name, one in asked.items() if bool(one.subject.draft) is round_]
        for name in names:
            asked[name].questions.drafts = _drafts(asked[name], found)
            if journal:
                _go_on(name, asked[name].questions, journal)
            if batch_bytes:
                asked[name].questions.batch_bytes = batch_bytes // len(names)
        chosen = {name: asked[name].subject for name in names}
        ask = {
            name: partial(_answered, asked[name], count, partial(finished, name)) for name in names
        }
        found |= walk(chosen, ask) if names else {}
    return {name: found[name] for name in subjects}


@dataclass(slots=True, kw_only=True)
class _Asked:
    subject: UnmergedModel
    tokenizer: Any
    questions: Questions


def _asked(one: GenerationRequest, loaded: dict[Voice, PreTrainedTokenizerBase]) -> _Asked:
    subject, tokenizer = one.subject, speaker(one.subject, loaded)
    questions = Questions(
        prompts=[prompt_tokens(tokenizer, item, subject.model) for item in one.items],
        ends=_ends(subject.model, tokenizer),
        most=one.max_tokens,
    )
    return _Asked(subject=subject, tokenizer=tokenizer, questions=questions)


def _drafts(asked: _Asked, found: Mapping[str, Answered]) -> Mapping[int, Sequence[int]]:
    """Return the tokens of probable answers by question index."""
    if asked.subject.draft in found:
        return {n: answer for n, (_, answer) in enumerate(found[asked.subject.draft].texts)}
    end = asked.questions.ends[:1]
    return {
        number: [*asked.tokenizer(text, add_special_tokens=False)["input_ids"], *end]
        for number, text in enumerate(asked.subject.draft_texts)
        if text
    }


def _go_on(name: str, questions: Questions, kept: AnswerJournal) -> None:
    """Use what an interrupted job found as the begin of drafts, and write new tokens down."""
    drafts = dict(questions.drafts)
    for number, written in kept.partial_answers(name, questions.prompts).items():
        drafts[number] = [*written, *drafts.get(number, [])[len(written) :]]
    questions.drafts, questions.keep = drafts, kept.keep(name, questions.prompts)


def _answered(
    asked: _Asked,
    count: Callable[[int], None],
    finished: Callable[[list[dict[str, Json]]], None],
    network: Model,
    lockstep: Lockstep,
) -> Answered:
    found = greedy(network, asked.questions, count)
    with lockstep.away():
        rows = _texts(asked, found)
        finished(rows)
    return Answered(rows=rows, texts=tuple(zip(asked.questions.prompts, found.tokens, strict=True)))


def _texts(asked: _Asked, found: Answers) -> list[dict[str, Json]]:
    texts = asked.tokenizer.batch_decode(found.tokens, skip_special_tokens=True)
    ends = set(asked.questions.ends)
    return [
        {
            "answer": str(text),
            "finish_reason": "stop" if set(row) & ends else "length",
            "prompt_tokens": len(prompt),
            "token_ends": " ".join(map(str, _token_ends(asked.tokenizer, row))),
            "margins": " ".join(f"{round(margin, 4):g}" for margin in margins),
        }
        for text, row, margins, prompt in zip(
            texts, found.tokens, found.margins, asked.questions.prompts, strict=True
        )
    ]


def _token_ends(tokenizer: PreTrainedTokenizerBase, row: Sequence[int]) -> list[int]:
    """Return how many characters of the answer each token completes."""
    starts = [row[:count] for count in range(1, len(row) + 1)]
    return [len(text) for text in tokenizer.batch_decode(starts, skip_special_tokens=True)]


def speaker(subject: UnmergedModel, loaded: dict[Voice, Any] | None = None) -> Any:
    """Return the tokenizer and chat template that word a subject's questions.

    The base alone is asked as the adapter is, unless it has no embeddings for the adapter's tokens.
    Those that others were asked with are `loaded`: a large vocabulary takes 100 MB.
    """
    loaded = {} if loaded is None else loaded
    if subject.speakers:
        voice = voice_of(subject.model, [(root, 1.0) for root in subject.speakers])
        tokenizer = _tokenizer_in(voice, loaded)
        known = text_part(read_json(subject.model / "config.json")).get("vocab_size")
        if not isinstance(known, int) or len(tokenizer) <= known:
            return tokenizer
    return _tokenizer_in(voice_of(subject.model, subject.adapters), loaded)


Voice = tuple[Path, Path, str, Path]
"""A model, the folder of the tokenizer, a chat template that replaces its own, and whose it is."""


def voice_of(model: Path, adapters: Sequence[tuple[Path, float]]) -> Voice:
    """Return tokenizer and chat template of the last adapter that has them, else the base's."""
    folder, template, author = model, "", model
    for root, _ in adapters:
        files = check_adapter_folder(root)
        if any(name in files for name in _TOKENIZERS):
            folder, template, author = root, "", root
        if own := own_template(root):
            template, author = own, root
    return model, folder, template, author


def _tokenizer_in(voice: Voice, loaded: dict[Voice, Any]) -> Any:
    if voice not in loaded:
        loaded[voice] = tokenizer_of(voice)
    return loaded[voice]


def tokenizer_of(voice: Voice) -> PreTrainedTokenizerBase:
    """Load a tokenizer with its chat template."""
    model, folder, template, author = voice
    tokenizer = load_tokenizer(folder, padding_side="left")
    if folder != model and not tokenizer.chat_template:
        tokenizer.chat_template, author = load_tokenizer(model).chat_template, model
    if template:
        tokenizer.chat_template = template
    tokenizer.name_or_path = str(author)  # for error messages about the template
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_network(model: Path, adapters: Sequence[tuple[Path, float]]) -> Model:
    """Load the model in float32 with all adapters active."""
    check_model_folder(model)
    with doing(f"loading {model}"):
        network, weights = skeleton_with_weights(model)
        fill(network, weights)
    if adapters:
        with doing("loading the adapters"), _loading(adapters):
            network = with_adapters(network, adapters)
        _weigh(network, [weight for _, weight in adapters])
    return network


@contextmanager
def _loading(adapters: Sequence[tuple[Path, float]]) -> Iterator[None]:
    """Raise InputRefused for adapters that PEFT cannot run together."""
    _check_together(adapters)
    try:
        yield
    except IncompatibleAdapters as error:
        together = " and ".join(str(root) for root, _ in adapters)
        raise InputRefused(
            f"PEFT cannot load these adapters together: {together}: {error}",
            hint="evaluate each adapter by itself",
        ) from None


def _weigh(network: Model, weights: Sequence[float]) -> None:
    """Scale each adapter's delta by its weight."""
    from peft.tuners.lora import LoraLayer

    for layer in network.modules():
        if isinstance(layer, LoraLayer):
            for number, weight in enumerate(weights):
                if (name := f"adapter_{number}") in layer.scaling:
                    layer.scaling[name] *= weight


def _check_together(adapters: Sequence[tuple[Path, float]]) -> None:
    """Refuse weighted sums that PEFT's forward pass cannot compute: only low-rank terms work.

    PEFT scales only B·A, also inside DoRA's norms, and activates one set of saved modules.
    """
    if len(adapters) == 1 and adapters[0][1] == 1.0:
        return
    whole = ("use_dora", "kasa_config", "modules_to_save", "trainable_token_indices")
    for root, _ in adapters:
        config = read_adapter_config(root)
        used = [name for name in whole if config.raw.get(name)]
        used += ["bias"] if config.raw.get("bias", "none") != "none" else []
        if config.kind != "LORA" or used:
            raise InputRefused(
                f"{root} is {config.kind} with {', '.join(used) or 'no low-rank factors'}: "
                "PEFT cannot evaluate it unmerged in a weighted sum",
                hint="evaluate it alone at weight 1, or omit the comparison with the adapter",
            )


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, item: Sequence[Message], model: Path
) -> list[int]:
    """Return an item's token ids; raise InputRefused if there are none to continue."""
    if ids := _prompt_tokens(tokenizer, item, model):
        return ids
    raise InputRefused(
        f"a question has no tokens by the tokenizer of {model}: its text is empty",
        hint="remove the question, or give it a text; no model can answer nothing",
    )


def _prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, item: Sequence[Message], model: Path
) -> list[int]:
    if tokenizer.chat_template:
        text = render_chat(tokenizer, item, answer=True)
        with doing(f"tokenizing with the tokenizer of {model}"):
            # The template adds the begin token.
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(item) != 1:
        raise InputRefused(
            f"{model} has no chat template, but an item has {len(item)} messages",
            hint="give plain prompts, or add chat_template.jinja to the model or the adapter",
        )
    return list(tokenizer(item[0]["content"])["input_ids"])


def _ends(model: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the end tokens of the model's configurations and the tokenizer."""
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
