"""`bench`: run a short load test against an image or a server."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime

from weightsmith.api.commands.requests import BenchCommand, Said
from weightsmith.api.commands.server import served_model, session_with
from weightsmith.core.errors import CheckFailed, UsageError
from weightsmith.core.escape import joined
from weightsmith.core.values import Writable, plain, without_passwords
from weightsmith.evaluating.items import Item, read_items
from weightsmith.evaluating.load import load_test
from weightsmith.evaluating.session import SessionLimits
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
    # Of all metrics, the one whose expected answers may have any form: none is judged here.
    questions = read_items(request.data, "command") if request.data else _QUESTIONS
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
