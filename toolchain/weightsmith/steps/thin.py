"""A thin image's parts: the base's own files, the adapters, and the program that merges them.

The program is those of our modules that a merge needs, found by what they import, and our kernels.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.merge_options import Merge
from weightsmith.core.resources import package
from weightsmith.core.thin import (
    ADAPTERS,
    OWN_FILES,
    PLACES,
    PROGRAM,
    CopiedFile,
    MadeFile,
    ThinAdapter,
    ThinModel,
)
from weightsmith.core.values import (
    Artifact,
    Digest,
    FileEntry,
    Format,
    JsonValue,
    Snapshot,
    Sources,
    Tree,
)
from weightsmith.merging.libc import KEPT_MEMORY
from weightsmith.merging.plan import MergePlan, can_be_virtual, estimate
from weightsmith.models.safetensors import read_header
from weightsmith.oci.image import layers_by_role
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.oci.tar import source_date_epoch
from weightsmith.provenance.attest import ThinParts
from weightsmith.quantizers.rounded import KEPT_ROWS
from weightsmith.quantizers.schemes import SCHEMES
from weightsmith.recipe.sources import scheme_of
from weightsmith.serving.engine import Engine
from weightsmith.serving.plan import ServingPlan
from weightsmith.steps.bases import base_inputs
from weightsmith.steps.merge_plans import MergePlans
from weightsmith.steps.tools import Tools

THIN = "thin"
START = "weightsmith.worker.start"
_MAIN = f"import sys\n\nfrom {START} import main\n\nraise SystemExit(main(sys.argv[1:]))\n"
_WORKERS = 2
"""CPUs that the plan of a start is for; each further one takes some megabytes more."""
_DEFAULT_SHM = 64 << 20
"""Bytes of a container for which nothing is planned."""
_KERNELS = "kernels"
_LIBRARIES = ("libkernels.so", "LICENSE")
_FAMILIES = "weightsmith.merging.families"
"""A package whose modules are found by listing its folder."""


def check_thin(engine: Engine, format_: Format, *, merges: bool) -> None:
    """Raise UsageError for a target that cannot have a thin image."""
    fix = "leave the kind thin out, or build another target"
    if not engine.python:
        raise UsageError(
            f"outputs: {engine.title} has no thin image: its own has no Python to merge with",
            hint=fix,
        )
    if format_.unmerged or not merges:
        raise UsageError(
            "outputs: a thin image merges adapters when it starts, and here nothing is merged",
            hint=fix,
        )
    if format_.packed and format_.name not in SCHEMES:
        raise UsageError(
            f"outputs: {format_.name} is made with calibration, which a thin image cannot repeat "
            "when it starts",
            hint=f"build a target in 16 bits or one of {', '.join(SCHEMES)}, or leave the kind "
            "thin out",
        )


def plan_thin(merges: MergePlans, sources: Sources, options: Merge) -> MergePlan:
    """Return the merge's plan; raises InputRefused for one whose bytes another machine may not get.

    Sums of low-rank terms, replaced rows and copies are rounded from the exact number; other
    changes are computed in float64, whose last digits depend on the machine's libraries.
    """
    plan = merges.plan(sources, options)
    if not can_be_virtual(plan):
        raise InputRefused(
            "outputs: no thin image of this merge: it is no sum of low-rank terms, or its base is "
            "dequantized, so another machine may get other last digits than those that were tested",
            hint="leave the kind thin out",
        )
    return plan


def thin_parts(
    sources: Sources,
    options: Merge,
    made: Artifact,
    served: Artifact,
    base: tuple[TarLayer, ...],
    base_files: Digest,
    engine: Engine,
    platforms: Sequence[str],
    tools: Tools,
    *,
    mounted: str = "",
) -> ThinParts:
    """Return the parts of a thin image.

    `made` are the weights as they were quantized or merged, `served` the same with what lies beside
    them; `base` are the layers of the base's own files, which have the digest `base_files`; there
    are none if the image `mounted` has the base. Raises what `plan_thin` does.
    """
    plan = plan_thin(tools.merges, sources, options)
    known = {file.path: file for file in sources.base.tree.files}
    weights = {file.path for file in made.tree.files if file.path.endswith(".safetensors")}
    beside = [file for file in served.tree.files if file.path not in weights]
    own = [file for file in beside if not _same(file, known)]
    format_ = made.format.name if made.format.packed else ""
    model = ThinModel(
        base=engine.model_dir,
        mounted=mounted,
        adapters=tuple(
            ThinAdapter(folder=f"{ADAPTERS}/{number}", weight=one.weight)
            for number, one in enumerate(sources.adapters)
        ),
        merge=options,
        format=format_,
        keep=_kept(made),
        made=tuple(
            MadeFile(
                name=file.path,
                size=file.size,
                sha256=file.digest.hex,
                tensors=() if format_ else _tensors(made.tree, file.path),
            )
            for file in made.tree.files
            if file.path in weights
        ),
        copied=tuple(
            CopiedFile(
                name=file.path,
                size=file.size,
                sha256=file.digest.hex,
                source=f"{OWN_FILES if file in own else engine.model_dir}/{file.path}",
            )
            for file in beside
        ),
        memory_bytes=start_memory(plan, made.format),
    )
    members = [
        *_members(served.tree, OWN_FILES, own),
        *(
            member
            for number, tree in enumerate(one.snapshot.tree for one in sources.adapters)
            for member in _members(tree, f"{ADAPTERS}/{number}", tree.files)
        ),
    ]
    epoch, memo = source_date_epoch(), tools.store.memo
    return ThinParts(
        model=model,
        weights=(*base, TarLayer(members=tuple(members), epoch=epoch, memo=memo)),
        program={each: program_layer(each, tools) for each in platforms},
        entrypoint=(engine.python, "-I", "-B", PROGRAM),
        base_files=base_files,
    )


def mounted_base(base: Snapshot, registry: Registry) -> str:
    """Return the image with the base that a thin image's manifests mount, by digest.

    Raises UsageError if the base does not come from an image with a folder that can be mounted.
    """
    if scheme_of(base.source) == "oci":
        place = base.pin.removeprefix("oci://")
        image = registry.pull_all(Reference.parse(place))[0]
        if layers_by_role(image).get("weights") and not image.has_files:
            return place
    raise UsageError(
        f"outputs.mount_base: {base.source} is no image that can be mounted",
        hint="build the base with the kind volume and --push, and let base.source name that: "
        "oci://REGISTRY/REPOSITORY:TAG-volume",
    )


def start_memory(plan: MergePlan, format_: Format) -> int:
    """Return the bytes that a start takes at most, besides the files that it makes."""
    kept = format_.packed and SCHEMES[format_.name].fused_scale
    merging = estimate(plan, workers=_WORKERS)["peak_memory_bytes"]
    return merging + KEPT_MEMORY + (KEPT_ROWS if kept else 0)


def grown(plan: ServingPlan, size: int) -> ServingPlan:
    """Return a plan of a server that has its merged weights in shared memory, too."""
    shared = plan.shm_bytes or _DEFAULT_SHM
    return replace(plan, host_bytes=plan.host_bytes + size, shm_bytes=shared + size)


def _same(file: FileEntry, known: Mapping[str, FileEntry]) -> bool:
    return file.path in known and known[file.path].digest == file.digest


def _kept(made: Artifact) -> tuple[str, ...]:
    options = made.details.get("options")
    return tuple(options.get("keep", ())) if isinstance(options, Mapping) else ()


def _tensors(tree: Tree, name: str) -> tuple[str, ...]:
    return tuple(tensor.name for tensor in read_header(tree.path(name)).tensors)


def _members(tree: Tree, folder: str, files: Iterable[FileEntry]) -> Iterator[Member]:
    for file in files:
        path = f"{folder}/{file.path}"
        yield Member(path, file.size, 0o644, tree.source(file.path), file.digest)


def program_layer(platform: str, tools: Tools) -> TarLayer:
    """Return what merges: our modules, and our kernels for a platform; the same for all models."""
    stage = base_inputs(_KERNELS, platform)

    def make(folder: Path) -> Mapping[str, JsonValue]:
        tools.make_engine_files(_KERNELS, platform, folder, tools.progress)
        return {}

    tree = tools.store.produce(stage.key, stage.note, make).tree
    libraries = [file for file in tree.files if file.path in _LIBRARIES]
    texts = {"__main__.py": _MAIN.encode(), **program_files()}
    return TarLayer(
        members=(
            *(Member.of_bytes(f"{PROGRAM}/{name}", data) for name, data in sorted(texts.items())),
            *_members(tree, f"{PROGRAM}/kernels", libraries),
        ),
        epoch=source_date_epoch(),
        memo=tools.store.memo,
        shared=(PLACES[0].strip("/"),),
    )


@cache
def program_files() -> Mapping[str, bytes]:
    """Return the modules that a start needs, by path, and the tables that they name."""
    found: dict[str, bytes] = {}
    families = package().parent.joinpath(*_FAMILIES.split("."))
    waiting = [START, *(f"{_FAMILIES}.{path.stem}" for path in families.glob("*.py"))]
    while waiting:
        name = waiting.pop()
        path = _file_of(name)
        if path is None or (place := path.relative_to(package().parent).as_posix()) in found:
            continue
        found[place] = text = path.read_bytes()
        tables = (one for one in path.parent.glob("*.json") if one.name.encode() in text)
        found |= {f"{Path(place).parent}/{one.name}": one.read_bytes() for one in tables}
        waiting += [".".join(name.split(".")[:n]) for n in range(1, name.count(".") + 1)]
        waiting += _imported(text)
    return found


def _file_of(name: str) -> Path | None:
    place = package().parent.joinpath(*name.split("."))
    candidates = (place.with_suffix(".py"), place / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def _imported(text: bytes) -> Iterator[str]:
    """Yield the names of ours that a module imports when it runs, modules or what they define."""
    waiting: list[ast.AST] = [ast.parse(text)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("weightsmith"):
            yield str(node.module)
            yield from (f"{node.module}.{one.name}" for one in node.names)
        waiting += ast.iter_child_nodes(node)
