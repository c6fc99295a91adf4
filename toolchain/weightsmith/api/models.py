"""Functions for models: `merge`, `validate`, `quantize`, `render`, `evaluate`, `prove`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from weightsmith.api.commands.arguments import (
    AnyPath,
    Texts,
    options_of,
    path_of,
    paths_of,
    request_of,
    source_of,
    sources_in,
    texts_of,
)
from weightsmith.api.commands.evaluate import evaluate_subject
from weightsmith.api.commands.merge import merge_folders, validate_folders
from weightsmith.api.commands.prove import prove_image
from weightsmith.api.commands.quantize import quantize_folder
from weightsmith.api.commands.render import render_folder
from weightsmith.api.commands.requests import (
    EvaluateCommand,
    MergeCommand,
    ProveCommand,
    QuantizeCommand,
    RenderCommand,
    ValidateCommand,
)
from weightsmith.api.results import Evaluation, Merged, Proof, Quantized, Rendered, Shard
from weightsmith.building import wiring
from weightsmith.building.progress import shown
from weightsmith.core.merge_options import Dtype, Merge, Method, Precision, QuantizedBase, Space
from weightsmith.recipe.schema import Quantize, Scoring, Serve
from weightsmith.recipe.user_config import RunOptions
from weightsmith.validating.result import Validation


def merge(
    base: AnyPath,
    adapters: AnyPath | Sequence[AnyPath],
    out: AnyPath,
    *,
    weights: Sequence[float] | None = None,
    method: Method = "sequential",
    density: float | None = None,
    rank: int | None = None,
    seed: int = 0,
    space: Space = "delta",
    dtype: Dtype = "auto",
    precision: Precision = "exact",
    quantized_base: QuantizedBase = "refuse",
    runner: str = "auto",
    allow_network_in_jobs: bool = False,
    memory: str = "",
    insecure: bool = False,
    sign_key: str = "",
    keyless: bool = False,
    trust_config: AnyPath = "",
    cache: str = "",
    cache_from: str = "",
    progress: bool = True,
) -> Merged:
    """Merge adapters into a base, and write a Hugging Face checkpoint with its shapes to `out`.

    Base and adapters are folders, `hf://owner/name` or other sources of a recipe; without adapters,
    the base is what is written. `weights` has a factor per adapter, 1 by default; the other options
    are the recipe's `merge` keys. A key, or with `keyless` this job's identity, signs the files for
    `model_signing verify`. A killed merge is resumed by the next call.

    Raises UsageError for invalid options or an `out` that exists, InputRefused for a base or
    adapter that cannot be merged, CheckFailed if the written files read back differently,
    EnvironmentFailure if the machine lacks something.

    >>> merged = weightsmith.merge(
    ...     "examples/tiny/base", ["examples/tiny/adapters/a"], "merged", progress=False
    ... )
    >>> [shard.path.name for shard in merged.shards]
    ['model.safetensors']
    """
    request = request_of(
        MergeCommand,
        base=source_of(base),
        adapters=sources_in(adapters),
        out=path_of(out),
        weights=None if weights is None else tuple(map(float, weights)),
        options=options_of(
            Merge,
            "merge",
            method=method,
            density=density,
            rank=rank,
            seed=seed,
            space=space,
            dtype=dtype,
            precision=precision,
            quantized_base=quantized_base,
        ),
        run=RunOptions(
            runner,
            allow_network_in_jobs,
            memory,
            insecure,
            sign_key,
            cache=cache,
            cache_from=cache_from,
            keyless=keyless,
            trust_config=str(trust_config),
        ),
    )
    with shown(progress) as told, wiring.open_for(request, told) as tools:
        result = merge_folders(request, tools)
    return Merged(
        path=path_of(out),
        tensors=result["tensors"],
        shards=tuple(
            Shard(path=path_of(out) / row["file"], size=row["size"], sha256=row["sha256"])
            for row in result["shards"]
        ),
        peak_rss_bytes=result["peak_rss_bytes"],
        seconds=result["seconds"],
        findings=tuple(result["findings"]),
    )


def validate(
    base: AnyPath,
    adapters: AnyPath | Sequence[AnyPath],
    merged: AnyPath,
    *,
    weights: Sequence[float] | None = None,
    method: Method = "sequential",
    density: float | None = None,
    rank: int | None = None,
    space: Space = "delta",
    quantized_base: QuantizedBase = "refuse",
    probes: AnyPath | None = None,
    runner: str = "auto",
    allow_network_in_jobs: bool = False,
    memory: str = "",
    insecure: bool = False,
    cache: str = "",
    cache_from: str = "",
    progress: bool = True,
) -> Validation:
    """Compare a merged checkpoint, from any tool, with its sources by files, elements and logits.

    The options say how it was merged. `probes` are JSON Lines of `{prompt | messages}`.

    Raises CheckFailed if it differs, with the result as `details`, InputRefused for folders that
    are not a model or adapter, UsageError for invalid options or probes.

    >>> validation = weightsmith.validate(
    ...     "examples/tiny/base", ["examples/tiny/adapters/a"], "merged", progress=False
    ... )
    >>> validation.top1_agreement
    1.0
    """
    request = request_of(
        ValidateCommand,
        base=source_of(base),
        adapters=sources_in(adapters),
        merged=path_of(merged),
        weights=None if weights is None else tuple(map(float, weights)),
        options=options_of(
            Merge,
            "validate",
            method=method,
            density=density,
            rank=rank,
            space=space,
            quantized_base=quantized_base,
        ),
        probes=path_of(probes) if probes else None,
        run=RunOptions(
            runner, allow_network_in_jobs, memory, insecure, cache=cache, cache_from=cache_from
        ),
    )
    with shown(progress) as told, wiring.open_for(request, told) as tools:
        return validate_folders(request, tools)


def quantize(
    model: AnyPath,
    out: AnyPath,
    *,
    format: str = "q4_k_m",  # noqa: A002 - the flag's name
    calibration: AnyPath | None = None,
    imatrix: AnyPath = "",
    group_size: int | str = "auto",
    zero_point: bool = True,
    keep: Sequence[str] = (),
    tensor_types: Mapping[str, str] | None = None,
    shared_layers: bool = False,
    split_max_size: str = "",
    allow_low_bits: bool = False,
    allow_text_only: bool = False,
    bits: float | None = None,
    size: str = "",
    mix: AnyPath = "",
    gate: bool = True,
    runner: str = "auto",
    allow_network_in_jobs: bool = False,
    memory: str = "",
    insecure: bool = False,
    sign_key: str = "",
    keyless: bool = False,
    trust_config: AnyPath = "",
    cache: str = "",
    cache_from: str = "",
    progress: bool = True,
) -> Quantized:
    """Quantize a checkpoint, read the result back, and measure the loss on held-out text.

    `out` is a new file for GGUF formats, a new folder for the others. Options are the recipe's
    `quantize` keys; `calibration` is JSON Lines, general texts by default; without `gate`, what
    exceeds the format's limits is reported and kept. Signed is as in `merge`.

    Raises UsageError for an unknown format or an option that it does not use, InputRefused for an
    unsupported model or text, CheckFailed for a loss over the limits; then `out` does not exist.

    >>> quantized = weightsmith.quantize(
    ...     "merged", "capitals.gguf", format="q4_k_m",
    ...     calibration="examples/tiny/calibration.jsonl", progress=False,
    ... )
    >>> quantized.path.name, quantized.quality["top1"] > 0.86
    ('capitals.gguf', True)
    """
    request = request_of(
        QuantizeCommand,
        model=path_of(model),
        format=format,
        out=path_of(out),
        calibration=path_of(calibration) if calibration else None,
        settings=options_of(
            Quantize,
            "quantize",
            imatrix=str(imatrix),
            group_size=group_size,
            zero_point=zero_point,
            keep=keep,
            tensor_types=tensor_types or {},
            shared_layers=shared_layers,
            split_max_size=split_max_size,
            allow_low_bits=allow_low_bits,
            allow_text_only=allow_text_only,
            bits=bits,
            size=size,
            mix=str(mix),
        ),
        gate=gate,
        run=RunOptions(
            runner,
            allow_network_in_jobs,
            memory,
            insecure,
            sign_key,
            cache=cache,
            cache_from=cache_from,
            keyless=keyless,
            trust_config=str(trust_config),
        ),
    )
    with shown(progress) as told, wiring.open_for(request, told) as tools:
        result = quantize_folder(request, tools)
    return Quantized(
        path=Path(result["out"]),
        format=result["format"],
        bits_per_weight=result["bits_per_weight"],
        files=tuple(map(Path, result["files"])),
        quality=result["quality"],
        warnings=tuple(told.warnings),
    )


def render(
    model: AnyPath,
    target: str,
    out: AnyPath,
    *,
    name: str = "",
    gpu: str = "",
    gpu_memory: str = "",
    gpu_count: int = 1,
    max_model_len: int | str = "auto",
    max_num_seqs: int | str = "auto",
    set: Texts = (),  # noqa: A002 - the flag's name
) -> Rendered:
    """Plan the memory of a model's server, and write its settings and manifests to `out`.

    `model` is a checkpoint's folder, which may lack the weights, or a .gguf file. `set` has
    `serve.KEY=VALUE` texts for the other keys of the recipe's `serve`. Files in `out` are replaced.

    Raises UsageError for an unknown target or option or a model that does not fit the memory,
    InputRefused for a model that the target cannot serve.

    >>> rendered = weightsmith.render("merged", "vllm", "config", gpu="nvidia-l4")
    >>> rendered.plan["fits"], "config/vllm.yaml" in map(str, rendered.files)
    (True, True)
    """
    request = request_of(
        RenderCommand,
        model=path_of(model),
        target=target,
        out=path_of(out),
        name=name,
        serve=options_of(
            Serve,
            "render",
            gpu=gpu,
            gpu_memory=gpu_memory,
            gpu_count=gpu_count,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
        ),
        settings=texts_of(set),
    )
    wiring.keep_places_clean(request)
    files, plan = render_folder(request)
    return Rendered(files=tuple(map(Path, files)), plan=plan.to_json())


def evaluate(
    data: AnyPath,
    *,
    image: str = "",
    url: str = "",
    model: AnyPath = "",
    adapters: AnyPath | Sequence[AnyPath] = (),
    served_name: str = "",
    metric: str = "contains",
    tolerance: str = "0",
    corpus: str = "",
    recall_at: int = 10,
    similarity: str = "",
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    command: Texts = (),
    command_seconds: float = 3600.0,
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
            tolerance=tolerance,
            corpus=corpus,
            recall_at=recall_at,
            similarity=similarity,
            query_prompt=query_prompt,
            document_prompt=document_prompt,
            command=texts_of(command),
            command_seconds=command_seconds,
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
            runner, allow_network_in_jobs, memory, insecure, cache=cache, cache_from=cache_from
        ),
    )
    with shown(progress) as told, wiring.open_for(request, told) as tools:
        return evaluate_subject(request, tools)


def prove(
    image: str = "",
    *,
    url: str = "",
    replay: AnyPath = "",
    statement: AnyPath = "",
    key: AnyPath = "",
    attach: bool = True,
    device: str = "",
    node_type: str = "",
    timeout: float = 120.0,
    retries: int = 4,
    runner: str = "auto",
    insecure: bool = False,
    cache: str = "",
    cache_from: str = "",
    keyless: bool = False,
    trust_config: AnyPath = "",
    progress: bool = True,
) -> Proof:
    """Ask an image's replay set where it runs: does it answer here as it was tested.

    `image` (a reference or `oci:FOLDER`) is started, unless `url` names a server that runs it;
    `replay` is the file of secret questions. With `key` (private, PEM) or `keyless`, a proof is
    signed and attached to the image; `statement` is a file for it.

    Raises CheckFailed if answers are different (`details` has which), InputRefused for an image
    without a replay set, EnvironmentFailure if the server does not answer, so nothing is shown.

    >>> weightsmith.prove("oci:image", progress=False).verdict
    'proven'
    """
    request = request_of(
        ProveCommand,
        image=image,
        url=url,
        replay=path_of(replay) if replay else None,
        statement=path_of(statement) if statement else None,
        key=str(key),
        attach=attach,
        device=device,
        node_type=node_type,
        timeout=timeout,
        retries=retries,
        run=RunOptions(
            runner,
            insecure=insecure,
            cache=cache,
            cache_from=cache_from,
            keyless=keyless,
            trust_config=str(trust_config),
        ),
    )
    request = replace(request, run=replace(request.run, sign_key=request.key))
    with shown(progress) as told, wiring.open_for(request, told) as tools:
        found, _ = prove_image(request, tools)
    shows = {one.name: found[one.name] for one in fields(Proof) if one.name in found}
    return Proof(**{**shows, "explained": tuple(found["explained"])}, warnings=tuple(told.warnings))
