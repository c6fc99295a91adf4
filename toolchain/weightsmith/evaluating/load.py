"""A load test: streamed requests, several at once, timed piece by piece."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from weightsmith.core.ports import Progress
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import Json
from weightsmith.evaluating.client import Served, thoughts_of
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.session import Refused, ServerSession, TryAgain

_MOST_TOKENS = 10_000_000
"""Of one answer: a server that counts more is not believed."""


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
    counted: int = 0
    """Tokens of the answer, as the server counts them; 0 if it does not say."""

    @property
    def tokens(self) -> int:
        """Tokens of the answer; a piece of text counts as one if the server does not say."""
        return 0 if self.error else self.counted or 1 + len(self.gaps)


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
    asked = [questions[number % len(questions)] for number in range(requests)]
    samples, seconds = measure_all(session, served, asked, concurrency, max_tokens, progress)
    return summary(samples, concurrency, seconds)


def measure_all(
    session: ServerSession,
    served: Served,
    questions: Sequence[Item],
    concurrency: int,
    max_tokens: int,
    progress: Progress,
) -> tuple[tuple[Sample, ...], float]:
    """Return the times of each question, always `concurrency` at a time, and of all, in seconds."""
    lock, counter = threading.Lock(), itertools.count(1)

    def one(question: Item) -> Sample:
        sample = measure(session, served, question, max_tokens)
        with lock:
            progress.advance(next(counter), len(questions), "requests")
        return sample

    began = time.monotonic()
    with ThreadPoolExecutor(concurrency) as pool:
        samples = tuple(pool.map(one, questions))
    return samples, time.monotonic() - began


def measure(session: ServerSession, served: Served, question: Item, max_tokens: int) -> Sample:
    """Return the times of one streamed request; a failure is returned, not raised."""
    times, counted = list[float](), 0
    began = time.monotonic()
    try:
        body = served.body(question, max_tokens, stream=True)
        with session.events(served.path, body) as events:
            for event in events:
                if event == "[DONE]":
                    break
                data = _event(event)
                if _has_text(data, event):
                    times.append(time.monotonic())
                counted = _counted(data) or counted
    except (TryAgain, Refused) as error:
        return Sample(error=str(error))
    except ValueError:
        return Sample(error="an event is not JSON")
    if not times:
        return Sample(error="the stream has no text")
    gaps = tuple(after - before for before, after in itertools.pairwise(times))
    return Sample(first=times[0] - began, gaps=gaps, whole=times[-1] - began, counted=counted)


def _event(event: str) -> dict[str, Json]:
    data = parse(event)
    if not isinstance(data, dict) or "error" in data:
        raise Refused(f"error in the stream: {event[:200]}")
    return data


def _counted(data: Mapping[str, Json]) -> int:
    usage = data.get("usage")
    found = usage.get("completion_tokens") if isinstance(usage, Mapping) else None
    return found if type(found) is int and 0 < found <= _MOST_TOKENS else 0


def _has_text(data: Mapping[str, Json], event: str) -> bool:
    try:
        for choice in data.get("choices") or ():
            delta = choice.get("delta") or {}
            if delta.get("content") or thoughts_of(delta) or choice.get("text"):
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
