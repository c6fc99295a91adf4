"""Single stages: `merge`, `validate`, `quantize`, `render`, `bake`, `evaluate`, `bench`, `push`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from toolchain.cli.command import command
from toolchain.values import Json


@command(many=("adapter",))
def merge(
    _context: object,
    *,
    base: str = "",
    adapter: Sequence[str] = (),
    out: str = "",
    weights: str = "",
    method: str = "sequential",
    density: str = "",
    rank: str = "",
    seed: int = 0,
    space: str = "delta",
    keep_adapter: str = "",
    dtype: str = "auto",
    precision: str = "exact",
    quantized_base: str = "refuse",
    runner: str = "auto",
    json: bool = False,
) -> tuple[Mapping[str, Json], str]:
    """Merge adapters into a base: a plain Hugging Face checkpoint in --out."""
    del json
    from toolchain.cli.progress import progress_for
    from toolchain.singles.arguments import parse_weights, required
    from toolchain.singles.merge import Folders, keep_folder, merge_folders, merge_options
    from toolchain.wiring import make_tools

    required(base=base, adapter=adapter, **({} if keep_adapter else {"out": out}))
    options = merge_options(
        {
            "method": method,
            "density": density,
            "rank": rank,
            "seed": seed,
            "space": space,
            "dtype": dtype,
            "precision": precision,
            "quantized_base": quantized_base,
        }
    )
    folders = Folders(
        base=Path(base),
        adapters=tuple(Path(folder) for folder in adapter),
        weights=parse_weights(weights, len(adapter)),
    )
    tools, _ = make_tools(runner, progress_for())
    kept = keep_folder(folders, Path(keep_adapter), options, tools) if keep_adapter else {}
    result = merge_folders(folders, Path(out), options, tools) if out else kept
    if kept and out:
        result = {**result, "adapter": kept}
    counts = ", ".join(f"{count} {what}" for what, count in result["tensors"].items())
    return result, f"{result['out']}: {counts} tensors, {result['seconds']:.1f} s"


@command(many=("adapter",))
def validate(
    _context: object,
    *,
    base: str = "",
    adapter: Sequence[str] = (),
    merged: str = "",
    weights: str = "",
    method: str = "sequential",
    density: str = "",
    rank: int = 0,
    space: str = "delta",
    quantized_base: str = "refuse",
    probes: str = "",
    runner: str = "auto",
    json: bool = False,
) -> tuple[Mapping[str, Json], str]:
    """Hold a merged checkpoint against base and adapters: files, every element, logits."""
    del json
    from toolchain.cli.progress import progress_for
    from toolchain.singles.arguments import number, parse_weights, required
    from toolchain.singles.validate import validate_folders
    from toolchain.wiring import make_tools

    required(base=base, adapter=adapter, merged=merged)
    factors = parse_weights(weights, len(adapter))
    tools, _ = make_tools(runner, progress_for())
    result = validate_folders(
        Path(base),
        tuple((Path(folder), w) for folder, w in zip(adapter, factors, strict=True)),
        Path(merged),
        Path(probes) if probes else None,
        {
            "method": method,
            "density": number(density, "--density") if density else None,
            "rank": rank or None,
            "space": space,
            "quantized_base": quantized_base,
        },
        tools,
    )
    return result, _verdict(merged, result)


def _verdict(merged: str, result: Mapping[str, Json]) -> str:
    lines = [f"{merged} is what base and adapters are"]
    if result.get("elements"):
        lines.append(
            f"  {result['elements']['elements']} elements of {result['elements']['tensors']} "
            "tensors are right"
        )
        lines.append(
            f"  logits of {result['positions']} positions: largest difference "
            f"{result['max_abs_logit_diff']:.3g}, mean divergence {result['kl_mean']:.3g}, "
            f"same first choice {result['top1_agreement']:.1%}"
        )
    if told := result.get("greedy"):
        same, tokens = (sum(row[key] for row in told) for key in ("same", "tokens"))
        lines.append(f"  {same} of {tokens} tokens of greedy text are those of base and adapters")
    lines += [f"  {found['severity']}: {found['message']}" for found in result["findings"]]
    return "\n".join(lines)


@command(many=("tensor_type", "keep_module"))
def quantize(
    _context: object,
    *,
    model: str = "",
    format: str = "q4_k_m",  # noqa: A002 - the flag's name
    out: str = "",
    calibration: str = "",
    imatrix: str = "",
    group_size: int = 0,
    zero_point: bool = True,
    keep_module: Sequence[str] = (),
    tensor_type: Sequence[str] = (),
    split_max_size: str = "",
    allow_low_bits: bool = False,
    no_gate: bool = False,
    runner: str = "auto",
    json: bool = False,
) -> tuple[Mapping[str, Json], str]:
    """Quantize a checkpoint to --format, read the result back and measure what was lost."""
    del json
    from toolchain.cli.progress import progress_for
    from toolchain.singles.arguments import quantize_wishes, required
    from toolchain.singles.quantize import QuantizeWish, quantize_folder
    from toolchain.wiring import make_tools

    required(model=model, format=format, out=out)
    wishes = quantize_wishes(
        {
            "imatrix": imatrix,
            "allow_low_bits": allow_low_bits,
            "split_max_size": split_max_size,
            **({"group_size": group_size} if group_size else {}),
            **({} if zero_point else {"zero_point": False}),
            "keep": tuple(keep_module),
            "tensor_types": dict(pair.partition("=")[::2] for pair in tensor_type),
        }
    )
    tools, _ = make_tools(runner, progress_for())
    asked = QuantizeWish(
        model=Path(model),
        format_name=format,
        out=Path(out),
        wishes=wishes,
        calibration=Path(calibration) if calibration else None,
        gate=not no_gate,
    )
    result = quantize_folder(asked, tools)
    said = ", ".join(
        f"{key} {result['quality'][key]:.4g}"
        for key in ("kl_mean", "top1", "perplexity_ratio")
        if key in result["quality"]
    )
    return result, (
        f"{result['out']}: {result['format']}, {result['bits_per_weight']:.2f} bits"
        + (f"; {said}" if said else "")
    )


@command(many=("set",))
def render(
    _context: object,
    *,
    model: str = "",
    target: str = "",
    out: str = "",
    name: str = "",
    gpu: str = "",
    gpu_memory: str = "",
    gpu_count: int = 1,
    max_model_len: str = "auto",
    max_num_seqs: str = "auto",
    set: Sequence[str] = (),  # noqa: A002 - the flag's name
    json: bool = False,
) -> tuple[Mapping[str, Json], str]:
    """Plan the memory and render serving configs and manifests of a target into --out."""
    del json
    from toolchain.serving.picture import picture
    from toolchain.singles.arguments import required, serve_wishes
    from toolchain.singles.serve import render_model

    required(model=model, target=target, out=out)
    wishes = serve_wishes(
        {
            "gpu": gpu,
            "gpu_memory": gpu_memory,
            "gpu_count": gpu_count,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
        },
        set,
    )
    result = render_model(Path(model), target, name, wishes, Path(out))
    lines = [*map(str, result["files"]), "", picture(target, result["plan"])]
    return result, "\n".join(lines)


@command()
def bake(
    _context: object,
    *,
    model: str = "",
    target: str = "",
    config: str = "",
    name: str = "",
    base_image: str = "",
    order: str = "engine-first",
    kind: str = "image",
    platform: str = "",
    max_layer_size: str = "",
    push: str = "",
    load: str = "",
    layout: str = "",
    force: bool = False,
    insecure: bool = False,
    sign_key: str = "",
    runner: str = "auto",
    json: bool = False,
) -> tuple[Mapping[str, Json], str]:
    """Assemble the image of a model, and push it, load it or write it as an OCI layout."""
    del json
    from toolchain.cli.progress import progress_for
    from toolchain.serving.memory import parse_size
    from toolchain.singles.arguments import required
    from toolchain.singles.bake import BakeRequest, bake_model
    from toolchain.wiring import make_registry, make_tools

    required(model=model, target=target)
    tools, _ = make_tools(runner, progress_for(), sign_key=sign_key)
    request = BakeRequest(
        model=Path(model),
        target=target,
        config=Path(config) if config else None,
        name=name,
        base_image=base_image,
        order=order,
        kind=kind,
        platform=platform,
        max_layer_size=parse_size(max_layer_size) if max_layer_size else 0,
        push=push,
        load=load,
        layout=Path(layout).absolute() if layout else None,
        force=force,
    )
    with make_registry(insecure=insecure) as registry:
        result = bake_model(request, registry, tools)
    return result, f"{result['reference']}@{result['digest']}"


@command(many=("adapter",))
def evaluate(
    _context: object,
    *,
    data: str = "",
    metric: str = "contains",
    image: str = "",
    url: str = "",
    model: str = "",
    adapter: Sequence[str] = (),
    served_name: str = "",
    command: str = "",
    tasks: str = "",
    tokenizer: str = "",
    include: str = "",
    limit: int = 0,
    max_tokens: int = 64,
    concurrency: int = 1,
    timeout: float = 120.0,
    retries: int = 2,
    training: str = "",
    calibration: str = "",
    strict: bool = False,
    against: str = "",
    max_drop: str = "",
    min_score: float = 0.0,
    runner: str = "auto",
    json: bool = False,
) -> tuple[Mapping[str, Json], str]:
    """Score a started image, a server, or a checkpoint with or without adapter on --data."""
    del json
    from toolchain.cli.progress import progress_for
    from toolchain.singles.arguments import number, required
    from toolchain.singles.evaluate import Subject, Wishes, check_subject, evaluate_subject
    from toolchain.singles.lm_eval import HarnessRequest, evaluate_tasks
    from toolchain.singles.server import Place
    from toolchain.wiring import make_tools

    if tasks:
        request = HarnessRequest(
            tasks=tasks,
            place=Place(image=image, url=url),
            served_name=served_name,
            tokenizer=tokenizer,
            include=include,
            limit=limit,
            concurrency=concurrency,
        )
        harness_tools, _ = make_tools(runner, progress_for())
        found = evaluate_tasks(request, harness_tools)
        return found, "\n".join(
            f"{name}: {task['score']} ({task['measure']}, n={task['n']})"
            for name, task in found["tasks"].items()
        )
    required(data=data)
    subject = Subject(
        image=image, url=url, model=model, adapters=tuple(adapter), served_name=served_name
    )
    check_subject(subject)
    tools, _ = make_tools(runner, progress_for())
    wishes = Wishes(
        metric=metric,
        command=command,
        max_tokens=max_tokens,
        concurrency=concurrency,
        timeout=timeout,
        retries=retries,
        training=training,
        calibration=calibration,
        strict=strict,
        against=against,
        max_drop=number(max_drop, "--max-drop") if max_drop else None,
        min_score=min_score,
    )
    result = evaluate_subject(subject, Path(data), wishes, tools)
    low, high = result["interval"]
    text = f"{result['score']:.4f} ({metric}, n={result['n']}, 95 %: {low:.3f} to {high:.3f})"
    if "comparison" in result:
        text += f"\n{result['comparison']['reason']}"
    return result, text


@command()
def bench(
    _context: object,
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
    runner: str = "auto",
    json: bool = False,
) -> tuple[Mapping[str, Json], str]:
    """Load a started image or a server for a short time: throughput and latencies."""
    del json
    from toolchain.cli.progress import progress_for
    from toolchain.singles.arguments import counts
    from toolchain.singles.bench import BenchRequest, bench_text
    from toolchain.singles.bench import bench as run
    from toolchain.singles.server import Place
    from toolchain.wiring import make_tools

    request = BenchRequest(
        place=Place(image=image, url=url),
        served_name=served_name,
        concurrency=counts(concurrency, "--concurrency"),
        requests=counts(str(requests), "--requests")[0],
        max_tokens=counts(str(max_tokens), "--max-tokens")[0],
        data=data,
        timeout=timeout,
        out=out,
    )
    tools, _ = make_tools(runner, progress_for())
    result = run(request, tools)
    return result, bench_text(result)


@command(positional=("source",))
def push(
    _context: object,
    source: str,
    *,
    to: str = "",
    force: bool = False,
    insecure: bool = False,
    sign_key: str = "",
    json: bool = False,
) -> tuple[Mapping[str, Json], str]:
    """Copy an image, from a registry or an OCI layout, to a registry; the digest stays."""
    del json
    from toolchain.cli.progress import progress_for
    from toolchain.singles.arguments import required
    from toolchain.singles.images import copy_image
    from toolchain.wiring import make_registry, make_signer

    required(to=to)
    sign = make_signer(sign_key)
    with make_registry(insecure=insecure) as registry:
        result = copy_image(source, to, registry, progress_for(), force=force, sign=sign)
    return result, f"{result['reference']}@{result['digest']}"


@command(positional=("source",))
def rebase(
    _context: object,
    source: str,
    *,
    onto: str = "",
    to: str = "",
    smoke: bool = True,
    force: bool = False,
    insecure: bool = False,
    sign_key: str = "",
    json: bool = False,
) -> tuple[Mapping[str, Json], str]:
    """Put an image on another engine base and push it; no weight byte is moved."""
    del json
    from toolchain.cli.progress import progress_for
    from toolchain.singles.arguments import required
    from toolchain.singles.rebase import RebaseRequest, rebase_image
    from toolchain.wiring import make_registry, make_tools

    required(onto=onto, to=to)
    tools, _ = make_tools("auto", progress_for(), sign_key=sign_key)
    request = RebaseRequest(source=source, onto=onto, to=to, smoke=smoke, force=force)
    with make_registry(insecure=insecure) as registry:
        result = rebase_image(request, registry, tools)
    return result, f"{result['reference']}@{result['digest']}"


COMMANDS = (merge, validate, quantize, render, bake, evaluate, bench, push, rebase)
