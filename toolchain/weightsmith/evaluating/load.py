"""A short load test over the streaming API: throughput, time to first token, latency."""

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
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.served import Served
from weightsmith.evaluating.session import Refused, ServerSession, TryAgain


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
) -> Mapping[str, Json]:
    """Run `requests` questions, always `concurrency` at a time.

    Returns `{concurrency, requests, requests_per_s, tokens_per_s, ttft_ms, itl_ms, latency_ms,
    errors}`, times as `{p50, p95}` in milliseconds (None if nothing was measured), and `failures`,
    reason -> count. Failed requests are only counted as errors.
    """
    done = 0
    lock = threading.Lock()

    def one(number: int) -> Sample:
        nonlocal done
        sample = measure(session, served, questions[number % len(questions)], max_tokens)
        with lock:
            done += 1
            progress.advance(done, requests, "requests")
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


def summary(samples: Sequence[Sample], concurrency: int, seconds: float) -> Mapping[str, Json]:
    """Return the results of a run; see `load_test`."""
    good = [sample for sample in samples if not sample.error]
    pieces = sum(1 + len(sample.gaps) for sample in good)
    return {
        "concurrency": concurrency,
        "requests": len(samples),
        "requests_per_s": round(len(good) / seconds, 3) if seconds else 0.0,
        "tokens_per_s": round(pieces / seconds, 2) if seconds else 0.0,
        "ttft_ms": _spread([sample.first for sample in good]),
        "itl_ms": _spread([gap for sample in good for gap in sample.gaps]),
        "latency_ms": _spread([sample.whole for sample in good]),
        "errors": len(samples) - len(good),
        "failures": dict(Counter(sample.error for sample in samples if sample.error)),
    }


def _spread(seconds: Sequence[float]) -> Mapping[str, float | None]:
    return {name: percentile(seconds, share) for name, share in (("p50", 0.5), ("p95", 0.95))}


def percentile(seconds: Sequence[float], share: float) -> float | None:
    """Return a percentile (nearest rank) in ms; `share` from 0 to 1."""
    if not seconds:
        return None
    rank = max(1, math.ceil(share * len(seconds) - 1e-9))
    return round(1000 * sorted(seconds)[rank - 1], 3)
