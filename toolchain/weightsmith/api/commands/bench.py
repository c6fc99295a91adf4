"""`bench`: run a short load test against an image or a server."""

from __future__ import annotations

import itertools
import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

from weightsmith.api.commands.requests import BenchCommand, Said
from weightsmith.api.commands.server import served_model, session_with
from weightsmith.core.errors import CheckFailed, UsageError
from weightsmith.core.escape import joined
from weightsmith.core.ports import Progress
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import Writable, plain, without_passwords
from weightsmith.evaluating.client import Served
from weightsmith.evaluating.items import Item, read_items
from weightsmith.evaluating.session import Refused, ServerSession, SessionLimits, TryAgain
from weightsmith.steps.destinations import write_files
from weightsmith.steps.tools import Tools

BENCH_FILE = "bench.json"
_TOPICS = (
    "why the sky is blue", "how bread rises", "what a container image is", "how tides come about",
    "why leaves change their colour", "how a bicycle stays upright", "what makes glass clear",
    "how a letter finds its way",
)  # fmt: skip
_QUESTIONS = tuple(
    Item(
        messages=({"role": "user", "content": f"Explain {topic} in a few sentences."},),
        expected=(),
        line=number,
    )
    for number, topic in enumerate(_TOPICS)
)
"""Different questions, so that the server's prompt cache does not distort the results."""


def bench(request: BenchCommand, tools: Tools) -> Said:
    """Return `{subject, runs: [...]}`, one `Run` per concurrency, and the runs as a table.

    Raises UsageError for invalid options, CheckFailed if no request was answered.
    """
    image, url = request.image, request.url
    if bool(image) == bool(url):
        hint = "--image REF starts an image, --url tests a running server"
        raise UsageError("give exactly one of --image and --url", hint=hint)
    if request.out and not (request.out / "build.json").is_file():
        hint = "give a target's result folder in dist/"
        raise UsageError(f"{request.out} has no build.json", hint=hint)
    questions = read_items(request.data) if request.data else _QUESTIONS
    runs, sent, most = [], request.requests, request.max_tokens
    limits = SessionLimits(request_seconds=request.timeout)
    with session_with(tools, limits, image=image, url=url) as session:
        served = served_model(session, request.served_name, may_ask=bool(image))
        for count in request.concurrency:
            tools.progress.stage("bench", f"{sent} requests, {count} at once")
            runs.append(load_test(session, served, questions, count, sent, most, tools.progress))
        if all(run.errors == run.requests for run in runs):
            reasons = ", ".join(runs[0].failures)
            raise CheckFailed(
                f"no request was answered: {reasons}{session.log()}",
                hint="test the server with curl, and read its log",
            )
    result: dict[str, Writable] = {
        "subject": image or without_passwords(url),
        "served_name": served.name,
        "max_tokens": most,
        "cpus": len(os.sched_getaffinity(0)),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": runs,
    }
    if request.out:
        write_files({BENCH_FILE: json.dumps(plain(result), indent=2) + "\n"}, request.out)
    lines = ["at once  requests/s  tokens/s  first token p50/p95 ms  next p50/p95 ms  errors"]
    lines += [
        f"{run.concurrency:>7}  {run.requests_per_s:>10.2f}  {run.tokens_per_s:>8.1f}"
        f"  {run.ttft_ms.text:>22}  {run.itl_ms.text:>15}  {run.errors:>6}"
        for run in runs
    ]
    return result, joined(lines)


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of times in milliseconds; None if nothing was measured."""

    p50: float | None
    p95: float | None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Return the spread of some times."""
        return cls(percentile(seconds, 0.5), percentile(seconds, 0.95))

    @property
    def text(self) -> str:
        """Both for people."""
        return " / ".join("-" if v is None else f"{v:.1f}" for v in (self.p50, self.p95))


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a number of requests at once gave. Failed requests are only counted as errors."""

    concurrency: int
    requests: int
    requests_per_s: float
    tokens_per_s: float
    ttft_ms: Spread
    itl_ms: Spread
    latency_ms: Spread
    errors: int
    failures: Mapping[str, int]
    """Reason -> count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request; times in seconds."""

    first: float = 0.0
    """From sending the request to the first text."""
    gaps: tuple[float, ...] = ()
    """Between consecutive chunks; servers usually send one token per chunk."""
    whole: float = 0.0
    error: str = ""
    """Why it failed; empty if it succeeded."""


def load_test(
    session: ServerSession,
    served: Served,
    questions: Sequence[Item],
    concurrency: int,
    requests: int,
    max_tokens: int,
    progress: Progress,
) -> Run:
    """Run `requests` questions, always `concurrency` at a time."""
    lock, counter = threading.Lock(), itertools.count(1)

    def one(number: int) -> Sample:
        sample = measure(session, served, questions[number % len(questions)], max_tokens)
        with lock:
            progress.advance(next(counter), requests, "requests")
        return sample

    began = time.monotonic()
    with ThreadPoolExecutor(concurrency) as pool:
        samples = list(pool.map(one, range(requests)))
    return summary(samples, concurrency, time.monotonic() - began)


def measure(session: ServerSession, served: Served, question: Item, max_tokens: int) -> Sample:
    """Return the times of one streamed request; a failure is returned, not raised."""
    times: list[float] = []
    began = time.monotonic()
    try:
        body = served.body(question, max_tokens, stream=True)
        with session.events(served.path, body) as events:
            for event in events:
                if event == "[DONE]":
                    break
                if _has_text(event):
                    times.append(time.monotonic())
    except (TryAgain, Refused) as error:
        return Sample(error=str(error))
    except ValueError:
        return Sample(error="an event is not JSON")
    if not times:
        return Sample(error="the stream has no text")
    gaps = tuple(after - before for before, after in itertools.pairwise(times))
    return Sample(first=times[0] - began, gaps=gaps, whole=times[-1] - began)


def _has_text(event: str) -> bool:
    data = parse(event)
    if not isinstance(data, dict) or "error" in data:
        raise Refused(f"error in the stream: {event[:200]}")
    try:
        for choice in data.get("choices") or ():
            delta = choice.get("delta") or {}
            if delta.get("content") or delta.get("reasoning_content") or choice.get("text"):
                return True
    except (AttributeError, TypeError):
        raise Refused(f"an event has no list of choices: {event[:200]}") from None
    return False


def summary(samples: Sequence[Sample], concurrency: int, seconds: float) -> Run:
    """Return the results of a run, which took so many seconds."""
    good = [sample for sample in samples if not sample.error]
    pieces = sum(1 + len(sample.gaps) for sample in good)
    return Run(
        concurrency=concurrency,
        requests=len(samples),
        requests_per_s=round(len(good) / seconds, 3) if seconds else 0.0,
        tokens_per_s=round(pieces / seconds, 2) if seconds else 0.0,
        ttft_ms=Spread.of([sample.first for sample in good]),
        itl_ms=Spread.of([gap for sample in good for gap in sample.gaps]),
        latency_ms=Spread.of([sample.whole for sample in good]),
        errors=len(samples) - len(good),
        failures=Counter(sample.error for sample in samples if sample.error),
    )


def percentile(seconds: Sequence[float], share: float) -> float | None:
    """Return a percentile (nearest rank) in ms; `share` from 0 to 1."""
    rank = max(1, math.ceil(share * len(seconds) - 1e-9))
    return round(1000 * sorted(seconds)[rank - 1], 3) if seconds else None
