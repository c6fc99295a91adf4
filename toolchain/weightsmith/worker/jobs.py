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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from weightsmith.core.errors import (
    CheckFailed,
    EnvironmentFailure,
    InputRefused,
    Unmeasurable,
)
from weightsmith.core.jobs import (
    ANSWER_JOURNAL,
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
    ReferenceJob,
    SiblingFormat,
    ValidateJob,
)
from weightsmith.core.trees import discard
from weightsmith.core.values import Format, Json, JsonValue, Writable, plain
from weightsmith.steps.answer_checkpoint import AnswerCheckpoint
from weightsmith.worker.answering import answered, reference, report_items, rows_of
from weightsmith.worker.calibrating import cache_scales
from weightsmith.worker.steps import forget_steps, run_steps
from weightsmith.worker.virtual import computed, described
from weightsmith.worker.wire import Report, note


def tools_folder() -> Path:
    """Return the folder of the builder's own programs."""
    return Path(os.environ.get("WEIGHTSMITH_TOOLS_LLAMACPP", "/opt/llamacpp"))


def convert_adapters(job: ConvertAdaptersJob, report: Report) -> Mapping[str, JsonValue]:
    """Convert adapters in one process, and read them back; return `tensors` by folder.

    What an interrupted run has converted is not converted again. Raises InputRefused or CheckFailed
    with the adapter's path.
    """
    gguf_lora: Any = importlib.import_module("weightsmith.quantizers.gguf_lora")
    adapters = dict(zip(job.folders, (given.path for given in job.adapters), strict=True))
    links = job.output / ".links"
    left: dict[Path, Path] = {}
    for folder, adapter in adapters.items():
        file = job.output / folder / gguf_lora.FILE
        if not file.is_file():
            left[_link(links / folder, adapter)] = file
    forget_steps(job.output)  # those of another run had other adapters left
    made = gguf_lora.steps(job.base.path, left, job.output, tools_folder(), sys.executable)
    run_steps(made, job.output, report)
    discard(links)
    forget_steps(job.output)
    found = {}
    for folder, adapter in adapters.items():
        try:
            found[folder] = gguf_lora.check(adapter, job.output / folder / gguf_lora.FILE)
        except CheckFailed:
            discard(job.output / folder)
            raise
    return {"tensors": found}


def _link(folder: Path, adapter: Path) -> Path:
    """Return a link to an adapter that has the same name for each.

    The converter writes the name into the file, so the bytes would depend on the adapter's place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "adapter"
    link.unlink(missing_ok=True)
    link.symlink_to(adapter)
    return link


def _merge(job: MergeJob, report: Report) -> Mapping[str, JsonValue]:
    engine: Any = importlib.import_module("weightsmith.merging.engine")
    request = engine.MergeRequest(
        base=job.base.path,
        adapters=job.weighted,
        out=job.output,
        keep_adapter=job.keep_adapter,
        headers_only=job.headers_only,
        own_out=True,
        **asdict(job.options),
    )
    return _mapping(engine.merge(request, lambda done, total: report(done, total, "bytes")))


def _export_engine(job: ExportEngineJob, report: Report) -> Mapping[str, JsonValue]:
    """Copy the engine's programs, compiled by the builder, to the output."""
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
    gguf_import: Any = importlib.import_module("weightsmith.models.gguf_import")
    gguf_import.import_gguf(job.gguf.path, job.output)
    report(1, 1, "items")
    return {}


def _quantize(job: QuantizeJob, report: Report) -> Mapping[str, Json]:
    from weightsmith.quantizers.quantizer import QuantizeRequest

    quantizer, model = _quantizer(job.quantizer), job.model.path
    _forget_other_wishes(job, quantizer.formats)
    calibration, measured = None, job.output / (quantizer.statistics or ".none")
    walked = quantizer.walked(job.options)
    if job.texts and not walked:
        calibration = job.output / ".calibration.jsonl"
        rendering: Any = importlib.import_module("weightsmith.quantizers.quality.texts")
        calibration.write_text(rendering.as_lines(model, job.texts), encoding="utf-8")
    if job.statistics:
        measured.unlink(missing_ok=True)
        measured.symlink_to(job.statistics.path)
    request = QuantizeRequest(
        model=model,
        format=next(f for f in quantizer.formats if f.name == job.format),
        output=job.output,
        name=job.name,
        tools=tools_folder(),
        python=sys.executable,
        calibration=calibration,
        texts=job.texts if walked else (),
        measured=job.statistics is not None,
        options=job.options,
    )
    request = replace(
        request, siblings=tuple(_sibling(request, quantizer, one) for one in job.siblings)
    )
    try:
        import_ahead(quantizer.check_imports)
        with described(job) as variables:
            run_steps(quantizer.steps(request), job.output, report, variables)
        result = _mapping(quantizer.check(request))
        siblings = {one.format.name: _checked(one, quantizer, measured) for one in request.siblings}
    except CheckFailed:
        forget_steps(job.output)  # a retry must not trust files from this run
        measured.unlink(missing_ok=True)
        raise
    for path in (calibration, measured if job.statistics else None):
        if path is not None:
            path.unlink()
    forget_steps(job.output)
    return {**result, "siblings": siblings} if siblings else result


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


def _sibling(request: Any, quantizer: Any, other: SiblingFormat) -> Any:
    """Return the request for another format, in a folder of its own."""
    folder = request.output / other.folder
    folder.mkdir(exist_ok=True)
    format_ = next(f for f in quantizer.formats if f.name == other.format)
    return replace(request, format=format_, output=folder, options=other.options)


def _checked(request: Any, quantizer: Any, measured: Path) -> Mapping[str, JsonValue]:
    """Check another format, which has the same statistics."""
    link = request.output / measured.name
    link.unlink(missing_ok=True)
    if measured.is_file():
        link.symlink_to(measured)
    found = _mapping(quantizer.check(request))
    link.unlink(missing_ok=True)
    return found


def _quantizer(name: str) -> Any:
    if not name.isidentifier():
        raise InputRefused(
            f"unknown quantizer {name!r}",
            hint="builder and control plane must have the same version",
        )
    return importlib.import_module(f"weightsmith.quantizers.{name}").QUANTIZER


def _prove(job: ProofJob, report: Report) -> Mapping[str, JsonValue]:
    """Return `answers`, the `seconds` that they took, and `validation`.

    While the validation runs, the answers also lie in a file of the output, in case it is
    interrupted. There are no answers if a model cannot give any.

    The reference stage then asks for them again, and says why there are none, but only if the
    validation finds nothing wrong with the merged model.
    """
    asked, drafts, began = job.reference, [], time.monotonic()
    answers: Mapping[str, JsonValue] = {}
    try:
        with computed(asked):
            found = answered(asked, report)
        answers = rows_of(found)
        models = [one for walk in asked.walks for task in walk.tasks for one in task.models]
        merged = [found[one.key] for one in models if one.name == "merged"]
        drafts = [text for one in merged for text in getattr(one, "texts", ())]
        del found, merged
    except Exception as error:  # noqa: BLE001 - what is wrong with the merge is said below
        traceback.print_exc()
        why = " ".join(str(getattr(error, "message", error)).split())
        note(f"no reference answers yet: {why[:200] or type(error).__name__}")
    gc.collect()  # modules with hooks refer to each other
    seconds = round(time.monotonic() - began, 3)
    with computed(job.validation):
        validation = _validate(job.validation, report, drafts)
    AnswerCheckpoint(job.output).forget()
    (job.output / ANSWER_JOURNAL).unlink(missing_ok=True)
    return {"validation": validation, "answers": answers, "seconds": seconds}


def _validate(
    job: ValidateJob, report: Report, drafts: Sequence[Any] = ()
) -> Mapping[str, JsonValue]:
    module: Any = importlib.import_module("weightsmith.validating.validate")
    request = module.ValidationRequest(
        base=job.base.path,
        adapters=job.weighted,
        merged=job.merged.path,
        items=job.chats,
        scope=job.scope,
        mixture=job.mixture,
        drafts=tuple(drafts),
    )
    found = module.validate(request, lambda done, total: report(done, total, "layers"))
    return _mapping(found.to_json())


def _quality(job: QualityJob, report: Report) -> Mapping[str, JsonValue]:
    measure: Any = importlib.import_module("weightsmith.quantizers.quality.measure")
    model, tell = job.model.path, lambda done, total: report(done, total, "layers")
    try:
        view = _quantizer(job.quantizer).view(job.artifact.path, model)
        return _mapping(measure.measure(model, view, job.texts, job.tokens, tell).to_json())
    except Unmeasurable as error:
        return {"skipped": error.message}


def _dequantized(job: DequantizedJob, report: Report) -> Mapping[str, JsonValue]:
    """Return `answers`, of the one subject, or `skipped`: why its weights cannot be read."""
    runs: Any = importlib.import_module("weightsmith.quantizers.quality.runs")
    walking: Any = importlib.import_module("weightsmith.forward.walk")
    model, tell = job.model.path, partial(report_items, report)
    count = walking.Count(len(job.questions), tell)
    try:
        view = _quantizer(job.quantizer).view(job.artifact.path, model)
        subjects = {"": runs.QuantizedSubject(model, view, draft_texts=job.drafts)}
        reference: Any = importlib.import_module("weightsmith.merging.reference")
        if job.choose:
            asked = {"": (subjects[""], job.questions)}
            return {"answers": reference.likelihoods(asked, count)[""]}
        given = [question.messages for question in job.questions], job.max_tokens, tell
        found = reference.answers(subjects, *given, batch_bytes=job.batch_bytes)[""]
    except Unmeasurable as error:
        return {"skipped": error.message}
    return {"answers": plain(found)}


def _layer_time(job: LayerTimeJob, report: Report) -> Mapping[str, JsonValue]:
    module: Any = importlib.import_module("weightsmith.forward.layer_time")
    tell = partial(report_items, report)
    return _mapping(module.layer_time(job.model.path, job.counts, tell))


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
    if names:
        threading.Thread(target=_import, args=(names,), daemon=True, name="imports").start()


def _import(names: Sequence[str]) -> None:
    with suppress(Exception):  # raised again where the module is needed
        for name in names:
            importlib.import_module(name)
