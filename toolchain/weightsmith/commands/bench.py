"""`invoke bench`: run a short load test against an image or a server."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from weightsmith.commands.server import ServerSource, served_model, session_with
from weightsmith.errors import CheckFailed, UsageError
from weightsmith.evaluating.items import Item, read_items
from weightsmith.evaluating.load import load_test
from weightsmith.evaluating.served import Served
from weightsmith.evaluating.session import ServerSession, SessionLimits
from weightsmith.steps.results import write_files
from weightsmith.tools import Tools
from weightsmith.values import Json, without_passwords
from weightsmith.visible import joined

BENCH_FILE = "bench.json"
_TOPICS = (
    "why the sky is blue", "how bread rises", "what a container image is", "how tides come about",
    "why leaves change their colour", "how a bicycle stays upright", "what makes glass clear",
    "how a letter finds its way",
)  # fmt: skip
"""Different questions, so that the server's prompt cache does not distort the results."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """What to test, and with how much load."""

    place: ServerSource
    served_name: str = ""
    concurrency: tuple[int, ...] = (1, 4, 16)
    requests: int = 32
    """Number of requests in each run."""
    max_tokens: int = 64
    data: str = ""
    """JSON Lines with questions that replace the built-in ones."""
    timeout: float = 120.0
    out: str = ""
    """A build's result folder; its report is updated to show the results."""


def bench(request: BenchRequest, tools: Tools) -> Mapping[str, Json]:
    """Return `{subject, runs: [...]}`, one run per concurrency; see `load.load_test`.

    Raises UsageError for invalid options, CheckFailed if no request was answered.
    """
    if bool(request.place.image) == bool(request.place.url):
        raise UsageError(
            "give exactly one of --image and --url",
            hint="--image REF starts an image, --url tests a running server",
        )
    if request.out and not Path(request.out, "build.json").is_file():
        raise UsageError(
            f"{request.out} has no build.json", hint="give a target's result folder in dist/"
        )
    questions = _questions(request)
    limits = SessionLimits(request_seconds=request.timeout)
    with session_with(request.place, tools, limits) as session:
        served = served_model(session, request.place, request.served_name)
        runs = [_run(session, served, questions, count, request, tools) for count in
                request.concurrency]  # fmt: skip
        if all(run["errors"] == run["requests"] for run in runs):
            reasons = ", ".join(runs[0]["failures"])
            raise CheckFailed(
                f"no request was answered: {reasons}{session.log()}",
                hint="test the server with curl, and read its log",
            )
    result = {
        "subject": request.place.image or without_passwords(request.place.url),
        "served_name": served.name,
        "max_tokens": request.max_tokens,
        "cpus": len(os.sched_getaffinity(0)),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": runs,
    }
    if request.out:
        write_files({BENCH_FILE: json.dumps(result, indent=2) + "\n"}, Path(request.out))
    return result


def _questions(request: BenchRequest) -> tuple[Item, ...]:
    if request.data:
        return read_items(Path(request.data))
    return tuple(
        Item(
            messages=({"role": "user", "content": f"Explain {topic} in a few sentences."},),
            expected=(),
            line=number,
        )
        for number, topic in enumerate(_TOPICS)
    )


def _run(
    session: ServerSession,
    served: Served,
    questions: tuple[Item, ...],
    count: int,
    request: BenchRequest,
    tools: Tools,
) -> Mapping[str, Json]:
    tools.progress.stage("bench", f"{request.requests} requests, {count} at once")
    return load_test(
        session, served, questions, count, request.requests, request.max_tokens, tools.progress
    )


def bench_text(result: Mapping[str, Json]) -> str:
    """Return the runs as a table for people."""
    lines = ["at once  requests/s  tokens/s  first token p50/p95 ms  next p50/p95 ms  errors"]
    for run in result["runs"]:
        first, after = (_pair(run[key]) for key in ("ttft_ms", "itl_ms"))
        lines.append(
            f"{run['concurrency']:>7}  {run['requests_per_s']:>10.2f}  {run['tokens_per_s']:>8.1f}"
            f"  {first:>22}  {after:>15}  {run['errors']:>6}"
        )
    return joined(lines)


def _pair(spread: Mapping[str, Json]) -> str:
    return " / ".join("-" if v is None else f"{v:.1f}" for v in (spread["p50"], spread["p95"]))
