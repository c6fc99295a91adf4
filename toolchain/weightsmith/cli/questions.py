"""Questions to an image, a server or a checkpoint: `evaluate`, `bench`."""

from __future__ import annotations

from collections.abc import Mapping

from weightsmith.api.commands.requests import BenchCommand, EvaluateCommand
from weightsmith.cli.command import command
from weightsmith.core.values import Writable


@command(EvaluateCommand)
def evaluate(asked: EvaluateCommand) -> tuple[Mapping[str, Writable], str]:
    """Score a started image, a server, or a checkpoint with or without adapter on --data."""
    from weightsmith.api.commands.evaluate import evaluate_subject, evaluate_text
    from weightsmith.api.commands.lm_eval import evaluate_tasks, tasks_text
    from weightsmith.building.progress import progress_for
    from weightsmith.building.wiring import open_for

    with open_for(asked, progress_for()) as tools:
        if asked.tasks:
            result = evaluate_tasks(asked, tools)
            return result, tasks_text(result)
        result = evaluate_subject(asked, tools)
    return result, evaluate_text(result)


@command(BenchCommand)
def bench(asked: BenchCommand) -> tuple[Mapping[str, Writable], str]:
    """Measure throughput and latencies of a started image or a server in a short load test."""
    from weightsmith.api.commands.bench import bench as measure
    from weightsmith.api.commands.bench import bench_text
    from weightsmith.building.progress import progress_for
    from weightsmith.building.wiring import open_for

    with open_for(asked, progress_for()) as tools:
        result = measure(asked, tools)
    return result, bench_text(result)


COMMANDS = (evaluate, bench)
