"""Runs each kind of job in a builder."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from weightsmith.core.errors import CheckFailed, EnvironmentFailure, InputRefused, Unmeasurable
from weightsmith.core.jobs import (
    ANSWER_JOURNAL,
    AskedModel,
    CacheScalesJob,
    ConvertAdaptersJob,
    DequantizedJob,
    ExportEngineJob,
    ImportGgufJob,
    LayerTimeJob,
    MergeJob,
    ProofJob,
    QualityJob,
    QuantizeJob,
    Question,
    ReadCallsJob,
    ReferenceJob,
    SiblingFormat,
    ValidateJob,
)
from weightsmith.core.trees import discard
from weightsmith.core.values import Format, JsonValue, Writable, plain
from weightsmith.steps.answer_checkpoint import AnswerCheckpoint
from weightsmith.worker.calibrating import cache_scales
from weightsmith.worker.carrying import Carrying, Drafts, Text
from weightsmith.worker.reading_calls import read_calls_back
from weightsmith.worker.steps import forget_steps, run_steps
from weightsmith.worker.virtual import computed, described
from weightsmith.worker.wire import Report, note

if TYPE_CHECKING:
    from weightsmith.merging.reference import Answered, Rows, UnmergedModel
    from weightsmith.quantizers.quantizer import Quantizer, QuantizeRequest

    Given: TypeAlias = Answered | Rows | list[list[float]]
    """What a model says: in words, of texts, or log-likelihoods of choices."""
    Subject = TypeVar("Subject", bound=UnmergedModel)


def tools_folder() -> Path:
    """Return the folder of the builder's own programs."""
    return Path(os.environ.get("WEIGHTSMITH_TOOLS_LLAMACPP", "/opt/llamacpp"))


def convert_adapters(job: ConvertAdaptersJob, report: Report) -> Mapping[str, JsonValue]:
    """Convert adapters in one process, and read them back; return `tensors` by folder.

    What an interrupted run has converted is not converted again. Raises InputRefused or CheckFailed
    with the adapter's path.
    """
    from weightsmith.quantizers import gguf_lora

    adapters = dict(zip(job.folders, (given.path for given in job.adapters), strict=True))
    files = {folder: job.output / folder / gguf_lora.FILE for folder in adapters}
    links = job.output / ".links"
    left: dict[Path, Path] = {}
    for folder, adapter in adapters.items():
        if not files[folder].is_file():
            # Of the same name for each: the converter writes the name into the file, so the bytes
            # would depend on the adapter's place.
            link = links / folder / "adapter"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(adapter)
            left[link] = files[folder]
    forget_steps(job.output)  # those of another run had other adapters left
    made = gguf_lora.steps(job.base.path, left, job.output, tools_folder(), sys.executable)
    run_steps(made, job.output, report)
    discard(links)
    forget_steps(job.output)
    found = {}
    for folder, adapter in adapters.items():
        try:
            found[folder] = gguf_lora.check(adapter, files[folder])
        except CheckFailed:
            discard(job.output / folder)
            raise
    return {"tensors": found}


def _merge(job: MergeJob, report: Report) -> Mapping[str, JsonValue]:
    from weightsmith.merging import engine

    request = engine.MergeRequest(
        base=job.base.path,
        adapters=job.weighted,
        out=job.output,
        keep_adapter=job.keep_adapter,
        headers_only=job.headers_only,
        own_out=True,
        **asdict(job.options),
    )
    return engine.merge(request, lambda done, total: report(done, total, "bytes"))


def _export_engine(job: ExportEngineJob, report: Report) -> Mapping[str, JsonValue]:
    source = tools_folder() / "app"
    if not source.is_dir():
        raise EnvironmentFailure(
            f"the builder {job.builder!r} has no engine programs in {source}",
            hint="delete the builder so that it is made again",
        )
    shutil.copytree(source, job.output, dirs_exist_ok=True)
    report(1, 1, "items")
    return {}


def _import_gguf(job: ImportGgufJob, report: Report) -> Mapping[str, JsonValue]:
    from weightsmith.models.gguf_import import import_gguf

    import_gguf(job.gguf.path, job.output)
    report(1, 1, "items")
    return {}


def reference(job: ReferenceJob, report: Report) -> Mapping[str, JsonValue]:
    """Return `answers`, by the keys of their models."""
    found = answered(job, report)
    (job.output / ANSWER_JOURNAL).unlink(missing_ok=True)
    return {"answers": rows_of(found)}


def rows_of(found: Mapping[str, Given]) -> Mapping[str, JsonValue]:
    """Return the rows that a job returns of what `answered` found."""
    return {key: plain(getattr(one, "rows", one)) for key, one in found.items()}


def answered(
    job: ReferenceJob, report: Report, drafts: Drafts = MappingProxyType({})
) -> Mapping[str, Given]:
    """Return what each model answers by key, or log-likelihoods where it chooses.

    Models that do not chat are asked in walks of their own. `drafts` of answers are tokens, by key.

    What a model has finished also lies in the output at once, in case the job does not end.
    """
    from weightsmith.forward.walk import Count
    from weightsmith.merging import pooled as pooling
    from weightsmith.merging import reference as generating

    early = AnswerCheckpoint(job.output)
    tasks = [task for walk in job.walks for task in walk.tasks]
    total = sum(len(task.questions) * len(task.models) for task in tasks)
    count = Count(total, partial(report_items, report))
    journal = generating.AnswerJournal(job.output / ANSWER_JOURNAL)
    found: dict[str, Given] = {}

    def finished(key: str, rows: Writable) -> None:
        early.keep(key, plain(rows))

    def subject(one: AskedModel, kind: type[Subject], **more: str) -> Subject:
        paths = [job.adapters[number].path for number in one.adapters]
        return kind(
            model=job.models[one.model].path,
            adapters=tuple(zip(paths, one.weights, strict=True)),
            speakers=tuple(job.adapters[number].path for number in one.speakers),
            draft=one.draft,
            draft_texts=one.draft_texts,
            **more,
        )

    for walk in job.walks:
        models = [(one, task) for task in walk.tasks for one in task.models]
        if any(task.pooled for task in walk.tasks):
            requests = {
                one.key: pooling.PooledRequest(
                    subject=subject(one, pooling.PooledModel, pooled=task.pooled),
                    questions=task.questions,
                    prompts=task.prompts,
                )
                for one, task in models
            }
            found |= pooling.pooled_answers(requests, count, finished)
        elif walk.choose:
            given = {
                one.key: (subject(one, generating.UnmergedModel), task.questions)
                for one, task in models
            }
            found |= generating.likelihoods(given, count, finished)
        else:
            asked = {
                one.key: generating.GenerationRequest(
                    subject=subject(one, generating.UnmergedModel),
                    items=[question.messages for question in task.questions],
                    max_tokens=task.max_tokens,
                    tools=[question.tools for question in task.questions],
                    drafts=dict(enumerate(drafts.get(one.key, ()))),
                    pictures={n: q.pictures for n, q in enumerate(task.questions) if q.pictures},
                    folder=job.pictures.path if job.pictures else Path(),
                )
                for one, task in models
            }
            found |= generating.answered(
                asked, count, batch_bytes=walk.batch_bytes, journal=journal, finished=finished
            )
        gc.collect()  # modules with hooks refer to each other
    return found


def report_items(report: Report, done: int, total: int) -> None:
    """Report so many of all items."""
    report(done, total, "items")


def _quantize(job: QuantizeJob, report: Report) -> Mapping[str, JsonValue]:
    from weightsmith.quantizers.quantizer import QuantizeRequest

    quantizer, model = _quantizer(job.quantizer), job.model.path
    _forget_other_wishes(job, quantizer.formats)
    calibration, measured = None, job.output / (quantizer.statistics or ".none")
    lost = job.output / (quantizer.losses or ".none")
    walked = quantizer.walked(job.options) or quantizer.weighs(job.options)
    if job.texts and not walked:
        from weightsmith.quantizers.quality.texts import as_lines

        calibration = job.output / ".calibration.jsonl"
        calibration.write_text(as_lines(model, job.texts), encoding="utf-8")
    if job.statistics:
        measured.unlink(missing_ok=True)
        measured.symlink_to(job.statistics.path)
    if job.losses:
        lost.unlink(missing_ok=True)
        lost.symlink_to(job.losses.path)
    request = QuantizeRequest(
        model=model,
        format=next(f for f in quantizer.formats if f.name == job.format),
        output=job.output,
        name=job.name,
        tools=tools_folder(),
        python=sys.executable,
        calibration=calibration,
        texts=job.texts,
        measured_on=job.measured_on.path if job.measured_on else None,
        measured=job.statistics is not None,
        weighed=job.losses is not None,
        options=job.options,
    )
    siblings = []
    for one in job.siblings:
        output = job.output / one.folder
        output.mkdir(exist_ok=True)
        format_ = next(f for f in quantizer.formats if f.name == one.format)
        siblings.append(replace(request, format=format_, output=output, options=one.options))
    request = replace(request, siblings=tuple(siblings))
    try:
        import_ahead(quantizer.check_imports)
        with described(job) as variables:
            run_steps(quantizer.steps(request), job.output, report, variables)
        result = _mapping(quantizer.check(request))
        checked = {one.format.name: _checked(one, quantizer, measured) for one in siblings}
    except CheckFailed:
        forget_steps(job.output)  # a retry must not trust files from this run
        measured.unlink(missing_ok=True)
        lost.unlink(missing_ok=True)
        raise
    given = (measured if job.statistics else None, lost if job.losses else None)
    for path in (calibration, *given):
        if path is not None:
            path.unlink()
    forget_steps(job.output)
    return {**result, "siblings": checked} if checked else result


def _forget_other_wishes(job: QuantizeJob, formats: Sequence[Format]) -> None:
    """Delete what an interrupted run left of formats that are not made beside this one now.

    The folder's key names one format. If others are new, no step counts as done: it made none.
    """
    wanted = {one.folder for one in job.siblings}
    known = {SiblingFormat(format=each.name, options={}).folder for each in formats}
    left = {name for name in known if (job.output / name).is_dir()}
    for name in left - wanted:
        discard(job.output / name)
    if wanted - left:
        forget_steps(job.output)


def _checked(
    request: QuantizeRequest, quantizer: Quantizer, measured: Path
) -> Mapping[str, JsonValue]:
    """Check another format, which has the same statistics."""
    link = request.output / measured.name
    link.unlink(missing_ok=True)
    if measured.is_file():
        link.symlink_to(measured)
    found = _mapping(quantizer.check(request))
    link.unlink(missing_ok=True)
    return found


def _quantizer(name: str) -> Quantizer:
    if not name.isidentifier():
        raise InputRefused(
            f"unknown quantizer {name!r}",
            hint="builder and control plane must have the same version",
        )
    found: Quantizer = importlib.import_module(f"weightsmith.quantizers.{name}").QUANTIZER
    return found


def _prove(job: ProofJob, report: Report) -> Mapping[str, JsonValue]:
    """Return `answers`, the `seconds` that they took, and `validation`.

    Some of the merged model's are carried over if the validation bounds how far it is from base and
    adapters. While the validation runs, whole answers also lie in a file of the output, in case it
    is interrupted. There are none of a model that cannot give any.

    The reference stage then asks for them again, and says why there are none, but only if the
    validation finds nothing wrong with the merged model.
    """
    asked, seconds, texts = job.reference, 0.0, list[Text]()
    answers = dict[str, JsonValue]()
    carrying = Carrying(job, lambda some, drafts: answered(some, report, drafts))

    @contextmanager
    def asking() -> Iterator[None]:
        nonlocal seconds
        began = time.monotonic()
        try:
            with computed(asked):
                yield
        except Exception as error:  # noqa: BLE001 - what is wrong with the merge is said below
            traceback.print_exc()
            why = " ".join(str(getattr(error, "message", error)).split())
            note(f"no reference answers yet: {why[:200] or type(error).__name__}")
        gc.collect()  # modules with hooks refer to each other
        seconds += round(time.monotonic() - began, 3)

    with asking():
        found = answered(carrying.others, report)
        carrying.ask_some(found)
        answers.update(rows_of(found))
        models = [one for walk in asked.walks for task in walk.tasks for one in task.models]
        merged = [found[one.key] for one in models if one.name == "merged" and one.key in found]
        texts += [*(text for one in merged for text in getattr(one, "texts", ())), *carrying.texts]
        del found, merged
    with computed(job.validation):
        validation = _validate(job.validation, report, texts)
    if answers and validation["passed"]:
        with asking():
            largest = validation["max_abs_logit_diff"]
            answers.update(carrying.ask_rest(largest if isinstance(largest, float) else None))
    AnswerCheckpoint(job.output).forget()
    (job.output / ANSWER_JOURNAL).unlink(missing_ok=True)
    return {"validation": validation, "answers": answers, "seconds": seconds}


def _validate(
    job: ValidateJob, report: Report, drafts: Sequence[tuple[Sequence[int], Sequence[int]]] = ()
) -> Mapping[str, JsonValue]:
    from weightsmith.validating.validate import ValidationRequest, validate

    request = ValidationRequest(
        base=job.base.path,
        adapters=job.weighted,
        merged=job.merged.path,
        items=job.chats,
        scope=job.scope,
        mixture=job.mixture,
        drafts=tuple(drafts),
    )
    return validate(request, lambda done, total: report(done, total, "layers")).to_json()


def _quality(job: QualityJob, report: Report) -> Mapping[str, JsonValue]:
    from weightsmith.quantizers.quality.measure import measure

    model, tell = job.model.path, lambda done, total: report(done, total, "layers")
    view: Any = _quantizer(job.quantizer).view
    try:
        found = measure(model, view(job.artifact.path, model), job.texts, job.tokens, tell)
    except Unmeasurable as error:
        return {"skipped": error.message}
    return found.to_json()


def _dequantized(job: DequantizedJob, report: Report) -> Mapping[str, JsonValue]:
    """Return `answers`, of the one subject, or `skipped`: why its weights cannot be read."""
    from weightsmith.forward.walk import Count
    from weightsmith.merging.reference import GenerationRequest, answered, likelihoods
    from weightsmith.quantizers.quality.runs import QuantizedSubject

    model, tell = job.model.path, partial(report_items, report)
    view: Any = _quantizer(job.quantizer).view
    try:
        count = Count(sum(len(task.questions) for task in job.tasks), tell)
        weights = view(job.artifact.path, model)
        chosen: dict[str, tuple[Any, Sequence[Question]]] = {}
        asked: dict[str, GenerationRequest] = {}
        for number, task in enumerate(job.tasks):
            beside = [job.adapters[one].path for one in task.adapters]
            subject: Any = QuantizedSubject(model, weights, draft_texts=task.drafts, beside=beside)
            if task.choose:
                chosen[str(number)] = subject, task.questions
                continue
            asked[str(number)] = GenerationRequest(
                subject=subject,
                items=[question.messages for question in task.questions],
                max_tokens=task.max_tokens,
                tools=[question.tools for question in task.questions],
            )
        found: dict[str, Given] = {}
        found |= answered(asked, count, batch_bytes=job.batch_bytes) if asked else {}
        found |= likelihoods(chosen, count) if chosen else {}
    except Unmeasurable as error:
        return {"skipped": error.message}
    rows = rows_of(found)
    return {"answers": [rows[str(number)] for number in range(len(job.tasks))]}


def _layer_time(job: LayerTimeJob, report: Report) -> Mapping[str, JsonValue]:
    from weightsmith.forward.layer_time import layer_time

    return layer_time(job.model.path, job.counts, partial(report_items, report))


def _mapping(value: Writable) -> Mapping[str, JsonValue]:
    mapping = plain(value)
    return mapping if isinstance(mapping, dict) else {}


STAGES: Mapping[str, Callable[[Any, Report], Mapping[str, JsonValue]]] = {
    MergeJob.kind: _merge,
    ImportGgufJob.kind: _import_gguf,
    QuantizeJob.kind: _quantize,
    CacheScalesJob.kind: cache_scales,
    ConvertAdaptersJob.kind: convert_adapters,
    ReferenceJob.kind: reference,
    DequantizedJob.kind: _dequantized,
    ProofJob.kind: _prove,
    ValidateJob.kind: _validate,
    QualityJob.kind: _quality,
    ExportEngineJob.kind: _export_engine,
    ReadCallsJob.kind: read_calls_back,
    LayerTimeJob.kind: _layer_time,
}
"""Kind of job -> function; each imports what it needs when it is called."""
LIBRARIES: Mapping[str, tuple[str, ...]] = {
    ReferenceJob.kind: ("peft",),
    ProofJob.kind: ("peft",),
    ValidateJob.kind: ("peft",),
    QualityJob.kind: (),
    DequantizedJob.kind: (),
    CacheScalesJob.kind: (),
    LayerTimeJob.kind: (),
}
"""Kinds of jobs that run models -> what they need beside torch and transformers."""


def import_ahead(names: Sequence[str]) -> None:
    """Begin to import modules; whoever imports one meanwhile waits for it, and gets its errors."""

    def load() -> None:
        with suppress(Exception):  # raised again where the module is needed
            for name in names:
                importlib.import_module(name)

    if names:
        threading.Thread(target=load, daemon=True, name="imports").start()
