"""The entry point inside a builder: `python -m toolchain.worker job.json` runs one job.

What the other side sees is a stream of JSON lines on standard output: `{"progress": [done, total,
unit]}`, `{"note": text}`, `{"warn": text}`, and last either `{"result": {…}}` or `{"error":
{"message", "hint", "exit_code"}}`. Everything else that is printed goes to standard error. The end
of standard input means that the other side is gone: the worker ends at once (exit code 130).
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import re
import shutil
import socket
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from toolchain.errors import (
    CheckFailed,
    EnvironmentFailure,
    InputRefused,
    Unmeasurable,
    WeightsmithError,
    from_code,
)
from toolchain.values import Job, Json, plain

if TYPE_CHECKING:
    from toolchain.quantizers.quantizer import Step

Report = Callable[[int, int, str], None]
"""Report work done: done, total, unit."""

PARENT_GONE = 130


class Wire:
    """The line to the control plane: the original standard output, kept for JSON alone."""

    def __init__(self) -> None:
        self._file: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        # Also what C libraries print must not get between the JSON lines.
        os.dup2(2, 1)
        self._last = 0.0

    def send(self, message: Mapping[str, Json]) -> None:
        """Write one JSON line."""
        self._file.write(json.dumps(plain(message), ensure_ascii=False) + "\n")

    def progress(self, done: int, total: int, unit: str) -> None:
        """Report work done, ten times a second at most."""
        now = time.monotonic()
        if done >= total or now - self._last >= 0.1:
            self._last = now
            self.send({"progress": [done, total, unit]})


_wire: Wire | None = None


def note(text: str) -> None:
    """Say one line to the user; a stage may import this."""
    if _wire is not None:
        _wire.send({"note": text})


def warn(text: str) -> None:
    """Say one warning line to the user, kept for the report; a stage may import this."""
    if _wire is not None:
        _wire.send({"warn": text})


def _merge(job: Job, report: Report) -> Mapping[str, Json]:
    engine: Any = importlib.import_module("toolchain.merging.engine")
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
    gguf_import: Any = importlib.import_module("toolchain.checkpoints.gguf_import")
    gguf_import.import_gguf(job.inputs["gguf"], job.output)
    report(1, 1, "items")
    return {}


def _quantize(job: Job, report: Report) -> Mapping[str, Json]:
    from toolchain.quantizers.quantizer import QuantizeRequest

    quantizer = _quantizer(str(job.parameters["quantizer"]))
    wanted = job.parameters["format"]
    calibration, measured = None, job.output / (quantizer.statistics or ".none")
    if texts := job.parameters.get("texts"):
        calibration = job.output / ".calibration.jsonl"
        rendering: Any = importlib.import_module("toolchain.quality.texts")
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
        _run_steps(quantizer.steps(request), request.output, report)
        result = _mapping(quantizer.check(request))
    except CheckFailed:
        _forget_steps(job.output)  # a second try must not trust what this one left
        raise
    for path in (calibration, measured if given else None):
        if path is not None:
            path.unlink()
    _forget_steps(job.output)
    return result


def _convert_adapter(job: Job, report: Report) -> Mapping[str, Json]:
    """Convert a LoRA adapter to GGUF and read it back."""
    gguf_lora: Any = importlib.import_module("toolchain.quantizers.gguf_lora")
    base, adapter = job.inputs["base"], job.inputs["adapter"]
    made = gguf_lora.steps(base, adapter, job.output, _tools(), sys.executable)
    _run_steps(made, job.output, report)
    found = gguf_lora.check(adapter, job.output)
    _forget_steps(job.output)
    return {"tensors": found}


def _quantizer(name: str) -> Any:
    if not name.isidentifier():
        raise InputRefused(f"{name!r} is not the name of a quantizer")
    return importlib.import_module(f"toolchain.quantizers.{name}").QUANTIZER


def _tools() -> Path:
    """Return the folder of the builder's own programs."""
    return Path(os.environ.get("WEIGHTSMITH_TOOLS", "/opt/llamacpp"))


def _run_steps(steps: tuple[Step, ...], output: Path, report: Report) -> None:
    """Run the commands in order; those that an interrupted run finished are not run again."""
    from toolchain.drivers import process

    for number, step in enumerate(steps):
        report(number, len(steps), "steps")
        argv = _filled(step, output)
        done = output / f"{_DONE}{number}"
        if done.is_file() and done.read_text("utf-8") == " ".join(argv):
            note(f"{step.title}: done before")
            continue
        note(step.title)
        for path, text in step.writes.items():
            path.write_text(text, encoding="utf-8")
        print(f"$ {' '.join(argv)}", file=sys.stderr, flush=True)  # noqa: T201
        ended = process.run(
            argv,
            cwd=output,
            env=process.scrubbed({**_inherited(), **step.env}),
            on_line=lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201
        )
        if ended.returncode and step.reads:
            _refuse(step, ended.tail)
        ended.require(
            f"{step.title} ({Path(step.argv[0]).name})",
            hint="the lines above are the program's own; the job's log has all of them",
        )
        # Before its inputs go: a run that is killed between the two has both, not neither.
        done.write_text(" ".join(argv), encoding="utf-8")
        for path in step.removes:
            for found in path.parent.glob(path.name):
                found.unlink()
    report(len(steps), len(steps), "steps")


_EXCEPTION = re.compile(r"(?!OSError|MemoryError|BrokenPipe)(\w+Error): .+")


def _refuse(step: Step, tail: Sequence[str]) -> None:
    """Raise InputRefused where a converter's last line is an exception that its input caused."""
    said = next((line.strip() for line in reversed(tail) if line.strip()), "")
    if _EXCEPTION.fullmatch(said):
        raise InputRefused(
            f"{step.title}: the converter cannot read {step.reads}: {said}",
            hint="the job's log has where; another engine may load it, such as target vllm",
        )


_DONE = ".done-"


def _filled(step: Step, output: Path) -> tuple[str, ...]:
    """Return a command with its `{name}`s replaced by digests and names of files."""
    known = {f"{{{name}}}": path for name, path in step.digests.items()}
    found = {f"{{{name}}}": pattern for name, pattern in step.finds.items()}
    words = []
    for word in step.argv:
        for name, path in known.items():
            if name in word and path.is_file():
                with path.open("rb") as file:
                    word = word.replace(name, hashlib.file_digest(file, "sha256").hexdigest())
        for name, pattern in found.items():
            if name in word and (first := min(output.glob(pattern), default=None)):
                word = word.replace(name, str(first))
        words.append(word)
    return tuple(words)


def _forget_steps(output: Path) -> None:
    for path in output.glob(f"{_DONE}*"):
        path.unlink()


def _inherited() -> dict[str, str]:
    """Return the variables by which the runner keeps libraries offline and within their share."""
    prefixes = ("HF_", "TRANSFORMERS_", "OMP_", "PYTHON", "TMPDIR")
    return {name: value for name, value in os.environ.items() if name.startswith(prefixes)}


def _reference(job: Job, report: Report) -> Mapping[str, Json]:
    weights = job.parameters.get("weights", [])
    adapters = [(job.inputs[f"adapter{i}"], weight) for i, weight in enumerate(weights)]
    wanted = job.parameters

    def tell(done: int, total: int) -> None:
        report(done, total, "items")

    if "choices" in wanted:
        choices: Any = importlib.import_module("toolchain.merging.choices")
        columns = (wanted["items"], wanted["choices"], wanted["plain"])
        items = [
            {"messages": m, "choices": c, "plain": p} for m, c, p in zip(*columns, strict=True)
        ]
        return {"answers": choices.likelihoods(job.inputs["model"], adapters, items, tell)}
    reference: Any = importlib.import_module("toolchain.merging.reference")
    answers = reference.answer(
        job.inputs["model"], adapters, wanted["items"], wanted["max_tokens"], tell
    )
    return {"answers": plain(answers)}


def _validate(job: Job, report: Report) -> Mapping[str, Json]:
    module: Any = importlib.import_module("toolchain.validating.validate")
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
    measure: Any = importlib.import_module("toolchain.quality.measure")
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
        "input_writable": _writable(job.inputs["text"].parent / "intruder"),
        "secrets": sorted(
            n for n in os.environ if n.endswith(("TOKEN", "PASSWORD", "SECRET", "KEY"))
        ),
    }


def _network_reachable() -> bool:
    # Connecting a datagram socket sends nothing; it fails where there is no route.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
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


def read_job(path: Path) -> Job:
    """Read a job file; paths in it are the builder's own."""
    told = json.loads(path.read_text("utf-8"))
    return Job(
        stage=told["stage"],
        builder=told["builder"],
        inputs={name: Path(where) for name, where in told["inputs"].items()},
        parameters=told["parameters"],
        output=Path(told["output"]),
    )


def run_job(job: Job, wire: Wire) -> int:
    """Run the job's stage, send its result or error, and return the exit code."""
    try:
        stage = STAGES.get(job.stage)
        if stage is None:
            raise InputRefused(
                f"the builder does not know the stage {job.stage!r}",
                hint=f"it knows {', '.join(sorted(STAGES))}; builder and control plane must match",
            )
        result = stage(job, wire.progress)
    except WeightsmithError as error:
        return _send_error(wire, error)
    except MemoryError:
        traceback.print_exc()
        what = f"the {job.stage} job ran out of memory"
        hint = "close other programs or use a machine with more memory"
        return _send_error(wire, EnvironmentFailure(what, hint=hint))
    except OSError as problem:
        traceback.print_exc()
        return _send_error(wire, _of_the_disk(problem, job))
    except Exception as problem:  # noqa: BLE001 - the last frame: reported, with its traceback
        traceback.print_exc()
        what = f"unexpected {type(problem).__name__} in the {job.stage} job: {problem}"
        return _send_error(wire, WeightsmithError(what, hint="the traceback is in the job's log"))
    wire.send({"result": result})
    return 0


def _of_the_disk(problem: OSError, job: Job) -> WeightsmithError:
    """Return what a failed call of the operating system means for the user."""
    # shutil gathers several failures into one that has no number.
    if problem.errno in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(problem):
        return EnvironmentFailure(
            f"the disk is full while the {job.stage} job writes to {job.output}",
            hint="free some (`invoke clean --keep 0` empties the store) or set WEIGHTSMITH_STORE "
            "to a folder on a larger disk",
        )
    what = f"unexpected {type(problem).__name__} in the {job.stage} job: {problem}"
    return WeightsmithError(what, hint="the traceback is in the job's log")


def _send_error(wire: Wire, error: WeightsmithError) -> int:
    said = {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}
    wire.send({"error": said})
    return error.exit_code


def _mapping(value: object) -> Mapping[str, Json]:
    told = plain(value)
    return told if isinstance(told, dict) else {}


def end_with_parent() -> None:
    """Watch standard input, where it is a pipe, and end the moment its other side is gone."""
    kind = os.fstat(0).st_mode
    if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind):
        threading.Thread(target=_watch_stdin, daemon=True).start()


def _watch_stdin() -> None:
    while os.read(0, 1024):
        pass
    os._exit(PARENT_GONE)


def main(arguments: list[str]) -> int:
    """Run the job of the given file; return the exit code."""
    global _wire
    if len(arguments) != 1:
        print("usage: python -m toolchain.worker job.json", file=sys.stderr)  # noqa: T201
        return 2
    end_with_parent()
    _wire = Wire()
    return run_job(read_job(Path(arguments[0])), _wire)


if __name__ == "__main__":
    # Run under its real name too, so that `note` imported by a stage is this module's.
    sys.modules["toolchain.worker"] = sys.modules["__main__"]
    raise SystemExit(main(sys.argv[1:]))
