"""`invoke merge`: merge adapters into a checkpoint folder, or into one adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from weightsmith.api.commands.folders import base_folder, open_sources
from weightsmith.api.commands.requests import MergeCommand
from weightsmith.building.apart import not_nested
from weightsmith.core.values import Checkpoint, Json, Sources
from weightsmith.merging.plan import KINDS
from weightsmith.stages.merge import BUILDER, check, combine, merge
from weightsmith.steps.destinations import in_folder
from weightsmith.steps.tools import Tools


def merge_folders(asked: MergeCommand, tools: Tools) -> Mapping[str, Json]:
    """Merge adapters into `out`, or combine them in `keep_adapter`; return what was made.

    Either appears when it is complete. A killed merge is resumed. Without adapters, `out` gets the
    base itself.

    Raises UsageError for invalid options or methods whose result is not the adapter wanted,
    InputRefused for inputs that cannot be merged, or combined to plain low-rank factors.
    """
    out, keep, options = asked.out, asked.keep_adapter, asked.options
    not_nested(("--out", str(out or "")), ("--keep-adapter", str(keep or "")))
    kept: Mapping[str, Json] = {}
    if keep:
        sources = _opened(asked, tools)
        with in_folder(keep, "the combined adapter", tools) as to:
            combined = combine(sources, options, to, tools).value
        kept = _result(combined, keep, tools)
    if out is None:
        return kept
    sources = _opened(asked, tools)
    with in_folder(out, "the merged checkpoint", tools, resumes=True) as to:
        merged = merge(sources, options, to, tools).value
    result = _result(merged, out, tools)
    return {**result, "adapter": kept} if kept else result


def _opened(asked: MergeCommand, tools: Tools) -> Sources:
    """Return the sources; what would be refused is refused before anything is made."""
    tools.runner.check(BUILDER)
    base = base_folder(asked.base, tools)
    sources = open_sources(base, asked.adapters, asked.factors, tools.store)
    check(sources, asked.options)
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
