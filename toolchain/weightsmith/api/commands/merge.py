"""`merge` and `validate`: users' folders as the values that stages take, merged or compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from weightsmith.api.commands.requests import MergeCommand, ValidateCommand, Weighted
from weightsmith.building.apart import not_nested
from weightsmith.core.files import write_whole
from weightsmith.core.ports import Store
from weightsmith.core.values import (
    AdapterSnapshot,
    Checkpoint,
    FileEntry,
    Json,
    Snapshot,
    Sources,
    Tree,
)
from weightsmith.evaluating.items import read_prompts
from weightsmith.merging.plan import KINDS
from weightsmith.models.folder import check_adapter_folder, check_model_folder
from weightsmith.provenance.model_signing import SIGNATURE, model_signer, sign_model
from weightsmith.recipe.file import check_section
from weightsmith.recipe.schema import Adapter, Base
from weightsmith.recipe.sources import is_remote
from weightsmith.stages import validate as validation
from weightsmith.stages.merge import BUILDER, check, combine, merge
from weightsmith.stages.resolve import resolve_adapter, resolve_base
from weightsmith.steps.destinations import Unkept, in_folder
from weightsmith.steps.tools import Tools
from weightsmith.validating.result import Validation


def merge_folders(asked: MergeCommand, tools: Tools) -> Mapping[str, Json]:
    """Merge adapters into `out`, or combine them in `keep_adapter`; return what was made.

    Either appears when it is complete. A killed merge is resumed. Without adapters, `out` gets the
    base itself. With a signer, the signature of `out` is in it.

    Raises UsageError for invalid options or methods whose result is not the adapter wanted,
    InputRefused for inputs that cannot be merged, or combined to plain low-rank factors.
    """
    out, keep, options = asked.out, asked.keep_adapter, asked.options

    def opened() -> Sources:  # what would be refused is refused before anything is made
        tools.runner.check(BUILDER)
        sources = _fetched(asked, tools)
        check(tools.merges, sources, options)
        return sources

    signer = model_signer(tools.signer)
    not_nested(("--out", str(out or "")), ("--keep-adapter", str(keep or "")))
    kept: Mapping[str, Json] = {}
    if keep:
        sources = opened()
        with in_folder(keep, "the combined adapter", tools) as to:
            combined = combine(sources, options, to, tools).value
        kept = _result(combined, keep, tools)
    if out is None:
        return kept
    sources = opened()
    with in_folder(out, "the merged checkpoint", tools, resumes=True) as to:
        merged = merge(sources, options, to, tools).value
        if signer:
            signature = sign_model(out.absolute().name, merged.tree.files, signer)
            write_whole(merged.tree.root / SIGNATURE, signature)
    result = _result(merged, out, tools)
    return {**result, "adapter": kept} if kept else result


def _result(made: Checkpoint, out: Path, tools: Tools) -> Mapping[str, Json]:
    for finding in made.details.get("findings", ()):
        tools.progress.warn(str(finding))
    counts, sizes = made.details["tensors"], made.details["tensor_bytes"]
    tools.progress.note(f"  {'tensors':<10}{'count':>8}{'MiB':>12}")
    for kind in KINDS:
        tools.progress.note(f"  {kind:<10}{counts[kind]:>8}{sizes[kind] / 2**20:>12,.1f}")
    tools.progress.note(f"  {'refused':<10}{0:>8}{0:>12,.1f}")  # a refused merge writes nothing
    files = [{"path": f.path, "size": f.size, "sha256": f.digest.hex} for f in made.tree.files]
    return {**made.details, "files": files, "out": str(out.absolute())}


def validate_folders(asked: ValidateCommand, tools: Tools) -> Validation:
    """Compare a merged checkpoint with its sources; `options` say how it was merged.

    Raises CheckFailed, with the result as details, if the checkpoint differs from its sources,
    InputRefused if a folder is not a model or adapter, UsageError for invalid probes.
    """
    tools.runner.check(validation.BUILDER)
    sources = _fetched(asked, tools)
    checkpoint = open_checkpoint(asked.merged, tools.store)
    items = read_prompts(asked.probes) if asked.probes else ()
    to = Unkept(tools)
    return validation.validate(checkpoint, sources, asked.options, items, to, tools).value


def open_sources(
    base: Path, adapters: Sequence[Path], weights: Sequence[float], store: Store
) -> Sources:
    """Return a base and adapters in order; raise InputRefused if a folder is not safe to read."""

    def snapshot(folder: Path, names: Sequence[str]) -> Snapshot:
        tree = _tree(folder, names, store)
        return Snapshot(tree=tree, source=str(folder), pin="", pinned=False)

    return Sources(
        base=snapshot(base, check_model_folder(base)),
        adapters=tuple(
            AdapterSnapshot(snapshot=snapshot(one, check_adapter_folder(one)), weight=weight)
            for one, weight in zip(adapters, weights, strict=True)
        ),
    )


def _fetched(asked: Weighted, tools: Tools) -> Sources:
    """Return base and adapters; those that are no folders are fetched first."""
    named = [
        check_section(Adapter, {"source": one}, "adapter") if is_remote(one) else None
        for one in asked.adapters
    ]
    base = Path(asked.base)
    if is_remote(asked.base):
        source = check_section(Base, {"source": asked.base}, "base")
        base = resolve_base(source, Path(), tools).tree.root
    adapters = [
        resolve_adapter(one, Path(), tools).tree.root if one else Path(folder)
        for one, folder in zip(named, asked.adapters, strict=True)
    ]
    return open_sources(base, adapters, asked.factors, tools.store)


def open_checkpoint(folder: Path, store: Store) -> Checkpoint:
    """Return a checkpoint; raise InputRefused if the folder is not one or is not safe to read."""
    return Checkpoint(tree=_tree(folder, check_model_folder(folder), store))


def _tree(folder: Path, names: Sequence[str], store: Store) -> Tree:
    """Return the files; large ones may have a placeholder instead of a digest."""
    root = folder.resolve()
    entries = ((name, store.digest_file(root / name, read=False)) for name in names)
    files = [FileEntry(path=name, size=entry.size, digest=entry.digest) for name, entry in entries]
    return Tree(root=root, files=tuple(files))
