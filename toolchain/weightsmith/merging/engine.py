"""The merge: writes base + adapters as a plain checkpoint, with a few blocks in memory."""

from __future__ import annotations

import json
import math
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from threadpoolctl import threadpool_limits

from weightsmith.core.errors import CheckFailed, EnvironmentFailure, UsageError
from weightsmith.core.files import sync_folder
from weightsmith.core.merge_options import Merge
from weightsmith.core.safe_parse import parse_file
from weightsmith.core.trees import remove
from weightsmith.core.values import Json, JsonValue, key_of
from weightsmith.merging.blocks import BLOCK, MergeCounts, Settings
from weightsmith.merging.combining.combination import Combination
from weightsmith.merging.combining.measure import measure
from weightsmith.merging.companions import companion_files, index_json, write_file
from weightsmith.merging.keep import keep_adapter
from weightsmith.merging.kernel import PIECE, check_arithmetic
from weightsmith.merging.libc import keep_freed_memory
from weightsmith.merging.outputs import OutputShard
from weightsmith.merging.plan import KINDS, MergePlan, make_plan
from weightsmith.merging.proof import prove
from weightsmith.merging.repair import Repairs
from weightsmith.merging.shards import HeaderOnlyShard, ShardMaker
from weightsmith.merging.stream import Writer, sha256_file
from weightsmith.models.safetensors import open_checkpoint

_RECIPE = 2
"""Increased if the same inputs would give other bytes."""
_MOST_WORKERS = 16
_GPU_BLOCK = 1 << 24
_SHOWN = 5

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRequest(Merge):
    """Inputs and options of a merge."""

    base: Path
    adapters: tuple[tuple[Path, float], ...]
    """Folder and weight, in order."""
    out: Path
    keep_adapter: bool = False
    """Write the combined adapter to `out` instead of merging it."""
    headers_only: bool = False
    """Compute and check the weights, but write only headers: for `virtual.opened`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = 0
    """Threads; 0: one per CPU."""
    own_out: bool = False
    """`out` was created by the caller: files of another merge in it are deleted."""


def merge(request: MergeRequest, progress: Progress | None = None) -> dict[str, JsonValue]:
    """Write base + adapters as a checkpoint to `out`, and return a summary.

    Exact merges are the correctly rounded result of the real number W + Σ weight·scaling·B·A, so
    their bytes do not depend on threads, blocks or machine. A killed merge resumes at the first
    unfinished shard. Each written file is read back and checked. `progress` is called with bytes
    done and total bytes. Raises InputRefused, UsageError, CheckFailed or EnvironmentFailure.
    """
    started = time.monotonic()
    plan = make_plan(request.base, request.adapters, request)
    make = _keep if request.keep_adapter else _merge
    made, notes, last = make(request, plan, progress or (lambda *_: None))
    names = [adapter.path.name for adapter in plan.adapters]
    with threadpool_limits(1, "blas"):
        conflicts = measure(plan.outputs.values())
    return made | {
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds": time.monotonic() - started,
        "findings": [*plan.findings, *notes, *conflicts.findings(names), *last],
        "conflicts": conflicts.report(names),
    }


_Made: TypeAlias = tuple[dict[str, JsonValue], list[str], list[str]]
"""What was made, and findings: the first, and the last."""


def _merge(request: MergeRequest, plan: MergePlan, progress: Progress) -> _Made:
    settings = _settings(request)
    inputs = (request.base, *(path for path, _ in request.adapters))
    journal = open_out(request.out, inputs, _key(request, plan), own=request.own_out)
    tally = MergeCounts()
    keep_freed_memory()
    with _one_thread_per_worker(settings):
        shards = _make_shards(plan, request, settings, journal, tally, progress)
        small, notes = _write_companions(plan, request.out)
        _check_index(plan, request.out)
    journal.path.unlink(missing_ok=True)
    files = [{"path": s["file"], "size": s["size"], "sha256": s["sha256"]} for s in shards] + small
    files.sort(key=lambda entry: str(entry["path"]))
    sizes = dict.fromkeys(KINDS, 0)
    for output in plan.outputs.values():
        sizes[output.kind] += output.size
    made: dict[str, JsonValue] = {
        "out": str(request.out),
        "tensors": {kind: plan.count(kind) for kind in KINDS},
        "tensor_bytes": sizes,
        "shards": shards,
        "files": files,
        "quantized_base": dict(plan.quantized_base),
        "repairs": {"float64": tally.repairs.float64, "exact": tally.repairs.exact},
        **({"largest": tally.largest} if request.headers_only else {}),
    }
    return made, _untrained_and_unchanged(plan, tally), notes


def _keep(request: MergeRequest, plan: MergePlan, _progress: Progress) -> _Made:
    if not request.adapters:
        raise UsageError("no adapter to write", hint="give --adapter")
    request.out.mkdir(parents=True, exist_ok=True)
    with threadpool_limits(1, "blas"):
        return *keep_adapter(plan, Combination.of(request), request.out), []


def _settings(request: MergeRequest) -> Settings:
    drivers = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
    has_gpu = False
    if request.device != "cpu" and any(Path(node).exists() for node in drivers):
        import torch  # only if there is a GPU's driver

        has_gpu = torch.cuda.is_available()
    if request.device == "cuda" and not has_gpu:
        raise EnvironmentFailure("no CUDA device found", hint="merge with device cpu")
    device = "cuda" if has_gpu else "cpu"
    workers = request.workers or len(os.sched_getaffinity(0))
    return Settings(
        device=device,
        workers=2 if device == "cuda" else min(max(1, workers), _MOST_WORKERS),
        block=_GPU_BLOCK if device == "cuda" else BLOCK,
        piece=_GPU_BLOCK if device == "cuda" else PIECE,
    )


def _key(request: MergeRequest, plan: MergePlan) -> str:
    # Adapters by content, the base's files by path, size and time.
    base = [
        (shard.path.name, shard.file_size, shard.path.stat().st_mtime_ns, str(shard.path.resolve()))
        for shard in plan.base.shards
    ]
    adapters = [
        (sha256_file(one.file), sha256_file(one.path / "adapter_config.json"), repr(one.weight))
        for one in plan.adapters
    ]
    return key_of([_RECIPE, base, adapters, asdict(Combination.of(request))])


@contextmanager
def _one_thread_per_worker(settings: Settings) -> Iterator[None]:
    """Run blocks in parallel instead of operations, whose idle threads would spin."""
    with threadpool_limits(limits=1):
        if settings.device == "cpu":
            check_arithmetic()
            yield
            return
        import torch

        from weightsmith.merging import torch_kernel

        threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
        torch.set_num_threads(1)
        torch.set_float32_matmul_precision("highest")
        try:
            torch_kernel.check_arithmetic(settings.device)
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)


def _make_shards(
    plan: MergePlan,
    request: MergeRequest,
    settings: Settings,
    journal: Journal,
    tally: MergeCounts,
    progress: Progress,
) -> list[dict[str, JsonValue]]:
    total, done = sum(shard.size for shard in plan.shards), 0
    finished, parts = journal.finished, journal.parts
    maker = ShardMaker(settings, tally)

    def advance(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    def finish(shard: OutputShard, writer: Writer | HeaderOnlyShard, repairs: Repairs) -> None:
        finished[shard.name] = writer.finish()
        if isinstance(writer, HeaderOnlyShard):
            tally.unchanged += tuple(writer.unchanged)
            tally.largest |= writer.largest
        else:
            sums = tuple(writer.checksums)
            try:
                tally.unchanged += prove(
                    shard, writer.path, sums, maker.sketches, maker.files, maker.pool
                )
            except CheckFailed:
                writer.path.unlink(missing_ok=True)
                raise
        parts[shard.name] = tally.about((output.name for output in shard.outputs), repairs)
        journal.record()

    # A file is flushed and checked while the next one is computed.
    with closing(maker), ThreadPoolExecutor(1, "finish") as finisher:
        waiting: Future[None] = finisher.submit(lambda: None)
        for shard in plan.shards:
            if shard.name in finished:
                waiting.result()
                tally.add(parts[shard.name])
                advance(shard.size)
                continue
            before = replace(tally.repairs)
            make = maker.compute if request.headers_only else maker.write
            writer = make(shard, journal.path.parent / shard.name, advance)
            after = tally.repairs
            repairs = Repairs(after.float64 - before.float64, after.exact - before.exact)
            try:
                waiting.result()
            except BaseException:
                writer.abandon()
                raise
            waiting = finisher.submit(finish, shard, writer, repairs)
            if request.headers_only:
                waiting.result()
        waiting.result()
    progress(total, total)
    shards = (finished[shard.name] for shard in plan.shards)
    return [{key: one[key] for key in ("file", "size", "sha256")} for one in shards]


def _write_companions(plan: MergePlan, out: Path) -> tuple[list[dict[str, JsonValue]], list[str]]:
    extra, notes = companion_files(plan)
    if plan.base.index_file:
        places = {output.name: shard.name for shard in plan.shards for output in shard.outputs}
        elements = sum(math.prod(output.shape) for output in plan.outputs.values())
        size = sum(shard.size for shard in plan.shards)
        extra[plan.base.index_file] = index_json(dict(sorted(places.items())), size, elements)
    written = [write_file(out, name, data) for name, data in sorted(extra.items())]
    sync_folder(out)
    return written, notes


def _check_index(plan: MergePlan, out: Path) -> None:
    found = open_checkpoint(out).tensors
    missing = sorted(plan.outputs.keys() ^ found.keys())
    if missing:
        raise CheckFailed(
            f"{out} was written wrongly, missing or extra tensors: {', '.join(missing[:_SHOWN])}",
            hint="memory or disk may be faulty: merge again, on another machine if it recurs",
        )


def _untrained_and_unchanged(plan: MergePlan, tally: MergeCounts) -> list[str]:
    """Return findings about factors that are all zero, and about changes lost in rounding."""
    findings = [
        f"{plan.adapters[number].path.name}: a factor (lora_B) is all zero, so untrained, for "
        f"{len(names)} tensors, such as {', '.join(names[:_SHOWN])}"
        for number, names in sorted(tally.silent.items())
    ]
    silent = {name for names in tally.silent.values() for name in names}
    if lost := [name for name in tally.unchanged if name not in silent]:
        findings.append(
            f"{len(lost)} of {plan.count('merged')} merged tensors equal the base, such as "
            f"{', '.join(lost[:_SHOWN])}: the change is zero or too small for the checkpoint's "
            "dtype"
        )
    return findings


_NAME = ".merge-journal.json"


class Journal:
    """The finished shards of one merge, identified by the key of its inputs and parameters."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self._key = path, key
        kept: Json = None
        with suppress(OSError, ValueError):
            kept = parse_file(path)
        self.matches = isinstance(kept, dict) and kept.get("key") == key
        """Whether the journal exists and has this key."""
        shards, parts = (kept.get(n, {}) if self.matches else {} for n in ("shards", "parts"))
        self.parts: dict[str, dict[str, JsonValue]] = dict(parts)
        """Each shard's counts (`MergeCounts.about`)."""
        self.finished: dict[str, dict[str, JsonValue]] = {}
        """The shards whose files are unchanged."""
        for name, entry in shards.items():
            file, own = path.with_name(name), entry.get("header", entry)  # if it has no data
            if (
                name in self.parts
                and file.is_file()
                and file.stat().st_size == own.get("size")
                and sha256_file(file) == own.get("sha256")
            ):
                self.finished[name] = entry

    def record(self) -> None:
        """Write the finished shards and their counts."""
        text = json.dumps(
            {"key": self._key, "shards": self.finished, "parts": self.parts}, sort_keys=True
        )
        temporary = self.path.with_name(f"{self.path.name}.partial")
        temporary.write_text(text)
        temporary.replace(self.path)


def open_out(out: Path, inputs: Sequence[Path], key: str, *, own: bool) -> Journal:
    """Create the output folder, or resume an earlier run with the same key in it.

    In an `own` folder, files of another merge are deleted. Raises UsageError if the folder has
    other files or is inside an input, and EnvironmentFailure if it cannot be created.
    """
    out = out.resolve()
    for source in inputs:
        if out == source.resolve() or out.is_relative_to(source.resolve()):
            raise UsageError(
                f"{out} is inside the input {source}", hint="choose another output folder"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        existing = [name for name in os.listdir(out) if not name.endswith(".partial")]  # noqa: PTH208
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot create {out}: {error.strerror}", hint="choose another output folder"
        ) from error
    journal = Journal(out / _NAME, key)
    if existing and not journal.matches:
        if own:
            # Killed after the journal was deleted but before the folder was renamed, or started
            # from other files: useless, and nobody else would delete it.
            for name in os.listdir(out):  # noqa: PTH208 - the folder itself is mounted
                remove(out / name)
            return open_out(out, inputs, key, own=own)
        raise UsageError(
            f"{out} is not empty and cannot be resumed: it does not belong to this merge",
            hint="empty it, or choose another output folder",
        )
    for left in out.glob("*.partial"):
        left.unlink()
    if not existing:
        journal.record()
    return journal
