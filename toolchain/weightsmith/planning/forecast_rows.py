"""The rows of a forecast: what each stage reads, writes and needs, and whether it is cached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weightsmith.checkpoints.facts import ModelFacts
from weightsmith.evaluating import subjects as references
from weightsmith.evaluating.results import RecipeTask
from weightsmith.planning.foreseen import merge_cost
from weightsmith.planning.memory import (
    quality_memory,
    quantize_memory,
    reference_memory,
    validate_memory,
)
from weightsmith.planning.options import texts_of
from weightsmith.planning.request import has_gguf
from weightsmith.planning.sizes import disk_peak, estimated_bytes
from weightsmith.planning.targets import can_make
from weightsmith.planning.tasks import probes
from weightsmith.quantizers import of_format
from weightsmith.recipe_file import RecipeFile
from weightsmith.serving.memory import human
from weightsmith.serving.targets import Target
from weightsmith.stages import merge as merging
from weightsmith.stages import quality
from weightsmith.stages import quantize as quantizing
from weightsmith.stages import validate as validating
from weightsmith.stages.quantize import QuantizeOptions
from weightsmith.tools import Tools
from weightsmith.values import Json, Sources, StageInputs, Tree

HERE = "here"
"""Where a stage's result is, if it is on this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A build whose sources are on this machine."""

    file: RecipeFile
    sources: Sources
    merged: Sources
    """The sources that are merged."""
    files: bool
    """Whether a target needs the merged checkpoint as files."""
    checkpoint: Tree | None
    """None if it does not exist yet."""
    model: ModelFacts
    tasks: Sequence[RecipeTask]
    earlier: Mapping[str, Json]
    """The inputs of the last build's stages, by stage and target."""
    tools: Tools
    note: str = ""
    """Where the size of the base's weights is from, if they are not here."""

    @property
    def missing(self) -> str:
        """Why there is no checkpoint yet."""
        return "merge comes first" if self.merged.adapters else "the base's weights are not here"


def merge_rows(known: Known) -> list[dict[str, Json]]:
    """Return the row of the merge, if there is something to merge."""
    sources, tools, wanted = known.merged, known.tools, known.file.recipe.merge
    if not sources.adapters:
        return []
    cost, whole = (merge_cost(sources, wanted, files=f) for f in (known.files, True))
    state = _state(merging.inputs(sources, wanted), known.earlier.get("merge"), tools)
    if not state["cached"] and cost["write_bytes"] < whole["write_bytes"]:
        saved = human(whole["write_bytes"] - cost["write_bytes"])
        unwritten = _state(merging.inputs(sources, wanted, unwritten=True), None, tools)
        why = f"{state['why']}; every target is made from base and adapters: {saved} less disk"
        state = unwritten if unwritten["cached"] else {**state, "why": why}
    read, write, memory = cost["read_bytes"], cost["write_bytes"], cost["peak_memory_bytes"]
    return [row("merge", **state, read=read, write=write, memory=memory)]


def validate_rows(known: Known) -> list[dict[str, Json]]:
    """Return the row of the validation, if there is one."""
    sources, recipe = known.merged, known.file.recipe
    if not sources.adapters or not recipe.validation.enabled:
        return []
    read = 2 * sources.base.tree.size + sum(a.snapshot.tree.size for a in sources.adapters)
    cost: dict[str, Json] = {"read": read, "memory": validate_memory(known.model, sources)}
    if known.checkpoint is None:
        return [row("validate", cached=False, why=known.missing, **cost)]
    stage = validating.inputs(sources, recipe.merge, known.checkpoint.digest, probes(known.file))
    return [row("validate", **_state(stage, known.earlier.get("validate"), known.tools), **cost)]


def reference_rows(known: Known) -> list[dict[str, Json]]:
    """Return the row of the reference answers, if there are questions."""
    sources, tasks, tools = known.sources, known.tasks, known.tools
    if not tasks:
        return []
    states = []
    for task in tasks:
        asked = references.subjects(sources, task.adapter)
        stage = references.inputs(asked.get("adapter", asked["base"]), task.task)
        states.append(_state(stage, known.earlier.get("reference"), tools))
    state = next((one for one in states if not one["cached"]), states[-1])
    memory = reference_memory(known.model, sources, tasks, tools.memory)
    return [row("reference", **state, read=sources.base.tree.size, memory=memory)]


def quantize_row(
    known: Known, target: Target, options: QuantizeOptions, size: int
) -> tuple[list[dict[str, Json]], Tree | None]:
    """Return the row of a target's weights, if they are quantized, and the weights if they exist.

    `size` is that of the checkpoint that they are made from.
    """
    checkpoint, tools = known.checkpoint, known.tools
    if not target.format.packed:
        return [], checkpoint
    if not can_make(target.format):
        why = f"no installed quantizer makes {target.format.name}"
        return [row("quantize", target=target.name, cached=False, why=why, read=size)], None
    cost: dict[str, Json] = {
        "target": target.name,
        "read": size,
        "write": estimated_bytes(size, target.format, known.model),
        "memory": quantize_memory(known.model, size, options),
        "disk": disk_peak(size, target.format, known.model, options.options),
    }
    if checkpoint is None:
        return [row("quantize", cached=False, why=known.missing, **cost)], None
    stage = quantizing.inputs(checkpoint.digest, options)
    state, entry = _state(stage, known.earlier.get(f"quantize {target.name}"), tools), None
    if state["cached"]:
        entry = tools.store.find(stage.key)
    else:
        state["why"] += f" ({of_format(target.format.name).name})"
    return [row("quantize", **state, **cost)], entry.tree if entry else None


def quality_rows(
    known: Known, target: Target, artifact: Tree | None, size: int
) -> list[dict[str, Json]]:
    """Return the row of a target's quality gate, if it has one.

    `size` is that of the checkpoint that the artifact is made from.
    """
    checkpoint, wanted = known.checkpoint, known.file.recipe.quality
    if not target.format.packed or not can_make(target.format) or wanted.gate is False:
        return []
    texts = texts_of(known.file)
    state: dict[str, Json] = {"cached": False, "why": "its weights do not exist yet"}
    if checkpoint and artifact:
        stage = quality.inputs(checkpoint.digest, artifact.digest, texts, wanted.tokens)
        state = _state(stage, None, known.tools)
    made = artifact.size if artifact else estimated_bytes(size, target.format, known.model)
    memory = quality_memory(known.model, wanted.tokens)
    return [row("quality", target=target.name, **state, read=size + made, memory=memory)]


def publish_row(file: RecipeFile, target: Target, size: int, *, made: bool) -> dict[str, Json]:
    """Return the row of publishing a target of `size` bytes; `made`: its weights exist."""
    why = "not known before the image is assembled" if made else "its weights do not exist yet"
    # Other kinds share the weight layers; these have the same weights as a blob of its own.
    runners = ("modelpack", "ollama") if has_gguf(target) else ("modelpack",)
    plain = [kind for kind in runners if kind in file.recipe.outputs.kinds]
    if plain:
        why += (
            f"; {' and '.join(plain)}: the weights are uploaded a second time, {human(size)}, as"
            " plain files"
        )
        why += "" if "ollama" in plain else "; modelpack-tar would upload nothing more"
    hub = file.recipe.outputs.hub
    if hub:
        why += f"; with --push, {human(size)} go to {hub} too, unless it has them"
    disk = 2 * size if plain else size
    written = disk + size if hub else disk
    return row(
        "publish", target=target.name, cached=False, why=why, read=size, write=written, disk=disk
    )


def _state(stage: StageInputs, earlier: Mapping[str, Json] | None, tools: Tools) -> dict[str, Json]:
    """Return whether a stage's result is cached and where, and if not, which inputs changed."""
    if found := tools.store.find(stage.key):
        return {"cached": True, "why": "", "where": found.where or HERE}
    changed = stage.changed_since(earlier)
    if changed == "":
        return {"cached": False, "why": "its result was removed from the store"}
    why = changed if changed.startswith("never") else f"changed: {changed}"
    return {"cached": False, "why": why}


def row(
    stage: str,
    *,
    cached: bool,
    why: str,
    where: str = "",
    target: str = "",
    read: int = 0,
    write: int = 0,
    memory: int = 0,
    disk: int | None = None,
) -> dict[str, Json]:
    """Return a stage's row; sizes are in bytes, and `disk` is `write` if not given."""
    return {
        "stage": stage,
        "target": target,
        "cached": cached,
        "where": (where or HERE) if cached else "",
        "why": why,
        "read_bytes": read,
        "write_bytes": write,
        "peak_memory_bytes": memory,
        "disk_bytes": write if disk is None else disk,
    }
