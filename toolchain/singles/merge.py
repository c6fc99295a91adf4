"""`invoke merge`: folders in, a checkpoint folder out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from toolchain.errors import UsageError
from toolchain.merging.plan import KINDS, estimate, make_plan
from toolchain.ports import Tools
from toolchain.singles.arguments import new_folder
from toolchain.stages.merge import BUILDER, MEMORY_BYTES
from toolchain.values import Job, Json

_METHODS = ("sequential", "linear")


def merge_folders(
    base: Path,
    adapters: tuple[Path, ...],
    weights: tuple[float, ...],
    out: Path,
    options: Mapping[str, str],
    tools: Tools,
) -> Mapping[str, Json]:
    """Merge adapters into `out`, which appears when it is whole; a killed merge goes on.

    Raises UsageError for options that are not there, InputRefused for inputs that do not fit.
    """
    if options["method"] not in _METHODS:
        raise UsageError(
            f"--method {options['method']}: unknown", hint=f"one of {', '.join(_METHODS)}"
        )
    if options["quantized_base"] != "refuse":
        raise UsageError("--quantized-base: only `refuse` is there", hint="use a 16-bit base")
    out = new_folder(out, "the merged checkpoint")
    pairs = list(zip(adapters, weights, strict=True))
    plan = make_plan(base, pairs, dtype=options["dtype"], method=options["method"])
    cost = estimate(plan)
    tools.store.require_room(cost["write_bytes"], "the merged checkpoint")
    tools.progress.stage("merge", f"{len(adapters)} adapter(s) into {base}")
    tools.runner.prepare(BUILDER, tools.progress)
    beside = out.with_name(f".{out.name}.partial")
    beside.mkdir(parents=True, exist_ok=True)
    job = _job(base, pairs, beside, options, cost["peak_memory_bytes"])
    result = tools.runner.run(job, tools.progress)
    if out.exists():
        out.rmdir()  # it is empty
    beside.rename(out)
    tools.progress.finish("merge", float(result["seconds"]), cached=False)
    for finding in result.get("findings", ()):
        tools.progress.warn(str(finding))
    for line in summary(result):
        tools.progress.note(line)
    return {**result, "out": str(out)}


def summary(result: Mapping[str, Json]) -> list[str]:
    """Return the table that a merge ends with; a refusal ends it before anything is written."""
    rows = [(kind, result["tensors"][kind], result["tensor_bytes"][kind]) for kind in KINDS]
    lines = [f"  {'tensors':<10}{'count':>8}{'MiB':>12}"]
    lines += [f"  {kind:<10}{count:>8}{size / 2**20:>12,.1f}" for kind, count, size in rows]
    return [*lines, f"  {'refused':<10}{0:>8}{0:>12,.1f}"]


def _job(
    base: Path,
    pairs: list[tuple[Path, float]],
    out: Path,
    options: Mapping[str, str],
    peak: int,
) -> Job:
    names = [f"adapter{i}" for i in range(len(pairs))]
    return Job(
        stage="merge",
        builder=BUILDER,
        inputs={
            "base": base.resolve(),
            **{name: path.resolve() for name, (path, _) in zip(names, pairs, strict=True)},
        },
        parameters={
            "adapters": names,
            "weights": [weight for _, weight in pairs],
            "method": options["method"],
            "dtype": options["dtype"],
            "precision": options["precision"],
            "device": "auto",
            "own_out": True,
        },
        output=out,
        memory_bytes=max(MEMORY_BYTES, 2 * peak),
        use_gpu=True,
    )
