"""Questions to a model: `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence

from weightsmith import wiring
from weightsmith.commands.arguments import SHORTEST, at_least, number, options_of
from weightsmith.commands.evaluate import EvaluateOptions, Subject, evaluate_subject
from weightsmith.library.arguments import AnyPath, Texts, path_of, paths_of, texts_of
from weightsmith.library.results import Evaluation
from weightsmith.progress import shown
from weightsmith.recipe import Evaluate
from weightsmith.run_options import RunOptions


def evaluate(
    data: AnyPath,
    *,
    image: str = "",
    url: str = "",
    model: AnyPath = "",
    adapters: AnyPath | Sequence[AnyPath] = (),
    served_name: str = "",
    metric: str = "contains",
    command: Texts = (),
    min_score: float = 0.0,
    max_tokens: int = 64,
    training: AnyPath = "",
    strict: bool = False,
    limit: int = 0,
    concurrency: int = 1,
    timeout: float = 120.0,
    retries: int = 2,
    calibration: AnyPath = "",
    against: AnyPath | Evaluation = "",
    max_drop: float | None = None,
    answers: AnyPath = "",
    runner: str = "auto",
    allow_network_in_jobs: bool = False,
    memory: str = "",
    insecure: bool = False,
    cache: str = "",
    cache_from: str = "",
    progress: bool = True,
) -> Evaluation:
    """Score an image, a server or a checkpoint on questions, JSON Lines of `{prompt, expected}`.

    Exactly one is needed: `image`, which is started (a reference or `oci:FOLDER`), `url` of an
    OpenAI-compatible server, or `model`, a checkpoint's folder, with or without `adapters`.
    `against` is an earlier result, or a file of `weightsmith evaluate --json`: it is compared
    question by question, and may be better by at most `max_drop`.

    Raises UsageError for invalid data or options, InputRefused for questions that are in `training`
    or `calibration` if `strict`, CheckFailed for a score below `min_score` or too large a drop, or
    a server that fails, EnvironmentFailure if the machine lacks something.

    >>> base = weightsmith.evaluate(
    ...     "examples/tiny/eval-a.jsonl", model="examples/tiny/base", progress=False
    ... )
    >>> tuned = weightsmith.evaluate(
    ...     "examples/tiny/eval-a.jsonl", image="oci:image", against=base, progress=False
    ... )
    >>> tuned.score > base.score, tuned.comparison["drop"] < 0
    (True, True)
    """
    run = RunOptions(
        runner=runner,
        allow_network_in_jobs=allow_network_in_jobs,
        memory=memory,
        insecure=insecure,
        cache=cache,
        cache_from=cache_from,
    )
    scoring = options_of(
        Evaluate,
        "evaluate",
        data=_text(data),
        metric=metric,
        command=texts_of(command),
        min_score=min_score,
        max_tokens=max_tokens,
        training=_text(training),
        strict=strict,
        limit=limit,
    )
    at_least(0, retries=retries)
    at_least(1, concurrency=concurrency)
    at_least(SHORTEST, timeout=timeout)
    subject = Subject(
        image=image,
        url=url,
        model=_text(model),
        adapters=tuple(map(str, paths_of(adapters))),
        served_name=served_name,
    )
    wiring.keep_clean([subject.model, *subject.adapters, image], cache=cache)
    options = EvaluateOptions(
        scoring=scoring,
        concurrency=concurrency,
        timeout=timeout,
        retries=retries,
        calibration=_text(calibration),
        limit=limit,
        against=against.to_score() if isinstance(against, Evaluation) else _text(against),
        max_drop=None if max_drop is None else number(str(max_drop), "--max-drop"),
        answers=_text(answers),
    )
    with shown(progress) as shown_progress, wiring.open_tools(run, shown_progress) as tools:
        result = evaluate_subject(subject, path_of(data), options, tools)
    return Evaluation(
        score=result["score"],
        n=result["n"],
        metric=result["metric"],
        interval=tuple(result["interval"]),
        per_item=tuple(result["per_item"]),
        comparison=result.get("comparison", {}),
        warnings=tuple(shown_progress.warnings),
    )


def _text(path: AnyPath) -> str:
    """Return a path as text; "" stands for none."""
    return str(path_of(path)) if path else ""
