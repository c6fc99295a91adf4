"""Questions to a model: `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence

from weightsmith.api.arguments import AnyPath, Texts, path_of, paths_of, texts_of
from weightsmith.api.commands.arguments import options_of, request_of
from weightsmith.api.commands.evaluate import evaluate_subject
from weightsmith.api.commands.requests import EvaluateCommand
from weightsmith.api.results import Evaluation
from weightsmith.building import wiring
from weightsmith.building.progress import shown
from weightsmith.recipe.run_options import RunOptions
from weightsmith.recipe.schema import Scoring


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
    request = request_of(
        EvaluateCommand,
        data=path_of(data),
        scoring=options_of(
            Scoring,
            "evaluate",
            metric=metric,
            command=texts_of(command),
            min_score=min_score,
            max_tokens=max_tokens,
            training=str(path_of(training)) if training else "",
            strict=strict,
        ),
        image=image,
        url=url,
        model=path_of(model) if model else None,
        adapters=paths_of(adapters),
        served_name=served_name,
        limit=limit,
        concurrency=concurrency,
        timeout=timeout,
        retries=retries,
        calibration=path_of(calibration) if calibration else None,
        against=(
            against.to_score()
            if isinstance(against, Evaluation)
            else str(path_of(against))
            if against
            else ""
        ),
        max_drop=max_drop,
        answers=path_of(answers) if answers else None,
        run=RunOptions(
            runner=runner,
            allow_network_in_jobs=allow_network_in_jobs,
            memory=memory,
            insecure=insecure,
            cache=cache,
            cache_from=cache_from,
        ),
    )
    with shown(progress) as told, wiring.open_for(request, told) as tools:
        result = evaluate_subject(request, tools)
    return Evaluation(
        score=result["score"],
        n=result["n"],
        metric=result["metric"],
        interval=tuple(result["interval"]),
        per_item=tuple(result["per_item"]),
        comparison=result.get("comparison", {}),
        warnings=tuple(told.warnings),
    )
