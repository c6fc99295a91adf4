"""`invoke evaluate`: a started image, a server, or a checkpoint, scored on a data file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from toolchain.checkpoints.folder import check_adapter_folder, check_model_folder
from toolchain.errors import CheckFailed, UsageError
from toolchain.evaluating.client import ask_all, wait_until_healthy
from toolchain.evaluating.items import Item, read_items
from toolchain.evaluating.metrics import check_metric, score_answers, wilson
from toolchain.oci.layout import read_layout
from toolchain.planning import all_targets
from toolchain.ports import Endpoint, StartSpec, Tools
from toolchain.singles.serve import open_model
from toolchain.stages.quantize import model_config
from toolchain.values import Job, Json

_START_SECONDS = 900.0
_BUILDER = "merge"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is asked: exactly one of image, url and model."""

    image: str = ""
    url: str = ""
    model: str = ""
    adapters: tuple[str, ...] = ()
    served_name: str = ""
    """The model's name at the server; the first that it lists by default."""


def evaluate_subject(
    subject: Subject, data: Path, metric: str, max_tokens: int, tools: Tools
) -> Mapping[str, Json]:
    """Return `{score, n, interval, per_item}` of greedy answers.

    Raises UsageError for the data or the metric, CheckFailed for a server that fails.
    """
    given = [name for name in ("image", "url", "model") if getattr(subject, name)]
    if len(given) != 1:
        raise UsageError("give exactly one of --image, --url and --model")
    if subject.adapters and not subject.model:
        raise UsageError("--adapter needs --model", hint="an image holds its merged weights")
    items = read_items(data)
    check_metric(metric, items)
    tools.progress.stage("evaluate", f"{len(items)} questions")
    answers = _answers(subject, items, max_tokens, tools)
    score = score_answers(answers, items, metric)
    right = sum(bool(row["ok"]) for row in score.per_item)
    return {
        "score": score.score,
        "n": score.n,
        "metric": metric,
        "interval": wilson(right, score.n),
        "per_item": list(score.per_item),
    }


def _answers(
    subject: Subject, items: tuple[Item, ...], max_tokens: int, tools: Tools
) -> tuple[str, ...]:
    if subject.model:
        return _ask_checkpoint(subject, items, max_tokens, tools)
    with _endpoint(subject, tools) as endpoint:
        name = subject.served_name or _first_name(endpoint)
        return ask_all(endpoint, name, items, max_tokens, tools.progress)


@contextmanager
def _endpoint(subject: Subject, tools: Tools) -> Iterator[Endpoint]:
    if subject.url:
        url = subject.url.rstrip("/").removesuffix("/v1")
        yield Endpoint(url=url, logs=lambda _: "", alive=lambda: True)
        return
    config = _image_config(subject.image, tools)
    target = all_targets().get((config.get("Labels") or {}).get("dev.weightsmith.target", ""))
    ports = sorted(int(port.partition("/")[0]) for port in config.get("ExposedPorts") or ())
    spec = StartSpec(
        port=ports[0] if ports else 8000,
        env={},
        port_variable=target.engine.port_variable if target else "",
        host_variable=target.engine.host_variable if target else "",
    )
    with tools.launcher.serve(subject.image, spec) as endpoint:
        path = target.engine.health_path if target else "/health"
        wait_until_healthy(endpoint, path, _START_SECONDS, poll=0.05)
        yield endpoint


def _image_config(image: str, tools: Tools) -> Mapping[str, Json]:
    if image.startswith("oci:"):
        return read_layout(Path(image.removeprefix("oci:"))).config
    found = tools.engine.inspect(image)
    if not found:
        raise UsageError(
            f"the container engine holds no image {image}",
            hint="pull or load it first, or give a layout as oci:DIR",
        )
    config: Mapping[str, Json] = found.get("Config") or {}
    return config


def _first_name(endpoint: Endpoint) -> str:
    """Return the first model that the server lists."""
    try:
        rows = httpx.get(f"{endpoint.url}/v1/models", timeout=30, trust_env=False).json()["data"]
        return str(rows[0]["id"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckFailed(
            f"{endpoint.url}/v1/models lists no model: {type(error).__name__}",
            hint="is it an OpenAI-compatible server? else name the model with --served-name",
        ) from None


def _ask_checkpoint(
    subject: Subject, items: tuple[Item, ...], max_tokens: int, tools: Tools
) -> tuple[str, ...]:
    model = Path(subject.model)
    check_model_folder(model)
    model_config(model)
    trees = {}
    for number, adapter in enumerate(subject.adapters):
        check_adapter_folder(Path(adapter))
        trees[f"adapter{number}"] = Path(adapter).resolve()
    tools.runner.prepare(_BUILDER, tools.progress)
    size = open_model(model).weight_bytes
    with tools.scratch() as folder:
        result = tools.runner.run(
            Job(
                stage="reference",
                builder=_BUILDER,
                inputs={"model": model.resolve(), **trees},
                parameters={
                    "weights": [1.0] * len(trees),
                    "items": [[dict(m) for m in item.messages] for item in items],
                    "max_tokens": max_tokens,
                },
                output=folder,
                memory_bytes=(3 << 30) + 5 * size,
                use_gpu=True,
            ),
            tools.progress,
        )
    return tuple(str(answer) for answer in result["answers"])
