"""Sources -> Checkpoint: merge adapters into the base in a builder, rounding once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

from weightsmith.core.errors import InputRefused
from weightsmith.core.jobs import Input, MergeJob
from weightsmith.core.merge_options import Merge
from weightsmith.core.ports import Store, StoreEntry
from weightsmith.core.resources import builder_pins
from weightsmith.core.safe_parse import read_json
from weightsmith.core.time_limits import job_seconds
from weightsmith.core.values import (
    Checkpoint,
    Digest,
    FileEntry,
    JsonValue,
    Sources,
    StageInputs,
    VirtualWeights,
    Writable,
)
from weightsmith.merging.adapter_config import read_adapter_config
from weightsmith.merging.base import refuse, simulates
from weightsmith.merging.claim import TASKS
from weightsmith.merging.claims import class_with_head
from weightsmith.merging.combining.combination import SUMS, Combination
from weightsmith.merging.plan import BLOCK_BYTES, START_BYTES
from weightsmith.models.facts import ModelFacts, read_facts
from weightsmith.models.safetensors import read_header
from weightsmith.models.task import MODULES, head_outputs, read_task
from weightsmith.models.templates import own_template
from weightsmith.models.tensors import HeaderOnlyTree
from weightsmith.recipe.file import RecipeFile
from weightsmith.serving.memory import human
from weightsmith.serving.parameters import parameters
from weightsmith.steps.destinations import Destination, InFolder, InStore
from weightsmith.steps.merge_plans import MergePlans
from weightsmith.steps.sizes import ForeseenTree
from weightsmith.steps.stage_result import StageResult, Timer
from weightsmith.steps.step import (
    MERGE_FIRST,
    Foreseen,
    ForeseenWeights,
    Foresight,
    Results,
    Step,
)
from weightsmith.steps.tools import Tools

BUILDER = "merge"
RECIPE_NUMBER = 6
_TAKES_HIDDEN = re.compile(
    r"^base_model\.model\.(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.\d+\..*"
    r"\.(?:q|gate)_proj\.lora_A\.weight$"
)
"""Of a decoder's matrices, those that take its states."""
_MEMORY_BYTES = 2 << 30
"""Smallest memory limit of the merge container; a sum of deltas needs only a fraction of it."""


def inputs(sources: Sources, options: Merge, *, headers_only: bool = False) -> StageInputs:
    """Return everything that the merged checkpoint depends on.

    One without weights in its files is another entry of the store.
    """
    return StageInputs(
        stage="merge",
        recipe_number=RECIPE_NUMBER,
        inputs={
            "base": sources.base.digest,
            "adapters": [a.snapshot.digest for a in sources.adapters],
            "weights": [a.weight for a in sources.adapters],
            **asdict(options),
            "builder": builder_pins(BUILDER),
            **({"unwritten": True} if headers_only else {}),
        },
    )


def merged_model(sources: Sources) -> ModelFacts:
    """Return the base's facts with what adapters bring: heads, and sentence-transformers' files.

    Raises InputRefused for files that cannot be read.
    """
    root = sources.base.tree.texts
    model = read_facts(root)
    for adapter in sources.adapters:
        folder = adapter.snapshot.tree.texts
        if not (folder / "adapter_config.json").is_file():
            continue  # the merge says what is wrong with it
        task_type = str(read_json(folder / "adapter_config.json").get("task_type") or "")
        name, suffix = model.architecture, TASKS.get(task_type, "")
        if suffix and name and not name.endswith(suffix) and head_outputs(folder):
            named = class_with_head(name, task_type)
            model = replace(
                model,
                architecture=named,
                text_architecture=named,
                read_task=read_task(root, folder),
            )
        elif (folder / MODULES).is_file():
            model = replace(model, read_task=read_task(root, folder))
        elif task_type == "FEATURE_EXTRACTION" and model.task.kind == "generate":
            raise InputRefused(
                f"{adapter.snapshot.source} was trained to give vectors, and nothing says how"
                f" {name} makes one of a text's tokens",
                hint="put sentence-transformers' modules.json and 1_Pooling/config.json beside the"
                " adapter or the base",
            )
    return model


def find(sources: Sources, options: Merge, store: Store, *, files: bool) -> Checkpoint | None:
    """Return the store's merged checkpoint; one without weights will do unless `files`."""
    if written := store.find(inputs(sources, options).key):
        return Checkpoint(tree=written.tree, details=written.meta)
    if files or not (made := store.find(inputs(sources, options, headers_only=True).key)):
        return None
    return _header_only(made, sources, options)


def _header_only(made: StoreEntry, sources: Sources, options: Merge) -> Checkpoint:
    """Return a checkpoint whose files have no weights, with the digests of files that have them."""
    details = dict(made.meta)
    largest = details.pop("largest")
    files = tuple(
        FileEntry(path=f["path"], size=f["size"], digest=Digest(f"sha256:{f['sha256']}"))
        for f in details.pop("files")
    )
    computed = VirtualWeights(
        tree=made.tree, sources=sources, merge=asdict(options), largest=largest
    )
    return Checkpoint(tree=HeaderOnlyTree(files, made.tree), details=details, computed=computed)


def check(
    merges: MergePlans, sources: Sources, options: Merge, *, files: bool = True
) -> Mapping[str, int]:
    """Return the cost of a merge; refuse what the merge would refuse, reading only headers.

    The keys are `read_bytes`, `write_bytes` and `peak_memory_bytes`. Raises InputRefused.
    """
    found = merges.cost(sources, options)
    return {**found.cost, "write_bytes": 0} if found.virtual and not files else found.cost


def merge(
    sources: Sources, options: Merge, to: Destination, tools: Tools, *, files: bool = True
) -> StageResult[Checkpoint]:
    """Return the merged checkpoint; without adapters, the unchanged base, or a copy in a folder.

    Without `files`, nobody needs its weights as files: unless they are there already, they are
    computed, checked and hashed, but not written if they can be computed where they are read.
    Raises InputRefused if any key of an adapter does not fit the base.
    """
    timer = Timer("merge", f"{len(sources.adapters)} adapter(s), {options.method}", tools)
    if not sources.adapters and not isinstance(to, InFolder):
        return timer.done(Checkpoint(tree=sources.base.tree), cached=True)
    there = to.find(lambda: inputs(sources, options))
    headers_only = not files and not there and tools.merges.cost(sources, options).virtual
    made = to.files(
        lambda: inputs(sources, options, headers_only=headers_only),
        lambda folder: _run(folder, sources, options, tools, headers_only=headers_only),
        resume=True,
    )
    plain = Checkpoint(tree=made.tree, details=made.meta)
    checkpoint = _header_only(made, sources, options) if headers_only else plain
    return timer.done(checkpoint, cached=made.cached)


def combine(
    sources: Sources, options: Merge, to: InFolder, tools: Tools
) -> StageResult[Checkpoint]:
    """Write the combined adapters as one adapter, into a folder of the user's.

    Raises UsageError for methods whose result is not an adapter, InputRefused for inputs with more
    than plain low-rank factors.
    """
    timer = Timer("merge", f"{len(sources.adapters)} adapter(s) into one", tools)
    files = to.files(
        lambda: inputs(sources, options),
        lambda folder: _run(folder, sources, options, tools, keep_adapter=True),
    )
    adapter = Checkpoint(tree=files.tree, details=files.meta)
    return timer.done(adapter, cached=files.cached)


def _run(
    folder: Path,
    sources: Sources,
    options: Merge,
    tools: Tools,
    *,
    keep_adapter: bool = False,
    headers_only: bool = False,
) -> Mapping[str, JsonValue]:
    cost = check(tools.merges, sources, options, files=not headers_only)
    written = 0 if keep_adapter else cost["write_bytes"]
    tools.store.require_room(written, "the merged checkpoint")
    tools.runner.prepare(BUILDER, tools.progress)
    job = MergeJob(
        builder=BUILDER,
        base=Input.tree(sources.base.tree),
        adapters=tuple(Input.tree(a.snapshot.tree) for a in sources.adapters),
        weights=tuple(a.weight for a in sources.adapters),
        options=options,
        keep_adapter=keep_adapter,
        headers_only=headers_only,
        output=folder,
        # Twice the planned memory, as a margin: methods that vote or prune keep a tensor's whole
        # deltas in memory, one per adapter.
        memory_bytes=max(_MEMORY_BYTES, 2 * cost["peak_memory_bytes"]),
        seconds=job_seconds(cost["read_bytes"]),
        use_gpu=True,
    )
    result = dict(tools.runner.run(job, tools.progress))
    result.pop("out", None)
    if headers_only:
        return result
    files = result.pop("files", [])
    return {**result, "sha256": {f["path"]: f["sha256"] for f in files}}


def _cost_foreseen(
    merges: MergePlans, sources: Sources, options: Merge, *, files: bool
) -> Mapping[str, int]:
    """Return what `check` returns and refuse what it refuses.

    Without the base's weights it is an estimate, and adapters are refused only for another width.
    """
    tree = sources.base.tree
    if not isinstance(tree, ForeseenTree):
        return check(merges, sources, options, files=files)
    Combination.of(options)
    model, choice = read_facts(tree.root), options.quantized_base
    if model.packing and choice != "dequantize":
        raise refuse(tree.root, model.packing.method, simulates=simulates(choice))
    adapters = [adapter.snapshot.tree for adapter in sources.adapters]
    configured = [read_adapter_config(adapter.root) for adapter in adapters]
    summed = options.method in SUMS and all(one.kind == "LORA" for one in configured)
    summed = summed and not any(one.raw.get("use_dora") for one in configured)
    virtual = summed and not (files or model.packing or simulates(choice))
    plain = 2 * parameters(model).all if model.packing else tree.weight_bytes
    hidden, held = model.shape.hidden, 0
    for adapter in sources.adapters:
        modules: dict[str, int] = {}
        weights = adapter.snapshot.tree.path("adapter_model.safetensors")
        for tensor in read_header(weights).tensors:
            if _TAKES_HIDDEN.search(tensor.name) and tensor.shape[-1] != hidden:
                raise InputRefused(
                    f"{adapter.snapshot.source}: {tensor.name} takes {tensor.shape[-1]} inputs, and"
                    f" the base's hidden size is {hidden}",
                    hint="give the base that the adapter was trained with, as in its"
                    " adapter_config.json",
                )
            module = tensor.name.partition(".lora_")[0]
            modules[module] = modules.get(module, 0) + prod(tensor.shape)
        held += 12 * max(modules.values(), default=0)  # in float32, and their norms
    if not summed:
        held = 8 * len(adapters) * hidden * model.shape.intermediate
    return {
        "read_bytes": tree.size + sum(adapter.size for adapter in adapters),
        "write_bytes": 0 if virtual else tree.size - tree.weight_bytes + plain,
        "peak_memory_bytes": START_BYTES + BLOCK_BYTES + held,
    }


@dataclass(frozen=True, eq=False, kw_only=True)
class MergeStep(Step[Checkpoint, ForeseenWeights]):
    """Merges the adapters; without `merges`, gives the unchanged base."""

    name = "merge"
    recipe_number = RECIPE_NUMBER
    in_every_plan = True

    file: RecipeFile
    sources: Step[Sources, Sources]
    merges: bool
    files: bool
    """Whether a target needs the merged weights as files."""

    @property
    def options(self) -> Writable:
        """How it merges."""
        return asdict(self.file.recipe.merge) if self.merges else None

    def foresee(self, seen: Foresight) -> Foreseen[ForeseenWeights]:
        """Return the checkpoint as it will be; refuses adapters that do not fit the base."""
        sources, options, tools = seen[self.sources], self.file.recipe.merge, seen.tools
        weights = ForeseenWeights.of(sources.base.tree)
        if not self.merges:
            return Foreseen(value=weights)
        foresee = partial(_cost_foreseen, tools.merges, sources, options)
        cost, whole = foresee(files=self.files), foresee(files=True)
        if options.quantized_base == "dequantize" and weights.model.packing:
            # Twice the size of fp8 files, four times that of 4-bit ones, and no longer packed.
            written = whole["write_bytes"]
            plain = replace(weights.model, packing=None)
            weights = ForeseenWeights(model=plain, size=written, weight_bytes=written)
        # The last adapter's template is the merged model's: its parser depends on it.
        templates = [own_template(one.snapshot.tree.texts) for one in sources.adapters]
        last = next(filter(None, reversed(templates)), weights.model.chat_template)
        model = merged_model(sources)
        model = replace(model, chat_template=last, packing=weights.model.packing)
        weights = replace(weights, model=model, tree=None, missing=MERGE_FIRST)
        found = find(sources, options, tools.store, files=self.files)
        state = seen.state(self, inputs(sources, options))
        saved = whole["write_bytes"] - cost["write_bytes"]
        if not state.cached and saved > 0:
            # A checkpoint whose weights nobody needs as files will do.
            why = f"every target is made from base and adapters: {human(saved)} less disk"
            headers_only = seen.state(self, inputs(sources, options, headers_only=True))
            unmade = replace(state, why=f"{state.why}; {why}")
            state = headers_only if headers_only.cached else unmade
        row = self.row(
            state,
            read=cost["read_bytes"],
            write=cost["write_bytes"],
            memory=cost["peak_memory_bytes"],
        )
        if found:
            tree = found.tree
            weights = replace(weights, size=tree.size, weight_bytes=tree.weight_bytes, tree=tree)
        return Foreseen(value=weights, rows=(row,))

    def run(self, have: Results, tools: Tools) -> StageResult[Checkpoint]:
        """Return the merged checkpoint; raises InputRefused as `merge` does."""
        sources, to = have[self.sources], InStore(tools.store)
        sources = sources if self.merges else replace(sources, adapters=())
        return merge(sources, self.file.recipe.merge, to, tools, files=self.files)

    def inputs(self, have: Results, _tools: Tools) -> StageInputs | None:
        """Return what the merged checkpoint depended on."""
        sources = have[self.sources]
        if have[self].digest == sources.base.digest:
            return None
        return inputs(sources, self.file.recipe.merge)

    def builders(self) -> tuple[str, ...]:
        """Return the merge builder, which every build needs."""
        return (BUILDER,)
