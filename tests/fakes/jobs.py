"""What each stage's job answers, without torch and without a builder: small, and always alike.

A merge is a real one, by the numpy kernel. Everything else has the shape of the real result and
files whose bytes depend on what the job was given, and on nothing else.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from weightsmith.core.jobs import (
    AskedModel,
    AskedTask,
    CacheScalesJob,
    ConvertAdaptersJob,
    DequantizedJob,
    ExportEngineJob,
    QuantizeJob,
    Question,
    ReadCallsJob,
    ReferenceJob,
    SiblingFormat,
)
from weightsmith.core.values import Digest, Json, canonical
from weightsmith.core.vectors import packed
from weightsmith.models.gguf_config import projector_name
from weightsmith.models.reshard import kind_of
from weightsmith.models.safetensors import build_header
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers import formats, gguf_lora, of_format
from weightsmith.worker.jobs import STAGES

Report = Callable[[int, int, str], None]
NOTHING = "I do not know."


@dataclass
class Minds:
    """Who knows which answers. The base knows none, an adapter those that are its own."""

    facts: Mapping[str, tuple[str, str]]
    """Question -> the adapter that was taught it, empty for what the base knows; the answer."""
    forgot: dict[str, set[str]] = field(default_factory=dict)
    """Subject -> questions that it answers wrongly all the same."""
    vectors: Callable[[str, str], list[float]] = lambda who, text: [1.0]
    """What a subject makes of a text that gets a vector."""
    judge: Callable[[str, str, Sequence[str]], str] = lambda who, text, parts: "LABEL_0"
    """What a subject with a head says of a text and its parts: labels, or documents' scores."""

    def answer(self, who: str, adapters: tuple[str, ...], question: str) -> str:
        """Return what one answers to whom these adapters were added."""
        teacher, text = self.facts.get(question, ("", NOTHING))
        lost = question in self.forgot.get(who, ())
        knows = not teacher or teacher in adapters
        return text if knows and not lost else NOTHING


@dataclass
class Bench:
    """The stages of a worker; a test changes what they find."""

    base: Path
    minds: Minds
    valid: dict[str, Json] = field(default_factory=lambda: dict(VALID))
    carried: int = 0
    """So many of the merged model's answers are carried over."""
    quality: dict[str, Json] = field(default_factory=lambda: dict(QUALITY))
    quantized: dict[str, Json] = field(default_factory=dict)
    """Further facts of a quantization, such as `warnings`."""
    read_calls: Callable[[ReadCallsJob], Mapping[str, Json]] = lambda job: {"read": {}}
    """What an engine's own parsers read back."""
    padding: int = 0
    """Bytes that quantized weights have too many."""
    programs: list[str] = field(default_factory=lambda: ["llama-server"])
    """Of llama.cpp's engine."""

    @property
    def stages(self) -> Mapping[str, Callable[[Any, Report], Mapping[str, Json]]]:
        return {
            "merge": STAGES["merge"],
            "validate": lambda job, report: self.valid,
            "reference": self._reference,
            "proof": lambda job, report: {
                "validation": self.valid,
                **self._reference(job.reference, report),
            },
            "quantize": self._quantize,
            "cache-scales": _cache_scales,
            "quality": lambda job, report: self.quality,
            "dequantized": self._dequantized,
            "export-engine": self._export_engine,
            "convert-adapters": _convert_adapters,
            "read-calls": lambda job, report: self.read_calls(job),
            "layer_time": lambda job, report: {
                "layers": 80,
                "counts": list(job.counts),
                "layer": [0.5, 8.0],
                "head": [0.1, 1.0],
            },
        }

    def _reference(self, job: ReferenceJob, report: Report) -> Mapping[str, Json]:
        report(1, 1, "items")
        tasks = [task for walk in job.walks for task in walk.tasks]
        return {
            "answers": {
                one.key: self._answers(job, task, one) for task in tasks for one in task.models
            }
        }

    def _dequantized(self, job: DequantizedJob, report: Report) -> Mapping[str, Json]:
        if "skipped" in self.quality:  # what the gate cannot read cannot be asked
            return self.quality
        adapters = tuple(teacher for teacher, _ in self.minds.facts.values())
        said = [self._said("dequantized", adapters, task.questions) for task in job.tasks]
        return {"answers": said}

    def _answers(
        self, job: ReferenceJob, task: AskedTask, asked: AskedModel
    ) -> list[dict[str, Json]]:
        adapters = tuple(job.adapters[number].path.name for number in asked.adapters)
        model = job.models[asked.model].path
        who = "adapter" if adapters else "base" if model == self.base else "merged"
        if task.pooled == "vectors":
            return [self._vector(who, task, one.messages[0]) for one in task.questions]
        if task.pooled:
            judge = self.minds.judge
            texts = [(one.messages[0]["content"], one.parts) for one in task.questions]
            return [{"answer": judge(who, *text), "prompt_tokens": 3} for text in texts]
        if who == "merged":
            adapters = tuple(teacher for teacher, _ in self.minds.facts.values())
        folder = job.pictures.path if job.pictures else None
        said = self._said(who, adapters, task.questions, folder)
        few = self.carried if who == "merged" else 0
        return [{**row, "carried": 0.22} if n < few else {**row} for n, row in enumerate(said)]

    def _vector(self, who: str, task: AskedTask, message: Mapping[str, str]) -> dict[str, Json]:
        prompt = task.prompts[message["role"] == "document"]
        vector = self.minds.vectors(who, prompt + message["content"])
        return {"answer": packed(vector), "prompt_tokens": 3}

    def _said(
        self,
        who: str,
        adapters: tuple[str, ...],
        questions: Sequence[Question],
        folder: Path | None = None,
    ) -> list[dict[str, str]]:
        asked = [_words(each, folder) for each in questions]
        answers = [self.minds.answer(who, adapters, question) for question in asked]
        return [{"answer": text, "finish_reason": "stop"} for text in answers]

    def _quantize(self, job: QuantizeJob, report: Report) -> Mapping[str, Json]:
        format_, source = formats()[job.format], job.model.path
        statistics = of_format(format_.name).statistics
        measured, texts = b"", job.texts
        if job.statistics:
            measured, texts = job.statistics.path.read_bytes(), ()
        elif texts and statistics:
            measured, texts = digest_of(texts), ()
            (job.output / statistics).write_bytes(measured)
        if of_format(format_.name).weighs(job.options) and not job.losses:
            losses = job.output / of_format(format_.name).losses
            losses.write_bytes(digest_of([job.texts, job.options["imatrix"]]))
        told = [job.quantizer, job.format, job.name, job.options, texts, measured.hex()]
        tensors = CheckpointTensors(source)
        model = {name: Digest.of(tensors.array(name).tobytes()) for name in tensors.names}
        weights = digest_of([model, told]) * 4096
        report(1, 1, "steps")
        if job.options.get("shared_layers"):
            return self._parts(job, tensors, [job.format, measured.hex()])
        if format_.suffix == ".gguf":
            name = f"{job.name}.gguf"
        else:
            name = "model.safetensors"
            for path in source.iterdir():
                if path.name != name:
                    shutil.copy(path, job.output)
        weights += bytes(self.padding)
        if format_.suffix != ".gguf":
            weights = build_header([("weights", "U8", (len(weights),))], {}) + weights
        (job.output / name).write_bytes(weights)
        if job.options.get("projector"):
            (job.output / projector_name(name)).write_bytes(digest_of(model) * 64)
        facts = {"file": name, "bits_per_weight": 4.9, "warnings": [], **self.quantized}
        siblings = {one.format: self._sibling(job, one, report) for one in job.siblings}
        return {**facts, "siblings": siblings} if siblings else facts

    def _parts(
        self, job: QuantizeJob, tensors: CheckpointTensors, told: list[Json]
    ) -> Mapping[str, Json]:
        """Write a GGUF file for each kind of tensor, after one that depends on the model's name."""
        kinds: dict[str, bytes] = {}
        for name in sorted(tensors.names):
            kinds[kind_of(name)] = kinds.get(kind_of(name), b"") + tensors.array(name).tobytes()
        names = [f"model-{n:05}-of-{len(kinds) + 1:05}.gguf" for n in range(1, len(kinds) + 2)]
        (job.output / names[0]).write_bytes(digest_of(job.name))
        for name, data in zip(names[1:], kinds.values(), strict=True):
            part = digest_of([Digest.of(data), told])
            (job.output / name).write_bytes(part * (len(data) // len(part) // 2))
        found = {name: [kind] for name, kind in zip(names[1:], kinds, strict=True)}
        return {"file": names[0], "bits_per_weight": 8, "warnings": [], "kinds": found}

    def _sibling(
        self, job: QuantizeJob, other: SiblingFormat, report: Report
    ) -> Mapping[str, Json]:
        """Quantize as a job of its own would; it has no texts if it needs none."""
        folder = job.output / other.folder
        folder.mkdir()
        alone = replace(job, format=other.format, options=other.options, output=folder, siblings=())
        if other.options.get("imatrix", "off") == "off":
            alone = replace(alone, texts=(), statistics=None)
        found = self._quantize(alone, report)
        if statistics := of_format(other.format).statistics:
            (folder / statistics).unlink(missing_ok=True)
        return found

    def _export_engine(self, job: ExportEngineJob, report: Report) -> Mapping[str, Json]:
        for name in self.programs:
            (job.output / name).write_bytes(b"\x7fELF " + name.encode())
        return {}


def seen_as(picture: Digest) -> str:
    """Return the word for a picture in a question that a mind knows."""
    return f"<{picture.short}>"


def _words(question: Question, folder: Path | None) -> str:
    """Return the text of a question's last message, with words for the pictures before it."""
    seen = []
    for one in question.pictures:
        assert folder
        seen.append(seen_as(Digest.of((folder / one.file).read_bytes())))
    return " ".join([*seen, question.messages[-1]["content"]])


def _cache_scales(job: CacheScalesJob, report: Report) -> Mapping[str, Json]:
    report(1, 1, "layers")
    return {"scales": {"model.layers.0.self_attn": [0.5, 0.25]}}


def _convert_adapters(job: ConvertAdaptersJob, report: Report) -> Mapping[str, Json]:
    for folder, adapter in zip(job.folders, job.adapters, strict=True):
        weights = (adapter.path / "adapter_model.safetensors").read_bytes()
        (job.output / folder).mkdir()
        (job.output / folder / gguf_lora.FILE).write_bytes(b"GGUF" + weights)
    return {"tensors": dict.fromkeys(job.folders, 2)}


def digest_of(value: Json) -> bytes:
    """Return 32 bytes that any change of the value changes."""
    return hashlib.sha256(canonical(value)).digest()


VALID: Mapping[str, Json] = {
    "max_abs_logit_diff": 0.01,
    "mean_abs_logit_diff": 0.001,
    "kl_mean": 1e-6,
    "kl_max": 1e-5,
    "top1_agreement": 1.0,
    "passed": True,
    "findings": [],
    "probes": 4,
    "seconds": 1.0,
}
WRONG = {
    "severity": "error",
    "check": "elements",
    "message": "model.norm.weight: the sign is flipped",
    "tensor": "model.norm.weight",
}
QUALITY: Mapping[str, Json] = {
    "kl_mean": 0.01,
    "kl_p99": 0.1,
    "top1": 0.98,
    "perplexity": 3.03,
    "perplexity_reference": 3.0,
    "perplexity_ratio": 1.01,
    "texts": 4,
    "tokens": 400,
    "layer_error": 0.08,
    "worst_layers": [{"layer": 0, "error": 0.08}],
    "worst_tensors": [{"tensor": "model.layers.0.mlp.up_proj.weight", "error": 0.09}],
}
LOSSY = {**QUALITY, "layer_error": 0.9}
