"""`invoke merge`: folders in, a checkpoint folder out, or the combined adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from weightsmith.commands.arguments import new_folder
from weightsmith.errors import UsageError
from weightsmith.files import alone
from weightsmith.merging.plan import KINDS, estimate, make_plan
from weightsmith.recipe import Merge
from weightsmith.recipe_file import check_recipe
from weightsmith.stages.merge import BUILDER, combination_of, memory_limit, parameters
from weightsmith.time_limits import job_seconds
from weightsmith.tools import Tools
from weightsmith.values import Job, Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """What goes in: a base, and adapters in order with their weights."""

    base: Path
    adapters: tuple[Path, ...]
    weights: tuple[float, ...]

    @property
    def pairs(self) -> list[tuple[Path, float]]:
        """Adapters with their weights."""
        return list(zip(self.adapters, self.weights, strict=True))


def merge_options(flags: Mapping[str, Json], where: str = "the command line") -> Merge:
    """Return the options that flags give, checked as a recipe's; raises UsageError."""
    given = {name: value for name, value in flags.items() if value not in ("", None)}
    skeleton = {"name": "x", "base": {"source": "x"}, "merge": given}
    return check_recipe(skeleton, where).merge


def merge_folders(folders: Folders, out: Path, options: Merge, tools: Tools) -> Mapping[str, Json]:
    """Merge adapters into `out`, which appears when it is whole; a killed merge goes on.

    Raises UsageError for options that do not fit, InputRefused for inputs that do not.
    """
    return _run(folders, new_folder(out, "the merged checkpoint"), options, tools, keep=False)


def keep_folder(folders: Folders, out: Path, options: Merge, tools: Tools) -> Mapping[str, Json]:
    """Write the combined adapter to `out`, which appears when it is whole.

    Raises UsageError for methods whose result is no adapter, InputRefused for inputs of more than
    plain factors.
    """
    return _run(folders, new_folder(out, "the combined adapter"), options, tools, keep=True)


def _run(
    folders: Folders, out: Path, options: Merge, tools: Tools, *, keep: bool
) -> Mapping[str, Json]:
    tools.runner.check(BUILDER)
    plan = make_plan(
        folders.base,
        folders.pairs,
        dtype=options.dtype,
        combination=combination_of(options),
        quantized_base=options.quantized_base,
    )
    cost = estimate(plan, exact=options.precision == "exact")
    tools.store.require_room(0 if keep else cost["write_bytes"], "the merged checkpoint")
    what = "of" if keep else "into"
    tools.progress.stage("merge", f"{len(folders.adapters)} adapter(s) {what} {folders.base}")
    tools.runner.prepare(BUILDER, tools.progress)
    beside = out.with_name(f".{out.name}.partial")
    beside.mkdir(parents=True, exist_ok=True)
    with _alone(beside, out):
        job = _job(folders, beside, options, cost, keep=keep)
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


@contextmanager
def _alone(folder: Path, out: Path) -> Iterator[None]:
    """Keep other merges out of a folder meanwhile; UsageError where one is in it already."""
    with ExitStack() as stack:
        try:
            stack.enter_context(alone(folder, wait=False))
        except (BlockingIOError, FileNotFoundError):
            raise UsageError(
                f"another merge is writing {out}", hint="wait for it, or name another folder"
            ) from None
        yield


def summary(result: Mapping[str, Json]) -> list[str]:
    """Return the table that a merge ends with; a refusal ends it before anything is written."""
    rows = [(kind, result["tensors"][kind], result["tensor_bytes"][kind]) for kind in KINDS]
    lines = [f"  {'tensors':<10}{'count':>8}{'MiB':>12}"]
    lines += [f"  {kind:<10}{count:>8}{size / 2**20:>12,.1f}" for kind, count, size in rows]
    return [*lines, f"  {'refused':<10}{0:>8}{0:>12,.1f}"]


def _job(
    folders: Folders, out: Path, options: Merge, cost: Mapping[str, int], *, keep: bool
) -> Job:
    names = [f"adapter{i}" for i in range(len(folders.adapters))]
    return Job(
        stage="merge",
        builder=BUILDER,
        inputs={
            "base": folders.base.resolve(),
            **{n: path.resolve() for n, path in zip(names, folders.adapters, strict=True)},
        },
        parameters={
            "adapters": names,
            "weights": list(folders.weights),
            **parameters(options),
            "device": "auto",
            "own_out": True,
            "keep_adapter": keep,
        },
        output=out,
        memory_bytes=memory_limit(cost),
        seconds=job_seconds(cost["read_bytes"]),
        use_gpu=True,
    )
