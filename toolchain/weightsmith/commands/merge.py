"""`invoke merge`: merge adapters into a checkpoint folder, or into one adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weightsmith.commands.folders import base_folder, open_sources
from weightsmith.merge_options import Merge
from weightsmith.merging.plan import KINDS
from weightsmith.stages.merge import BUILDER, check, combine, merge
from weightsmith.steps.destinations import in_folder
from weightsmith.tools import Tools
from weightsmith.values import Checkpoint, Json, Sources


@dataclass(frozen=True, slots=True, kw_only=True)
class Folders:
    """The inputs of a merge: a base, and adapters in order with their weights."""

    base: Path | str
    """A folder, or a source such as `hf://owner/name`."""
    adapters: tuple[Path, ...]
    weights: tuple[float, ...]


def merge_folders(folders: Folders, out: Path, options: Merge, tools: Tools) -> Mapping[str, Json]:
    """Merge adapters into `out`, which appears when it is complete; resumes a killed merge.

    Without adapters, it gets the base itself.

    Raises UsageError for invalid options, InputRefused for inputs that cannot be merged.
    """
    sources = _opened(folders, options, tools)
    with in_folder(out, "the merged checkpoint", tools, resumes=True) as to:
        merged = merge(sources, options, to, tools).value
    return _result(merged, out, tools)


def keep_folder(folders: Folders, out: Path, options: Merge, tools: Tools) -> Mapping[str, Json]:
    """Write the combined adapter to `out`, which appears when it is complete.

    Raises UsageError for methods whose result is not an adapter, InputRefused for adapters that
    have more than plain low-rank factors.
    """
    sources = _opened(folders, options, tools)
    with in_folder(out, "the combined adapter", tools) as to:
        combined = combine(sources, options, to, tools).value
    return _result(combined, out, tools)


def _opened(folders: Folders, options: Merge, tools: Tools) -> Sources:
    """Return the sources; what would be refused is refused before anything is made."""
    tools.runner.check(BUILDER)
    base = base_folder(folders.base, tools)
    sources = open_sources(base, folders.adapters, folders.weights, tools.store)
    check(sources, options)
    return sources


def _result(made: Checkpoint, out: Path, tools: Tools) -> Mapping[str, Json]:
    for finding in made.details.get("findings", ()):
        tools.progress.warn(str(finding))
    for line in summary(made.details):
        tools.progress.note(line)
    files = [{"path": f.path, "size": f.size, "sha256": f.digest.hex} for f in made.tree.files]
    return {**made.details, "files": files, "out": str(out.absolute())}


def summary(result: Mapping[str, Json]) -> list[str]:
    """Return the summary table of a merge; a refused merge writes nothing, so that row is 0."""
    rows = [(kind, result["tensors"][kind], result["tensor_bytes"][kind]) for kind in KINDS]
    lines = [f"  {'tensors':<10}{'count':>8}{'MiB':>12}"]
    lines += [f"  {kind:<10}{count:>8}{size / 2**20:>12,.1f}" for kind, count, size in rows]
    return [*lines, f"  {'refused':<10}{0:>8}{0:>12,.1f}"]
