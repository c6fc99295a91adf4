"""The jobs of builders: a value for each kind of job, and its JSON form.

A job identifies its inputs by content, so that a runner on another machine can fetch and verify
them. A runner on this machine reads them in place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeAlias

from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.json_objects import read_exactly
from weightsmith.core.merge_options import Merge
from weightsmith.core.values import (
    Checkpoint,
    FileEntry,
    Json,
    JsonValue,
    Tree,
    UnreadDigest,
    plain,
)

Chat: TypeAlias = tuple[Mapping[str, str], ...]
"""Messages, each with `role` and `content`."""
Row: TypeAlias = Mapping[str, Json]
"""`{"text": …}` or `{"messages": […]}`: a text for calibration or evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """A file or folder that a job reads: its path, and its content if known."""

    path: Path
    files: tuple[FileEntry, ...] | None = None
    """Its files by path relative to `path` (`.` for `path` itself); None if any has no digest."""

    def at(self, path: Path) -> Self:
        """Return the same content at another path."""
        return replace(self, path=path)

    @classmethod
    def tree(cls, tree: Tree) -> Self:
        """Return a folder as an input; all its files must be inside its root."""
        unread = any(isinstance(entry.digest, UnreadDigest) for entry in tree.files)
        return cls(path=tree.root, files=None if unread else tree.files)

    @classmethod
    def checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Return the files of a checkpoint that are there as an input."""
        return cls.tree(checkpoint.computed.tree if checkpoint.computed else checkpoint.tree)

    @classmethod
    def file(cls, tree: Tree, name: str) -> Self:
        """Return one file of a tree as an input."""
        (entry,) = (entry for entry in tree.files if entry.path == name)
        return cls(path=tree.path(name), files=(replace(entry, path="."),))


@dataclass(frozen=True, slots=True, kw_only=True)
class Virtual:
    """What computes the weights of an input whose files have none."""

    base: Input
    adapters: tuple[Input, ...]
    weights: tuple[float, ...]
    """One per adapter."""
    options: Merge
    digests: Mapping[str, str] = field(default_factory=dict)
    """File -> sha256 in hex of what the merge computed."""
    largest: Mapping[str, float] = field(default_factory=dict)
    """Matrix -> its largest magnitude, where the merge has recorded it."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self | None:
        """Return what computes a checkpoint's weights; None if they are in its files."""
        if (computed := checkpoint.computed) is None:
            return None
        adapters = computed.sources.adapters
        return cls(
            base=Input.tree(computed.sources.base.tree),
            adapters=tuple(Input.tree(adapter.snapshot.tree) for adapter in adapters),
            weights=tuple(adapter.weight for adapter in adapters),
            options=Merge(**computed.merge),
            digests={
                file.path: str(file.digest).removeprefix("sha256:")
                for file in checkpoint.tree.files
                if file.path.endswith(".safetensors")
            },
            largest=computed.largest,
        )

    @property
    def weighted(self) -> tuple[tuple[Path, float], ...]:
        """Each adapter's folder and weight, in order."""
        paths = (given.path for given in self.adapters)
        return tuple(zip(paths, self.weights, strict=True))

    @property
    def inputs(self) -> Mapping[str, Input]:
        """Its inputs by name."""
        numbered = {f"virtual_adapter{n}": given for n, given in enumerate(self.adapters)}
        return {"virtual_base": self.base, **numbered}

    def at(self, inputs: Mapping[str, Input]) -> Self:
        """Return the same with the inputs at other paths."""
        adapters = tuple(inputs[f"virtual_adapter{n}"] for n in range(len(self.adapters)))
        return replace(self, base=inputs["virtual_base"], adapters=adapters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that a heavy stage needs; a runner sends it to a builder."""

    kind: ClassVar[str]
    builder: str
    output: Path
    """An existing folder, empty or from an interrupted run; the job writes only there."""
    seconds: int
    """Time limit in seconds, from `time_limits.job_seconds`; 0 for none."""
    memory_bytes: int = 0
    """Memory limit in bytes; 0 for none."""
    use_gpu: bool = False
    virtual: Virtual | None = None
    """What computes the weights of an input without any."""

    @property
    def inputs(self) -> Mapping[str, Input]:
        """The job's inputs by field; several adapters are `adapter0`, `adapter1` and so on."""
        own = {name: given for each in fields(self) for name, given in self._given(each.name)}
        return {**own, **(self.virtual.inputs if self.virtual else {})}

    def at(self, inputs: Mapping[str, Input], output: Path) -> Self:
        """Return the same job with inputs and output at other paths, such as a builder's."""
        moved: dict[str, Any] = {}
        for each in fields(self):
            if isinstance(job := getattr(self, each.name), Job):
                inner = {name: inputs[f"{each.name}_{name}"] for name in job.inputs}
                moved[each.name] = job.at(inner, output)
            elif found := tuple(inputs[name] for name, _ in self._given(each.name)):
                several = isinstance(getattr(self, each.name), tuple)
                moved[each.name] = found if several else found[0]
        virtual = self.virtual.at(inputs) if self.virtual else None
        return replace(self, output=output, virtual=virtual, **moved)

    def _given(self, name: str) -> Iterator[tuple[str, Input]]:
        value = getattr(self, name)
        if isinstance(value, Job):
            yield from ((f"{name}_{inner}", each) for inner, each in value.inputs.items())
        elif isinstance(value, Input):
            yield name, value
        elif isinstance(value, tuple):
            numbered = ((f"{name.removesuffix('s')}{i}", each) for i, each in enumerate(value))
            yield from ((name, each) for name, each in numbered if isinstance(each, Input))


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfAdapters(Job):
    adapters: tuple[Input, ...]
    weights: tuple[float, ...]
    """One per adapter."""

    @property
    def weighted(self) -> tuple[tuple[Path, float], ...]:
        """Each adapter's folder and weight, in the recipe's order."""
        return tuple(
            (given.path, weight) for given, weight in zip(self.adapters, self.weights, strict=True)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeJob(_OfAdapters):
    """Merge adapters into a base."""

    kind = "merge"
    base: Input
    options: Merge
    keep_adapter: bool = False
    """Write the combined adapter instead."""
    headers_only: bool = False
    """Compute and check the weights, but write only headers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CombinationRule:
    """How a method combines the deltas that it keeps at an element, or truncates their sum."""

    gain: float = 1.0
    """Factor on kept deltas: DARE divides them by the density."""
    mean: bool = False
    """Kept deltas are averaged, not summed."""
    truncates: bool = False
    """All deltas are summed, and the sum's largest singular values kept."""
    rank: int | None = None
    """How many singular values; default: the largest adapter rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidateJob(_OfAdapters):
    """Compare a merged checkpoint with base and adapters."""

    kind = "validate"
    base: Input
    merged: Input
    chats: tuple[Chat, ...]
    """Chats to compare logits on; built-in ones if there are none."""
    scope: str
    """What to compare with base and adapters: `all`, `rest` or `files`; see `validating`."""
    mixture: CombinationRule | None


Pooled: TypeAlias = Literal["", "vectors", "label", "label-set", "word-labels", "relevance"]
"""What models that do not chat say of texts: a vector for each; a label; all labels that are true
of it; a label for each word; a number for each document of a query. Empty for models that answer in
words."""
_WITHIN = "\N{NO-BREAK SPACE}"
"""Stands for a blank in a label of a word."""


def words_text(labels: Iterable[str]) -> str:
    """Return the labels of words as one text, with a blank between them and none within."""
    return " ".join(label.replace(" ", _WITHIN) for label in labels)


def words_labels(text: str) -> list[str]:
    """Return the labels in such a text."""
    return [label.replace(_WITHIN, " ") for label in text.split(" ")]


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenPicture:
    """A picture in a chat: its file, the size that its header says, and its place."""

    file: str
    """In the job's folder of pictures: its digest and format."""
    name: str
    """What the user calls it."""
    width: int
    height: int
    """In pixels."""
    message: int = 0
    """Number of the message that it is in."""
    at: int = 0
    """Characters of that message's text before it."""


def in_parts(
    chat: Chat, pictures: Sequence[SeenPicture], part: Callable[[int], JsonValue]
) -> list[dict[str, JsonValue]]:
    """Return messages, with contents in parts where they have pictures, as in OpenAI's API.

    `part` makes that of the picture with this number.
    """
    found: list[dict[str, JsonValue]] = []
    for number, message in enumerate(chat):
        mine = [(place, one.at) for place, one in enumerate(pictures) if one.message == number]
        if not mine:
            found.append(dict(message))
            continue
        text, parts, begin = message["content"], list[JsonValue](), 0
        for place, at in mine:
            parts += [*_text_part(text[begin:at]), part(place)]
            begin = at
        found.append({**message, "content": [*parts, *_text_part(text[begin:])]})
    return found


def _text_part(text: str) -> list[JsonValue]:
    return [{"type": "text", "text": text}] if text else []


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question of a task, without the answers that count as right."""

    messages: Chat
    """A text that gets a vector is one message, whose role is `query` or `document`."""
    choices: tuple[str, ...] = ()
    """Answers to choose from."""
    plain: bool = False
    """The choices continue the one message as text, without a chat template."""
    tools: str = ""
    """Tools that the model may call, as JSON; the answer then keeps its special tokens."""
    parts: tuple[str, ...] = ()
    """Words of the text that get labels, or documents of the query."""
    pictures: tuple[SeenPicture, ...] = ()
    """In their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedModel:
    """A model to query: a checkpoint with unmerged adapters, each with its weight."""

    name: str
    key: str
    """The digest of all that its answers depend on, by which they are returned."""
    model: int
    """Index of the job's model."""
    adapters: tuple[int, ...] = ()
    """Indices of the job's adapters."""
    weights: tuple[float, ...] = ()
    """One per adapter."""
    speakers: tuple[int, ...] = ()
    """Indices of adapters whose tokenizer and chat template word the questions; none: its own."""
    draft: str = ""
    """Key of another model in the walk that probably gives the same answers."""
    draft_texts: tuple[str, ...] = ()
    """Drafts of this model's answers, if they are already known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedTask:
    """Models that are asked the same questions."""

    models: tuple[AskedModel, ...]
    questions: tuple[Question, ...]
    max_tokens: int
    """Maximum length of an answer."""
    pooled: Pooled = ""
    prompts: tuple[str, str] = ("", "")
    """Put before queries and documents that get vectors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedWalk:
    """Tasks whose models answer in one walk over the weights."""

    tasks: tuple[AskedTask, ...]
    choose: bool
    """Return each choice's log-likelihood instead of an answer."""
    batch_bytes: int = 0
    """Memory for the texts that are read at a time, of all models together; 0: a usual amount."""


ANSWER_JOURNAL = ".answers.jsonl"
"""File in a reference job's output: the tokens so far, with which an interrupted job goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceJob(Job):
    """Ask several models questions, in few walks over their weights, one after another."""

    kind = "reference"
    models: tuple[Input, ...]
    adapters: tuple[Input, ...]
    walks: tuple[AskedWalk, ...]
    pictures: Input | None = None
    """The folder of the questions' pictures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofJob(Job):
    """Run a reference job and a validation in one process, the second with the first's answers."""

    kind = "proof"
    reference: ReferenceJob
    validation: ValidateJob


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportGgufJob(Job):
    """Convert a GGUF file to a checkpoint."""

    kind = "import-gguf"
    gguf: Input


@dataclass(frozen=True, slots=True, kw_only=True)
class SiblingFormat:
    """Another format to make in the same job; its files are in a folder `.FORMAT` of the output."""

    format: str
    options: Mapping[str, Json]

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return f".{self.format}"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeJob(Job):
    """Quantize a checkpoint to one format."""

    kind = "quantize"
    model: Input
    quantizer: str
    """A module of `weightsmith.quantizers`."""
    format: str
    name: str
    """The model's name, and the output file's without suffix."""
    options: Mapping[str, Json]
    """Options of the format."""
    texts: tuple[Row, ...] = ()
    """Calibration texts, if the format needs them."""
    statistics: Input | None = None
    """An existing measurement, such as an importance matrix."""
    measured_on: Input | None = None
    """The checkpoint that importance is measured on, if it is another one."""
    losses: Input | None = None
    """An existing measurement of what each type of each matrix loses."""
    siblings: tuple[SiblingFormat, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheScalesJob(Job):
    """Measure the scales of an 8-bit KV cache."""

    kind = "cache-scales"
    model: Input
    texts: tuple[Row, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertAdaptersJob(Job):
    """Convert LoRA adapters of one base to GGUF, each into a folder of the output."""

    kind = "convert-adapters"
    base: Input
    adapters: tuple[Input, ...]
    folders: tuple[str, ...]
    """One per adapter: its name stands for the adapter's content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityJob(Job):
    """Measure how far a quantized model is from its checkpoint."""

    kind = "quality"
    model: Input
    artifact: Input
    quantizer: str
    texts: tuple[Row, ...]
    tokens: int
    """Number of tokens of the texts to measure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DequantizedTask:
    """A task for a model's dequantized weights."""

    questions: tuple[Question, ...]
    max_tokens: int
    """Maximum length of an answer."""
    choose: bool
    """Return each choice's log-likelihood instead of an answer."""
    drafts: tuple[str, ...] = ()
    """Its probable answers, which save passes over the weights and change nothing."""
    adapters: tuple[int, ...] = ()
    """Indices of the job's adapters that are applied to the weights, unmerged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DequantizedJob(Job):
    """Ask a quantized model's weights, dequantized, in the network of its checkpoint."""

    kind = "dequantized"
    model: Input
    artifact: Input
    quantizer: str
    adapters: tuple[Input, ...] = ()
    tasks: tuple[DequantizedTask, ...]
    """Those that are not to choose are asked in one walk over the weights."""
    batch_bytes: int = 0
    """Memory for the questions that are answered together; 0 for a default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportEngineJob(Job):
    """Copy an engine's programs, compiled by the builder, to the output."""

    kind = "export-engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadCallsJob(Job):
    """Let an engine's own parsers read back the calls and thoughts that a chat template writes."""

    kind = "read-calls"
    model: Input
    """Its tokenizer and its chat template."""
    packages: Input
    """The engine's Python packages, which are loaded in place of the builder's."""
    parsers: tuple[str, ...]
    thoughts: str
    """The parser for thoughts; "" for none."""
    tools: tuple[Row, ...]
    chats: tuple[Row, ...]
    """Each `{name, said, calls}`, and `thoughts` if the message has some."""
    reasoners: tuple[str, ...] = ()
    """Parsers of thoughts that are asked."""
    thinking: Row = field(default_factory=dict)
    """What they are asked: `{said, thoughts}`, an answer without a call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimeJob(Job):
    """Measure how long one layer of a model takes, for several counts of tokens."""

    kind = "layer_time"
    model: Input
    counts: tuple[int, ...]


_KINDS: Mapping[str, type[Job]] = {
    each.kind: each
    for each in (
        MergeJob,
        ValidateJob,
        ReferenceJob,
        ProofJob,
        ImportGgufJob,
        QuantizeJob,
        CacheScalesJob,
        ConvertAdaptersJob,
        QualityJob,
        DequantizedJob,
        ExportEngineJob,
        ReadCallsJob,
        LayerTimeJob,
    )
}


def out_of_memory(job: Job, what: str = "ran out of memory") -> EnvironmentFailure:
    """Return the error of a job that needed more memory than it may use or than there is."""
    limit = f" (limit {job.memory_bytes:,} bytes)" if job.memory_bytes else ""
    return EnvironmentFailure(
        f"the {job.kind} job {what}{limit}",
        hint="raise --memory if more is free, close other programs, or use a machine with more "
        "memory; `plan` shows what each stage needs",
    )


def write_job(job: Job) -> str:
    """Return a job as JSON text."""
    return json.dumps({"kind": job.kind, "job": plain(job)}, ensure_ascii=False)


def read_job(text: str) -> Job:
    """Return the job that `write_job` wrote; raise ValueError, with the place, if invalid."""
    data = json.loads(text)
    if not isinstance(data, dict) or data.get("kind") not in _KINDS:
        raise ValueError(f"kind: not one of {', '.join(_KINDS)}: {text[:80]}")
    kind = data["kind"]
    return read_exactly(_KINDS[kind], data.get("job"), kind)
