"""Questions to an image, a server or a checkpoint: `evaluate`, `bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weightsmith.cli.command import command
from weightsmith.cli.flags import JOBS
from weightsmith.cli.sections import Flags
from weightsmith.errors import UsageError
from weightsmith.recipe import Scoring
from weightsmith.run_options import RunOptions
from weightsmith.values import Json

if TYPE_CHECKING:  # imported when it is called: the list of commands must appear at once
    from weightsmith.commands.evaluate import EvaluateOptions, Subject
    from weightsmith.commands.lm_eval import HarnessRequest


@command(
    many=("adapter",),
    # `max_drop` is against an earlier run, and there is no limit without the flag.
    sections={
        "scoring": Flags(section=Scoring, without=("max_drop", "require")),
        "run": JOBS,
    },
    meanings={
        "calibration": "JSON Lines that the model was calibrated on; questions that appear in it "
        "are reported",
        "model": "checkpoint folder to load",
    },
)
def evaluate(
    *,
    data: str = "",
    scoring: Scoring,
    image: str = "",
    url: str = "",
    model: str = "",
    adapter: Sequence[str] = (),
    served_name: str = "",
    tasks: str = "",
    tokenizer: str = "",
    include: str = "",
    limit: int = 0,
    concurrency: int = 1,
    timeout: float = 120.0,
    retries: int = 2,
    calibration: str = "",
    against: str = "",
    max_drop: str = "",
    answers: str = "",
    run: RunOptions,
) -> tuple[Mapping[str, Json], str]:
    """Score a started image, a server, or a checkpoint with or without adapter on --data."""
    from weightsmith.commands.arguments import SHORTEST, at_least, number, required
    from weightsmith.commands.evaluate import EvaluateOptions, Subject, check_subject
    from weightsmith.commands.lm_eval import HarnessRequest
    from weightsmith.commands.server import ServerSource
    from weightsmith.wiring import keep_clean

    keep_clean([model, *adapter, image], cache=run.cache)
    at_least(0, limit=limit, retries=retries)
    at_least(1, concurrency=concurrency)
    at_least(SHORTEST, timeout=timeout)
    if tasks:
        if answers:
            raise UsageError("--answers is for questions of --data", hint="leave it out")
        request = HarnessRequest(
            tasks=tasks, place=ServerSource(image=image, url=url), served_name=served_name,
            tokenizer=tokenizer, include=include, limit=limit, concurrency=concurrency,
        )  # fmt: skip
        return _by_harness(request, run)
    required(data=data)
    subject = Subject(
        image=image, url=url, model=model, adapters=tuple(adapter), served_name=served_name
    )
    check_subject(subject)
    options = EvaluateOptions(
        scoring=scoring, concurrency=concurrency, timeout=timeout, retries=retries, limit=limit,
        calibration=calibration, against=against, answers=answers,
        max_drop=number(max_drop, "--max-drop") if max_drop else None,
    )  # fmt: skip
    return _on_data(subject, Path(data), options, run)


def _by_harness(request: HarnessRequest, run: RunOptions) -> tuple[Mapping[str, Json], str]:
    """Score a server on tasks of lm-evaluation-harness."""
    from weightsmith.commands.lm_eval import evaluate_tasks, tasks_text
    from weightsmith.progress import progress_for
    from weightsmith.wiring import open_tools

    if run.memory:
        raise UsageError(
            "--memory limits jobs, and --tasks starts none: your own lm_eval asks the server",
            hint="leave out --memory",
        )
    with open_tools(run, progress_for()) as tools:
        result = evaluate_tasks(request, tools)
    return result, tasks_text(result)


def _on_data(
    subject: Subject, data: Path, options: EvaluateOptions, run: RunOptions
) -> tuple[Mapping[str, Json], str]:
    """Score an image, a server or a checkpoint on a file of questions."""
    from weightsmith.commands.evaluate import evaluate_subject, evaluate_text
    from weightsmith.progress import progress_for
    from weightsmith.wiring import open_tools

    with open_tools(run, progress_for()) as tools:
        result = evaluate_subject(subject, data, options, tools)
    return result, evaluate_text(result)


@command(
    sections={"run": Flags(section=RunOptions, only=("runner", "insecure", "cache", "cache_from"))},
    meanings={
        "concurrency": "numbers of requests at once, separated by commas; one run for each",
        "data": "JSON Lines as for `evaluate`; default: built-in questions",
        "out": "folder of a build, whose report gets the result",
    },
)
def bench(
    *,
    image: str = "",
    url: str = "",
    served_name: str = "",
    concurrency: str = "1,4,16",
    requests: int = 32,
    max_tokens: int = 64,
    data: str = "",
    timeout: float = 120.0,
    out: str = "",
    run: RunOptions,
) -> tuple[Mapping[str, Json], str]:
    """Measure throughput and latencies of a started image or a server in a short load test."""
    from weightsmith.commands.arguments import SHORTEST, at_least, counts
    from weightsmith.commands.bench import BenchRequest, bench_text
    from weightsmith.commands.bench import bench as measure
    from weightsmith.commands.server import ServerSource
    from weightsmith.progress import progress_for
    from weightsmith.wiring import open_tools

    at_least(SHORTEST, timeout=timeout)
    request = BenchRequest(
        place=ServerSource(image=image, url=url),
        served_name=served_name,
        concurrency=counts(concurrency, "--concurrency"),
        requests=counts(str(requests), "--requests")[0],
        max_tokens=counts(str(max_tokens), "--max-tokens")[0],
        data=data,
        timeout=timeout,
        out=out,
    )
    with open_tools(run, progress_for()) as tools:
        result = measure(request, tools)
    return result, bench_text(result)


COMMANDS = (evaluate, bench)
