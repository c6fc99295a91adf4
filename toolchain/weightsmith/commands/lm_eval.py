"""`invoke evaluate --tasks`: lm-evaluation-harness, where it is installed, against a server.

Its command line and result files are those of https://github.com/EleutherAI/lm-evaluation-harness
(docs/interface.md, docs/API_guide.md).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weightsmith.commands.server import ServerSource, served_name, session_with
from weightsmith.errors import CheckFailed, EnvironmentFailure, UsageError
from weightsmith.evaluating.likelihood import supports_echo
from weightsmith.foreign import TOKENIZER, parse_file
from weightsmith.tools import Tools
from weightsmith.trees import below
from weightsmith.values import Json
from weightsmith.visible import joined

_PROGRAM = "lm_eval"
_SECONDS = 24 * 3600.0
_MAIN = ("exact_match", "acc_norm", "acc", "pass@1", "f1", "bleu")
"""Which of a task's measures stands for it, first found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessRequest:
    """Tasks by the harness's own names, and the server to ask."""

    tasks: str
    place: ServerSource
    served_name: str = ""
    tokenizer: str = ""
    """Folder of the tokenizer; tasks that compare likelihoods are asked of /v1/completions then."""
    limit: int = 0
    """Questions of each task; 0 for all."""
    include: str = ""
    """Folder with task definitions of one's own."""
    concurrency: int = 1


def evaluate_tasks(request: HarnessRequest, tools: Tools) -> Mapping[str, Json]:
    """Return `{score, n, metric, tasks, per_item}`: the mean of the tasks' main measures.

    Raises UsageError for a checkpoint, EnvironmentFailure where the harness is not installed, and
    CheckFailed with its last lines where it fails, as for a task that it does not know.
    """
    if bool(request.place.image) == bool(request.place.url):
        raise UsageError(
            "--tasks needs exactly one of --image and --url",
            hint="--image REF starts an image, --url asks a server",
        )
    tools.progress.stage("evaluate", request.tasks)
    with session_with(request.place, tools, modest=True) as session, tools.scratch() as out:
        name = served_name(session, request.served_name)
        words = command(request, session.endpoint.url, name, out)
        key = os.environ.get("WEIGHTSMITH_API_KEY", "") or "none"
        try:
            tools.command(words, {"OPENAI_API_KEY": key}, b"", _SECONDS)
        except EnvironmentFailure:
            raise EnvironmentFailure(
                "lm-evaluation-harness is not installed",
                hint="`pip install 'lm-eval[api]'` brings the program lm_eval",
            ) from None
        except CheckFailed as error:
            if not request.tokenizer or supports_echo(session, name):
                raise
            raise CheckFailed(
                f"{session.endpoint.shown} gives no log-probabilities of a prompt (llama.cpp's "
                f"server never does), which tasks that compare likelihoods need; {error.message}",
                hint="ask such tasks of the vLLM image, take tasks that generate (without "
                "--tokenizer), or use --data with --metric choice, which llama.cpp can answer",
            ) from None
        return read_results(out)


def command(request: HarnessRequest, url: str, name: str, out: Path) -> tuple[str, ...]:
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
    """Return what the harness's newest result file says; CheckFailed where there is none."""
    files = [path for path in below(out) if path.match("results_*.json")]
    files.sort(key=lambda path: path.stat().st_mtime)
    if not files:
        raise CheckFailed(
            "lm-evaluation-harness wrote no results", hint="run it by hand; its output says why"
        )
    results = parse_file(files[-1], largest=TOKENIZER)
    tasks = {name: _task(name, measures, results) for name, measures in results["results"].items()}
    scored = [task for task in tasks.values() if task["score"] is not None]
    if not scored:
        raise CheckFailed(
            f"none of the tasks reports a measure that is known here: {', '.join(tasks)}",
            hint=f"known: {', '.join(_MAIN)}",
        )
    return {
        "score": sum(task["score"] for task in scored) / len(scored),
        "n": sum(task["n"] for task in scored),
        "metric": "lm-eval",
        "tasks": tasks,
        "per_item": [],
    }


def tasks_text(result: Mapping[str, Json]) -> str:
    """Return the tasks' scores for people, a line each."""
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
    main = next((key for wanted in _MAIN for key in numbers if key.split(",")[0] == wanted), "")
    stderr = measures.get(main.replace(",", "_stderr,", 1)) if main else None
    count = results.get("n-samples", {}).get(name, {}).get("effective", 0)
    return {
        "score": numbers.get(main),
        "measure": main,
        "stderr": stderr if isinstance(stderr, int | float) else None,
        "n": int(count),
        "measures": numbers,
    }
