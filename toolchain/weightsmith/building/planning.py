"""What a build will do, before it does it: targets, wishes, cost, and what is there already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from weightsmith.building.artifacts import check_model, wanted_of, warn_of_texts
from weightsmith.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.evaluating.gate import DropLimit
from weightsmith.evaluating.items import read_items, read_prompts
from weightsmith.evaluating.leaks import describe, find_leaks
from weightsmith.evaluating.metrics import check_metric
from weightsmith.evaluating.task import Task
from weightsmith.ports import Progress, Runner, Tools
from weightsmith.provenance.labels import reference
from weightsmith.quantizers import formats, of_format, quantizers
from weightsmith.recipe import Evaluate, Serve
from weightsmith.recipe_file import RecipeFile
from weightsmith.serving import targets as serving_targets
from weightsmith.serving.compatibility import check_engine_image, check_support
from weightsmith.serving.engine import ServedAdapter, ServeOptions
from weightsmith.serving.memory import parse_size
from weightsmith.serving.model import stated_dtype
from weightsmith.serving.targets import Target
from weightsmith.stages import merge as merging
from weightsmith.stages import quantize as quantizing
from weightsmith.stages.publish import Outputs
from weightsmith.stages.quantize import QuantizeOptions, kept_bytes, model_config, serving_config_of
from weightsmith.stages.render import render
from weightsmith.stages.unmerged import served_adapters
from weightsmith.values import (
    AWQ,
    FP8,
    GPTQ,
    LORA,
    Digest,
    Format,
    Json,
    ServingConfig,
    Sources,
    Tree,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """A recipe, the targets wanted of it, and where results go."""

    file: RecipeFile
    targets: tuple[Target, ...]
    outputs: Outputs
    dist: Path
    """Folder that gets NAME/VERSION/TARGET/."""
    engine_answers: bool
    """Images are tried in the container engine, else from a layout."""
    locked: bool = False
    """Sources that are not as in the recipe's lock are refused."""
    update_lock: bool = False
    """Sources and bases are pinned anew."""

    def folder(self, target: Target) -> Path:
        """Where a target's results go."""
        recipe = self.file.recipe
        return self.dist / recipe.name / recipe.version / target.name

    def outputs_of(self, target: Target) -> Outputs:
        """Return the outputs of one target; several get a folder each below one layout folder."""
        layout = self.outputs.layout
        if layout is not None and len(self.targets) > 1:
            layout = layout / target.name
        if not (layout or self.outputs.load or self.outputs.push):
            layout = None if self.engine_answers else self.folder(target) / "image"
            load = self.engine_answers
        else:
            load = self.outputs.load
        return replace(self.outputs, load=load, layout=layout)

    def trial_layout(self, target: Target) -> Path | None:
        """Where the image is tried: None for the container engine, else beside this layout."""
        if self.engine_answers:
            return None
        return self.outputs_of(target).layout or self.folder(target) / "image"


def chosen_targets(
    file: RecipeFile, names: tuple[str, ...], *, to_build: bool = False
) -> tuple[Target, ...]:
    """Return the targets to build: those asked for, else the recipe's.

    Raises UsageError for an unknown one; `to_build` also for one whose weights nothing here makes.
    """
    known = all_targets()
    wanted = names or file.recipe.targets
    if not wanted:
        raise UsageError(
            "no target: neither --target nor the recipe names one",
            hint="`invoke targets` lists them",
        )
    whole = dict.fromkeys(_whole_name(name, known) for name in wanted)
    chosen = tuple(serving_targets.find(name, known) for name in whole)
    for target in chosen:
        if to_build and not can_make(target.format):
            buildable = [name for name, t in known.items() if can_make(t.format)]
            raise UsageError(
                f"{target.name} serves {target.format.name} weights, and no quantizer here makes"
                " them",
                hint=f"these can be built: {', '.join(buildable)}",
            )
    return chosen


def _whole_name(name: str, known: Mapping[str, Target]) -> str:
    """Return `llamacpp-q4_k_m` for `llamacpp`: the default of what such an engine loads."""
    defaults = (f"{name}-{quantizer.default}" for quantizer in quantizers().values())
    return name if name in known else next((d for d in defaults if d in known), name)


def can_make(format_: Format) -> bool:
    """Say whether a quantizer here makes that format, or none is needed."""
    return not format_.packed or format_.name in formats()


def all_targets() -> Mapping[str, Target]:
    """Return every target there is: engines by formats, found by listing their folders."""
    return serving_targets.targets(all_formats().values())


def all_formats() -> Mapping[str, Format]:
    """Return the formats that quantizers make, and those that engines load all the same."""
    return {format_.name: format_ for format_ in (AWQ, GPTQ, FP8, LORA)} | dict(formats())


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeTask:
    """One task of a build, whose adapters it is held against, and what may be lost."""

    task: Task
    wanted: Evaluate
    adapter: int | None = None
    """Number of the one adapter whose own task it is; None for all of them together."""

    @property
    def limit(self) -> DropLimit:
        """What the merged model and the image may lose."""
        return DropLimit(
            max_drop=self.wanted.max_drop,
            min_score=self.wanted.min_score,
            proven=self.wanted.certainty == "proven",
        )


def tasks_of(file: RecipeFile) -> tuple[RecipeTask, ...]:
    """Return the recipe's task and each adapter's own; () without any. Raises UsageError."""
    recipe = file.recipe
    wishes: list[tuple[int | None, str, Evaluate | None]] = [(None, "", recipe.evaluate)]
    wishes += [
        (number, f"{_short(adapter.source)} {adapter.version}".strip(), adapter.evaluate)
        for number, adapter in enumerate(recipe.adapters)
    ]
    return tuple(
        RecipeTask(task=_task(file, name, wanted), wanted=wanted, adapter=number)
        for number, name, wanted in wishes
        if wanted is not None
    )


def _short(source: str) -> str:
    """Return the last part of a source's name."""
    return source.rstrip("/").rpartition("/")[2] or source


def _task(file: RecipeFile, name: str, wanted: Evaluate) -> Task:
    items = read_items(file.folder / wanted.data)
    check_metric(wanted.metric, items)
    return Task(
        items=items,
        metric=wanted.metric,
        max_tokens=wanted.max_tokens,
        command=wanted.command,
        name=name,
    )


def check_leaks(file: RecipeFile, tasks: tuple[RecipeTask, ...], progress: Progress) -> None:
    """Warn of questions that stand in the recipe's training or calibration text.

    Raises InputRefused instead where the task is strict.
    """
    calibration = file.recipe.calibration
    for tried in tasks:
        for other in (tried.wanted.training, calibration.data if calibration else ""):
            if not other:
                continue
            leaks = describe(find_leaks(tried.task.items, file.folder / other))
            if leaks and tried.wanted.strict:
                raise InputRefused(leaks, hint="remove them from either file")
            if leaks:
                progress.warn(leaks)


def wishes_of(serve: Serve) -> ServeOptions:
    """Return the recipe's wishes in the planner's units."""
    return ServeOptions(
        gpu=serve.gpu,
        gpu_count=serve.gpu_count,
        gpu_memory_bytes=parse_size(serve.gpu_memory) if serve.gpu_memory else 0,
        host_memory_bytes=parse_size(serve.memory) if serve.memory else 0,
        max_model_len=_number(serve.max_model_len),
        max_num_seqs=_number(serve.max_num_seqs),
        max_num_batched_tokens=_number(serve.max_num_batched_tokens),
        kv_cache_dtype=serve.kv_cache_dtype,
        dtype=serve.dtype,
        tensor_parallel_size=_number(serve.tensor_parallel_size) or 0,
        pipeline_parallel_size=_number(serve.pipeline_parallel_size) or 0,
        gpu_memory_utilization=(
            0.0 if serve.gpu_memory_utilization == "auto" else serve.gpu_memory_utilization
        ),
        served_model_name=serve.served_model_name,
        extra=serve.extra,
    )


def _number(wish: int | str) -> int | None:
    return None if isinstance(wish, str) else wish


def probes(file: RecipeFile) -> tuple[Sequence[Mapping[str, str]], ...]:
    """Return the chats that validation probes with; () for the built-in ones. Raises UsageError."""
    wanted, questions = file.recipe.validation, file.recipe.evaluate
    if wanted.probes:
        return read_prompts(file.folder / wanted.probes)
    return tuple(i.messages for i in read_items(file.folder / questions.data)) if questions else ()


def check_before_work(request: BuildRequest, sources: Sources, tools: Tools) -> dict[str, str]:
    """Refuse, before anything long starts, what would be refused after it.

    Adapters that do not fit the base, wishes that do not fit the memory, too small a disk. Returns
    the device that each target is planned for, by its name.
    """
    recipe = request.file.recipe
    written, devices = 0, {}
    probes(request.file)
    if sources_to_merge(request.targets, sources).adapters:
        written += merging.check(sources, recipe.merge)["write_bytes"]
    elif not sources.adapters:
        tools.progress.warn("the recipe has no adapter: the base is built as it is")
    tasks = tasks_of(request.file)
    check_leaks(request.file, tasks, tools.progress)
    if not tasks:
        tools.progress.warn("the recipe has no `evaluate`: nothing proves what the image knows")
    for target in request.targets:
        if target.engine.legacy:
            tools.progress.warn(target.engine.legacy)
        config = model_config(sources.base.tree.root)
        size = estimated_bytes(sources.base.tree.weight_bytes, target.format, config)
        adapters = unmerged_adapters(request.file, target, sources)
        file, tree = request.file, sources.base.tree
        planned = serving_config(
            file, target, tree, size, weights="", made_from=(), adapters=adapters
        )
        wanted = wanted_of(request.file, target.format, sources.base, tools)
        devices[target.name] = device = str(planned.plan["device"])
        check_format(target, wanted, config, device)
        if not recipe.image.base:
            check_engine_image(target.engine, device, config)
    if any(target.format.packed for target in request.targets):
        warn_of_texts(request.file, tools.progress)
    if not everything_cached(request, sources, tools):
        for target in request.targets:
            if target.format.packed:
                require_builder(target, tools.runner)
        config, size = model_config(sources.base.tree.root), sources.base.tree.size
        written += max(disk_peak(size, target.format, config) for target in request.targets)
        tools.store.require_room(written, "the build")
    return devices


def require_builder(target: Target, runner: Runner) -> None:
    """Raise EnvironmentFailure where the target's builder cannot be made; name one that can."""
    try:
        runner.check(of_format(target.format.name).builder)
    except EnvironmentFailure as lacking:
        hint = lacking.hint
        for name, other in all_targets().items():
            if name.startswith(f"{target.name}-"):  # the same weights by other hands
                with suppress(EnvironmentFailure):
                    runner.check(of_format(other.format.name).builder)
                    hint += f"; the target {name} needs none"
                    break
        raise EnvironmentFailure(lacking.message, hint=hint) from lacking


def sources_to_merge(targets: Sequence[Target], sources: Sources) -> Sources:
    """Return the sources as they are merged: without adapters where every target serves them."""
    served = all(target.format == LORA for target in targets)
    return replace(sources, adapters=()) if served else sources


def check_format(
    target: Target, wanted: QuantizeOptions, config: Mapping[str, Json], device: str
) -> None:
    """Raise InputRefused for a format that the engine cannot load there, or nobody makes of it.

    From the table of what engines load and config.json alone.
    """
    check_support(target.engine, target.format, device)
    if target.format.packed and can_make(target.format):
        check_model(wanted, config)


def unmerged_adapters(
    file: RecipeFile, target: Target, sources: Sources
) -> tuple[ServedAdapter, ...]:
    """Return the adapters that a target serves beside the base; () for a merged one.

    Raises UsageError where the recipe's gate cannot judge them, InputRefused for adapters that
    cannot be served.
    """
    if target.format != LORA:
        return ()
    if len(sources.adapters) > 1 and file.recipe.evaluate is not None:
        raise UsageError(
            f"{target.name} serves {len(sources.adapters)} adapters apart, and the recipe's"
            " `evaluate` judges them together",
            hint="give each adapter an `evaluate` of its own: it is then asked of that adapter "
            "alone",
        )
    return served_adapters(sources, gguf="gguf" in target.engine.accepts)


def everything_cached(request: BuildRequest, sources: Sources, tools: Tools) -> bool:
    """Say whether merging and quantizing are done already."""
    sources = sources_to_merge(request.targets, sources)
    merged = tools.store.find(merging.inputs(sources, request.file.recipe.merge).key)
    checkpoint = merged.tree if merged else (None if sources.adapters else sources.base.tree)
    return checkpoint is not None and all(
        not target.format.packed
        or tools.store.find(
            quantizing.inputs(
                checkpoint.digest, wanted_of(request.file, target.format, sources.base, tools)
            ).key
        )
        for target in request.targets
    )


def estimated_bytes(
    checkpoint_bytes: int, format_: Format, config: Mapping[str, Json] | None = None
) -> int:
    """Return the artifact's size before it exists, from nominal bits.

    The checkpoint has 16 where its config.json does not say that it has 32. Packed checkpoints
    keep the embeddings, and an output layer of its own, in 16 bits.
    """
    if not format_.packed:
        return checkpoint_bytes
    if config and stated_dtype(config) == "float32":
        checkpoint_bytes //= 2
    kept = kept_bytes(checkpoint_bytes, format_, config)
    return kept + int((checkpoint_bytes - kept) * format_.bits_per_weight / 16)


def disk_peak(checkpoint_bytes: int, format_: Format, config: Mapping[str, Json]) -> int:
    """Return the bytes on disk at the worst moment of making and keeping an artifact."""
    if not format_.packed:
        return checkpoint_bytes
    kept = kept_bytes(checkpoint_bytes, format_, config)
    return of_format(format_.name).peak_disk(checkpoint_bytes, kept, format_)


def serving_config(
    file: RecipeFile,
    target: Target,
    model: Tree,
    weight_bytes: int,
    *,
    weights: str,
    made_from: tuple[Digest, ...],
    adapters: tuple[ServedAdapter, ...] = (),
    notes: tuple[str, ...] = (),
) -> ServingConfig:
    """Plan and render a target; `weights` is the file that is served, empty before there is one."""
    recipe = file.recipe
    return render(
        target=target,
        name=recipe.name,
        version=recipe.version,
        model_config=serving_config_of(model.root),
        model_file=weights,
        weight_bytes=weight_bytes,
        wishes=replace(wishes_of(recipe.serve), adapters=adapters),
        image=reference(recipe, target.name),
        made_from=made_from,
        notes=notes,
    )
