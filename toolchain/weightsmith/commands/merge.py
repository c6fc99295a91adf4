"""`invoke merge`: merge adapters into a checkpoint folder, or into one adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weightsmith.commands.folders import open_sources
from weightsmith.destinations import in_folder
from weightsmith.merging.plan import KINDS
from weightsmith.recipe import Merge
from weightsmith.stages.merge import BUILDER, combine, merge
from weightsmith.tools import Tools
from weightsmith.values import Json, Sources


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """The inputs of a merge: a base, and adapters in order with their weights."""

    base: Path
    adapters: tuple[Path, ...]
    weights: tuple[float, ...]


def merge_folders(folders: Folders, out: Path, options: Merge, tools: Tools) -> Mapping[str, Json]:
    """Merge adapters into `out`, which appears when it is complete; resumes a killed merge.

    Raises UsageError for invalid options, InputRefused for inputs that cannot be merged.
    """
    with in_folder(out, "the merged checkpoint", tools) as to:
        sources = _opened(folders, tools)
        merged = merge(sources, options, to, tools)
    _tell(merged.value.details, tools)
    files = merged.value.tree.files
    sums = [{"path": f.path, "size": f.size, "sha256": f.digest.hex} for f in files]
    return {**merged.value.details, "files": sums, "out": str(out.absolute())}


def keep_folder(folders: Folders, out: Path, options: Merge, tools: Tools) -> Mapping[str, Json]:
    """Write the combined adapter to `out`, which appears when it is complete.

    Raises UsageError for methods whose result is not an adapter, InputRefused for adapters that
    have more than plain low-rank factors.
    """
    with in_folder(out, "the combined adapter", tools) as to:
        combined = combine(_opened(folders, tools), options, to, tools)
    _tell(combined.value, tools)
    return {**combined.value, "out": str(out.absolute())}


def _opened(folders: Folders, tools: Tools) -> Sources:
    tools.runner.check(BUILDER)
    return open_sources(folders.base, folders.adapters, folders.weights, tools.store)


def _tell(result: Mapping[str, Json], tools: Tools) -> None:
    for finding in result.get("findings", ()):
        tools.progress.warn(str(finding))
    for line in summary(result):
        tools.progress.note(line)


def summary(result: Mapping[str, Json]) -> list[str]:
    """Return the summary table of a merge; a refused merge writes nothing, so that row is 0."""
    rows = [(kind, result["tensors"][kind], result["tensor_bytes"][kind]) for kind in KINDS]
    lines = [f"  {'tensors':<10}{'count':>8}{'MiB':>12}"]
    lines += [f"  {kind:<10}{count:>8}{size / 2**20:>12,.1f}" for kind, count, size in rows]
    return [*lines, f"  {'refused':<10}{0:>8}{0:>12,.1f}"]
