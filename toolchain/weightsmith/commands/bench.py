"""`invoke bench`: run a short load test against an image or a server."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime

from weightsmith.commands.requests import BenchCommand
from weightsmith.commands.server import ServerSource, served_model, session_with
from weightsmith.core.errors import CheckFailed, UsageError
from weightsmith.core.escape import joined
from weightsmith.core.values import Json, without_passwords
from weightsmith.evaluating.items import Item, read_items
from weightsmith.evaluating.load import load_test
from weightsmith.evaluating.served import Served
from weightsmith.evaluating.session import ServerSession, SessionLimits
from weightsmith.steps.results import write_files
from weightsmith.steps.tools import Tools

BENCH_FILE = "bench.json"
_TOPICS = (
    "why the sky is blue", "how bread rises", "what a container image is", "how tides come about",
    "why leaves change their colour", "how a bicycle stays upright", "what makes glass clear",
    "how a letter finds its way",
)  # fmt: skip
"""Different questions, so that the server's prompt cache does not distort the results."""


def bench(request: BenchCommand, tools: Tools) -> Mapping[str, Json]:
    """Return `{subject, runs: [...]}`, one run per concurrency; see `load.load_test`.

    Raises UsageError for invalid options, CheckFailed if no request was answered.
    """
    place = ServerSource(image=request.image, url=request.url)
    if bool(place.image) == bool(place.url):
        raise UsageError(
            "give exactly one of --image and --url",
            hint="--image REF starts an image, --url tests a running server",
        )
    if request.out and not (request.out / "build.json").is_file():
        raise UsageError(
            f"{request.out} has no build.json", hint="give a target's result folder in dist/"
        )
    questions = _questions(request)
    limits = SessionLimits(request_seconds=request.timeout)
    with session_with(place, tools, limits) as session:
        served = served_model(session, place, request.served_name)
        runs = [_run(session, served, questions, count, request, tools) for count in
                request.concurrency]  # fmt: skip
        if all(run["errors"] == run["requests"] for run in runs):
            reasons = ", ".join(runs[0]["failures"])
            raise CheckFailed(
                f"no request was answered: {reasons}{session.log()}",
                hint="test the server with curl, and read its log",
            )
    result = {
        "subject": place.image or without_passwords(place.url),
        "served_name": served.name,
        "max_tokens": request.max_tokens,
        "cpus": len(os.sched_getaffinity(0)),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": runs,
    }
    if request.out:
        write_files({BENCH_FILE: json.dumps(result, indent=2) + "\n"}, request.out)
    return result


def _questions(request: BenchCommand) -> tuple[Item, ...]:
    if request.data:
        return read_items(request.data)
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
    request: BenchCommand,
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
