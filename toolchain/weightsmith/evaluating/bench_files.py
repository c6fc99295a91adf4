"""Results files of guidellm and AIPerf: figures of an image that was measured elsewhere."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.safe_parse import given_content, parse
from weightsmith.core.values import JsonValue
from weightsmith.evaluating.speed import SpeedEvidence, of_file
from weightsmith.recipe.schema import Bench

_LARGEST = 64 << 20
"""Bytes; guidellm writes every request with its text unless it is told to sample."""
_SHORT = 200
"""Characters of a name."""
_DIGEST = re.compile(r"(?<![0-9a-z])sha256[-_:]([0-9a-f]{64})(?![0-9a-f])")
_MS = {"ms": 1.0, "s": 1000.0, "sec": 1000.0, "us": 0.001, "ns": 1e-6}
_KINDS = "guidellm's benchmarks.json and AIPerf's profile_export_aiperf.json are read"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    """One load that a tool put on a server."""

    figures: Mapping[str, float]
    concurrency: float
    requests: float
    errors: float
    prompt_tokens: float
    output_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultsFile:
    """A results file that was read, before it is known which image it is about."""

    name: str
    sha256: str
    tool: str
    version: str
    model: str
    devices: tuple[str, ...]
    loads: Sequence[_Load]

    @property
    def image(self) -> str:
        """The digest in its name, of the image that it is about; "" if the name has none."""
        found = _DIGEST.search(self.name)
        return f"sha256:{found[1]}" if found else ""

    def evidence(self, bench: Bench | None) -> SpeedEvidence:
        """Return the load that is most like the recipe's, held against its limits."""
        wanted = bench.concurrency if bench else 0
        load = min(self.loads, key=lambda one: abs(one.concurrency - wanted))
        # A tool's mean concurrency falls below the wanted one as its last requests end.
        same = not wanted or abs(load.concurrency - wanted) <= 0.1 * wanted
        return SpeedEvidence(
            file=self.name,
            sha256=self.sha256,
            tool=self.tool,
            version=self.version,
            model=self.model,
            devices=self.devices,
            concurrency=round(load.concurrency, 2),
            requests=round(load.requests),
            errors=round(load.errors),
            prompt_tokens=round(load.prompt_tokens, 1),
            output_tokens=round(load.output_tokens, 1),
            image=self.image,
            figures=tuple(
                of_file(name, value, bench, same_load=same, tool=self.tool)
                for name, value in load.figures.items()
            ),
        )


def read_results(path: Path, served: str = "") -> ResultsFile:
    """Return what a tool's results file says of the model `served`; "" for any model.

    Raises UsageError for a file that cannot be read, and InputRefused for another kind of file, one
    without a latency, or one about another model.
    """
    try:
        data = given_content(path, _LARGEST)
    except OSError as error:
        raise UsageError(
            f"--bench-results {path} cannot be read: {error.strerror}",
            hint="give the JSON file that guidellm or AIPerf wrote",
        ) from None
    except ValueError as error:
        raise _refused(path, str(error), "let guidellm keep fewer requests") from None
    try:
        found = parse(data)
    except ValueError as error:
        raise _refused(path, f"it is no valid JSON: {error}", _KINDS) from None
    name, sha256 = path.name[:_SHORT], hashlib.sha256(data).hexdigest()
    if isinstance(runs := _at(found, "benchmarks"), list):
        read = _guidellm(found, [run for run in runs if isinstance(run, dict)], name, sha256)
    elif isinstance(_at(found, "time_to_first_token"), dict):
        if _at(found, "was_cancelled") is True or _at(found, "is_complete") is False:
            raise _refused(path, "its run was cancelled", "let AIPerf finish, and give that file")
        read = _aiperf(found, name, sha256)
    else:
        raise _refused(path, "it has no `benchmarks` and no `time_to_first_token`", _KINDS)
    if not read.loads:
        raise _refused(
            path,
            f"it looks like {read.tool}'s, but has no 95th percentile of the time to the first "
            "token or between tokens",
            "measure with streaming, and do not change the file",
        )
    if served and read.model and read.model != served:
        raise _refused(
            path,
            f"it is about the model {read.model!r}, and this image serves {served!r}",
            "give the results of this image, or ask it under its own name",
        )
    return read


def _refused(path: Path, why: str, hint: str) -> InputRefused:
    return InputRefused(f"--bench-results {path}: {why}", hint=hint)


def _guidellm(found: JsonValue, runs: Sequence[JsonValue], name: str, sha256: str) -> ResultsFile:
    """Read a report of guidellm; where the model stands differs from 0.2 to 0.8."""
    models = (
        _text(_at(part, *keys))
        for part, keys in (
            *((run, ("config", "backend", "model")) for run in runs),
            *((run, ("worker", "backend_model")) for run in runs),
            (found, ("args", "model")),
            (found, ("args", "backend_kwargs", "model")),
        )
    )
    return ResultsFile(
        name=name,
        sha256=sha256,
        tool="guidellm",
        version=_text(_at(found, "metadata", "guidellm_version")),
        model=next(filter(None, models), ""),
        devices=(),
        loads=[load for run in runs if (load := _guidellm_load(run))],
    )


def _guidellm_load(run: JsonValue) -> _Load | None:
    metrics = _at(run, "metrics")

    def mean(key: str) -> float:
        return _number(_at(metrics, key, "successful", "mean")) or 0.0

    def total(key: str) -> float:
        there = _number(_at(metrics, "request_totals", key))
        return there or _number(_at(run, "run_stats", "requests_made", key)) or 0.0

    return _load(
        ttft=_number(_at(metrics, "time_to_first_token_ms", "successful", "percentiles", "p95")),
        itl=_number(_at(metrics, "inter_token_latency_ms", "successful", "percentiles", "p95")),
        rate=mean("output_tokens_per_second"),
        concurrency=_number(_at(run, "config", "strategy", "streams"))
        or _number(_at(run, "args", "strategy", "streams"))
        or mean("request_concurrency"),
        requests=total("successful"),
        errors=total("errored"),
        prompt_tokens=mean("prompt_token_count"),
        output_tokens=mean("output_token_count"),
    )


def _aiperf(found: JsonValue, name: str, sha256: str) -> ResultsFile:
    """Read a JsonExportData, as AIPerf writes it; older versions name model and load elsewhere."""

    def of(key: str, which: str = "avg") -> float | None:
        return _number(_at(found, key, which))

    def ms(key: str) -> float | None:
        value, unit = of(key, "p95"), _at(found, key, "unit")
        factor = _MS.get(unit) if isinstance(unit, str) else None
        return None if value is None or factor is None else value * factor

    asked = _at(found, "input_config")
    load = _load(
        ttft=ms("time_to_first_token"),
        itl=ms("inter_token_latency"),
        rate=of("output_token_throughput"),
        concurrency=_number(_at(asked, "loadgen", "concurrency"))
        or _of_phases(asked)
        or of("effective_concurrency")
        or 0.0,
        requests=of("request_count") or 0.0,
        errors=of("error_request_count") or 0.0,
        prompt_tokens=of("input_sequence_length") or 0.0,
        output_tokens=of("output_sequence_length") or 0.0,
    )
    return ResultsFile(
        name=name,
        sha256=sha256,
        tool="aiperf",
        version=_text(_at(found, "aiperf_version")),
        model=_only(_at(asked, "endpoint", "model_names")) or _only(_at(asked, "models", "items")),
        devices=tuple(dict.fromkeys(_gpus(found))),
        loads=[load] if load else [],
    )


def _of_phases(asked: JsonValue) -> float | None:
    """Return the requests at once of the phase that was measured; None if there is not one."""
    phases = _at(asked, "phases")
    found = [
        _number(_at(phase, "concurrency"))
        for phase in (phases if isinstance(phases, list) else ())
        if _at(phase, "kind") in (None, "profiling")
    ]
    return found[0] if len(found) == 1 else None


def _only(models: JsonValue) -> str:
    """Return the one model of a list of names, or of objects with a name; "" for several."""
    if not isinstance(models, list) or len(models) != 1:
        return ""
    return _text(models[0]) or _text(_at(models[0], "name"))


def _gpus(found: JsonValue) -> Iterable[str]:
    endpoints = _at(found, "telemetry_data", "endpoints")
    for endpoint in endpoints.values() if isinstance(endpoints, dict) else ():
        gpus = _at(endpoint, "gpus")
        for gpu in gpus.values() if isinstance(gpus, dict) else ():
            if name := _text(_at(gpu, "gpu_name")):
                yield name


def _load(
    *, ttft: float | None, itl: float | None, rate: float | None, **rest: float
) -> _Load | None:
    given = {"ttft_p95_ms": ttft, "itl_p95_ms": itl, "tokens_per_s": rate}
    figures = {name: value for name, value in given.items() if value}
    return _Load(figures=figures, **rest) if ttft or itl else None


def _at(value: JsonValue, *keys: str) -> JsonValue:
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def _number(value: JsonValue) -> float | None:
    """Return a number that can be a figure; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < 1e12 and math.isfinite(value) else None


def _text(value: JsonValue) -> str:
    return value[:_SHORT] if isinstance(value, str) else ""
