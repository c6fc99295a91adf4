"""`invoke evaluate --tasks`: run lm-evaluation-harness, if installed, against a server.

The command line and result files are documented at https://github.com/EleutherAI/lm-evaluation-harness
(docs/interface.md, docs/API_guide.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from weightsmith.api.commands.requests import EvaluateCommand
from weightsmith.api.commands.server import ServerSource, api_key, served_model, session_with
from weightsmith.core.errors import CheckFailed, EnvironmentFailure, UsageError
from weightsmith.core.escape import joined
from weightsmith.core.safe_parse import TOKENIZER, parse_file
from weightsmith.core.trees import below
from weightsmith.core.values import Json
from weightsmith.evaluating.likelihood import supports_echo
from weightsmith.steps.tools import Tools

_PROGRAM = "lm_eval"
_SECONDS = 24 * 3600.0
_MAIN = ("exact_match", "acc_norm", "acc", "pass@1", "f1", "bleu")
"""A task's main measure is the first of these that it reports."""


def evaluate_tasks(request: EvaluateCommand, tools: Tools) -> Mapping[str, Json]:
    """Return `{score, n, metric, tasks, per_item}`: the mean of the tasks' main measures.

    Raises UsageError for a checkpoint, EnvironmentFailure if the harness is not installed, and
    CheckFailed with the harness's last lines if it fails, for example on an unknown task.
    """
    if request.run.memory:
        raise UsageError(
            "--memory limits jobs, and --tasks starts none: your own lm_eval asks the server",
            hint="leave out --memory",
        )
    if request.answers:
        raise UsageError("--answers is for questions of --data", hint="leave it out")
    place = ServerSource(image=request.image, url=request.url)
    if bool(place.image) == bool(place.url):
        raise UsageError(
            "--tasks needs exactly one of --image and --url",
            hint="--image REF starts an image, --url queries a server",
        )
    tools.progress.stage("evaluate", request.tasks)
    with session_with(place, tools, modest=True) as session, tools.scratch() as out:
        served = served_model(session, place, request.served_name)
        words = command(request, session.endpoint.url, served.name, out)
        key = api_key() or "none"
        try:
            tools.command(words, {"OPENAI_API_KEY": key}, b"", _SECONDS)
        except EnvironmentFailure:
            raise EnvironmentFailure(
                "lm-evaluation-harness is not installed",
                hint="install it with `pip install 'lm-eval[api]'`",
            ) from None
        except CheckFailed as error:
            if not request.tokenizer or supports_echo(session, served):
                raise
            raise CheckFailed(
                f"{session.endpoint.shown} does not return log-probabilities of a prompt "
                "(llama.cpp's server never does), and tasks that compare likelihoods need "
                f"them; {error.message}",
                hint="use the vLLM image, choose tasks that generate text (without --tokenizer), "
                "or use --data with --metric choice, which works with llama.cpp",
            ) from None
        return read_results(out)


def command(request: EvaluateCommand, url: str, name: str, out: Path) -> tuple[str, ...]:
    """Return the harness's command line."""
    kind, path = ("local-completions", "completions") if request.tokenizer else (
        "local-chat-completions", "chat/completions"
    )  # fmt: skip
    arguments = f"model={name},base_url={url}/v1/{path},num_concurrent={request.concurrency}"
    arguments += ",max_retries=3"
    if request.tokenizer:
        arguments += f",tokenizer={request.tokenizer},tokenized_requests=False"
    words = [_PROGRAM, "--model", kind, "--model_args", arguments, "--tasks", request.tasks]
    words += ["--output_path", str(out), "--seed", "0"]
    words += [] if request.tokenizer else ["--apply_chat_template"]
    words += ["--limit", str(request.limit)] if request.limit else []
    words += ["--include_path", request.include] if request.include else []
    return tuple(words)


def read_results(out: Path) -> Mapping[str, Json]:
    """Return the harness's newest results; raise CheckFailed if there are none."""
    files = [path for path in below(out) if path.match("results_*.json")]
    files.sort(key=lambda path: path.stat().st_mtime)
    if not files:
        raise CheckFailed(
            "lm-evaluation-harness wrote no results", hint="run lm_eval by hand and read its output"
        )
    results = parse_file(files[-1], largest=TOKENIZER)
    tasks = {name: _task(name, measures, results) for name, measures in results["results"].items()}
    scored = [task for task in tasks.values() if task["score"] is not None]
    if not scored:
        raise CheckFailed(
            f"none of the tasks reports a known measure: {', '.join(tasks)}",
            hint=f"known measures: {', '.join(_MAIN)}",
        )
    return {
        "score": sum(task["score"] for task in scored) / len(scored),
        "n": sum(task["n"] for task in scored),
        "metric": "lm-eval",
        "tasks": tasks,
        "per_item": [],
    }


def tasks_text(result: Mapping[str, Json]) -> str:
    """Return the tasks' scores as text, one line each."""
    return joined(
        f"{name}: {task['score']} ({task['measure']}, n={task['n']})"
        for name, task in result["tasks"].items()
    )


def _task(name: str, measures: Mapping[str, Json], results: Mapping[str, Json]) -> dict[str, Json]:
    numbers = {
        key: value
        for key, value in measures.items()
        if isinstance(value, int | float) and "stderr" not in key
    }
    main = next((key for measure in _MAIN for key in numbers if key.split(",")[0] == measure), "")
    stderr = measures.get(main.replace(",", "_stderr,", 1)) if main else None
    count = results.get("n-samples", {}).get(name, {}).get("effective", 0)
    return {
        "score": numbers.get(main),
        "measure": main,
        "stderr": stderr if isinstance(stderr, int | float) else None,
        "n": int(count),
        "measures": numbers,
    }
