"""What a builder can do: each stage imports what it needs when it is called."""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from weightsmith.drivers.inmate import attempts
from weightsmith.errors import (
    CheckFailed,
    EnvironmentFailure,
    InputRefused,
    Unmeasurable,
    from_code,
)
from weightsmith.values import Job, Json, plain
from weightsmith.worker.steps import forget_steps, run_steps
from weightsmith.worker.wire import Report, note


def _merge(job: Job, report: Report) -> Mapping[str, Json]:
    engine: Any = importlib.import_module("weightsmith.merging.engine")
    wanted = dict(job.parameters)
    names = wanted.pop("adapters")
    weights = wanted.pop("weights")
    request = engine.MergeRequest(
        base=job.inputs["base"],
        adapters=tuple((job.inputs[n], w) for n, w in zip(names, weights, strict=True)),
        out=job.output,
        **wanted,
    )
    return _mapping(engine.merge(request, lambda done, total: report(done, total, "bytes")))


def _export_engine(job: Job, report: Report) -> Mapping[str, Json]:
    """Copy the engine's programs, which the builder compiled, to the output."""
    source = _tools() / "app"
    if not source.is_dir():
        raise EnvironmentFailure(
            f"the builder {job.builder!r} has no engine programs in {source}",
            hint="delete the builder so that it is made again",
        )
    shutil.copytree(source, job.output, dirs_exist_ok=True)
    report(1, 1, "items")
    return {}


def _import_gguf(job: Job, report: Report) -> Mapping[str, Json]:
    gguf_import: Any = importlib.import_module("weightsmith.checkpoints.gguf_import")
    gguf_import.import_gguf(job.inputs["gguf"], job.output)
    report(1, 1, "items")
    return {}


def _quantize(job: Job, report: Report) -> Mapping[str, Json]:
    from weightsmith.quantizers.quantizer import QuantizeRequest

    quantizer = _quantizer(str(job.parameters["quantizer"]))
    wanted = job.parameters["format"]
    calibration, measured = None, job.output / (quantizer.statistics or ".none")
    if texts := job.parameters.get("texts"):
        calibration = job.output / ".calibration.jsonl"
        rendering: Any = importlib.import_module("weightsmith.quality.texts")
        calibration.write_text(rendering.as_lines(job.inputs["model"], texts), encoding="utf-8")
    given = "statistics" in job.inputs
    if given:
        measured.unlink(missing_ok=True)
        measured.symlink_to(job.inputs["statistics"])
    request = QuantizeRequest(
        model=job.inputs["model"],
        format=next(f for f in quantizer.formats if f.name == wanted),
        output=job.output,
        name=str(job.parameters["name"]),
        tools=_tools(),
        python=sys.executable,
        calibration=calibration,
        measured=given,
        options=dict(job.parameters.get("options", {})),
    )
    try:
        run_steps(quantizer.steps(request), request.output, report)
        result = _mapping(quantizer.check(request))
    except CheckFailed:
        forget_steps(job.output)  # a second try must not trust what this one left
        raise
    for path in (calibration, measured if given else None):
        if path is not None:
            path.unlink()
    forget_steps(job.output)
    return result


def _convert_adapter(job: Job, report: Report) -> Mapping[str, Json]:
    """Convert a LoRA adapter to GGUF and read it back."""
    gguf_lora: Any = importlib.import_module("weightsmith.quantizers.gguf_lora")
    base, adapter = job.inputs["base"], job.inputs["adapter"]
    made = gguf_lora.steps(base, adapter, job.output, _tools(), sys.executable)
    run_steps(made, job.output, report)
    found = gguf_lora.check(adapter, job.output)
    forget_steps(job.output)
    return {"tensors": found}


def _quantizer(name: str) -> Any:
    if not name.isidentifier():
        raise InputRefused(
            f"{name!r} is not the name of a quantizer",
            hint="builder and control plane must be of one version",
        )
    return importlib.import_module(f"weightsmith.quantizers.{name}").QUANTIZER


def _tools() -> Path:
    """Return the folder of the builder's own programs."""
    return Path(os.environ.get("WEIGHTSMITH_TOOLS", "/opt/llamacpp"))


def _reference(job: Job, report: Report) -> Mapping[str, Json]:
    weights = job.parameters.get("weights", [])
    adapters = [(job.inputs[f"adapter{i}"], weight) for i, weight in enumerate(weights)]
    wanted = job.parameters

    def tell(done: int, total: int) -> None:
        report(done, total, "items")

    if "choices" in wanted:
        choices: Any = importlib.import_module("weightsmith.merging.choices")
        columns = (wanted["items"], wanted["choices"], wanted["plain"])
        items = [
            {"messages": m, "choices": c, "plain": p} for m, c, p in zip(*columns, strict=True)
        ]
        return {"answers": choices.likelihoods(job.inputs["model"], adapters, items, tell)}
    reference: Any = importlib.import_module("weightsmith.merging.reference")
    answers = reference.answer(
        job.inputs["model"], adapters, wanted["items"], wanted["max_tokens"], tell
    )
    return {"answers": plain(answers)}


def _validate(job: Job, report: Report) -> Mapping[str, Json]:
    module: Any = importlib.import_module("weightsmith.validating.validate")
    weights, mixture = job.parameters["weights"], job.parameters["mixture"]
    request = module.Request(
        base=job.inputs["base"],
        adapters=tuple((job.inputs[f"adapter{i}"], w) for i, w in enumerate(weights)),
        merged=job.inputs["merged"],
        items=tuple(job.parameters["items"]),
        scope=job.parameters["scope"],
        mixture=module.Mixture(**mixture) if mixture else None,
    )
    return _mapping(module.validate(request, lambda done, total: report(done, total, "layers")))


def _quality(job: Job, report: Report) -> Mapping[str, Json]:
    measure: Any = importlib.import_module("weightsmith.quality.measure")
    quantizer = _quantizer(str(job.parameters["quantizer"]))
    model = job.inputs["model"]
    try:
        return _mapping(
            measure.measure(
                model,
                quantizer.view(job.inputs["artifact"], model),
                job.parameters["texts"],
                int(job.parameters["tokens"]),
                lambda done, total: report(done, total, "layers"),
            )
        )
    except Unmeasurable as error:
        return {"skipped": error.message}


def _echo(job: Job, report: Report) -> Mapping[str, Json]:
    """Copy the input `text` to the output and say how the builder confines this process."""
    wanted = job.parameters
    if "fail" in wanted:
        raise from_code(int(wanted["fail"]), "asked to fail", "ask for something else")
    if "crash" in wanted:
        raise ValueError(str(wanted["crash"]))
    print("printed by the stage")  # noqa: T201
    note("echo begins")
    time.sleep(float(wanted.get("sleep", 0)))
    text = job.inputs["text"].read_text("utf-8")
    (job.output / "echo.txt").write_text(text, encoding="utf-8")
    report(1, 1, "items")
    return {
        "text": text,
        "uid": os.getuid(),
        "network": _network_reachable(),
        "writable": [path for path in wanted.get("try_to_write", []) if _writable(Path(path))],
        "reached": attempts(wanted["targets"]) if "targets" in wanted else {},
        "input_writable": _writable(job.inputs["text"].parent / "intruder"),
        "secrets": sorted(
            n for n in os.environ if n.endswith(("TOKEN", "PASSWORD", "SECRET", "KEY"))
        ),
    }


def _network_reachable() -> bool:
    # Connecting a datagram socket sends nothing; it fails where there is no route.
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))
    except OSError:
        return False
    return True


def _writable(path: Path) -> bool:
    try:
        path.touch()
        path.unlink()
    except OSError:
        return False
    return True


def _mapping(value: object) -> Mapping[str, Json]:
    mapping = plain(value)
    return mapping if isinstance(mapping, dict) else {}


STAGES: dict[str, Callable[[Job, Report], Mapping[str, Json]]] = {
    "merge": _merge,
    "import-gguf": _import_gguf,
    "quantize": _quantize,
    "convert-adapter": _convert_adapter,
    "reference": _reference,
    "validate": _validate,
    "quality": _quality,
    "export-engine": _export_engine,
    "echo": _echo,
}
"""Name -> function; each imports what it needs when it is called."""
