"""`bake`: make an image of a model on disk, without starting it."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from weightsmith.api.commands.render import (
    Model,
    open_model,
    own_weights,
    read_config,
    served_file,
    serving_config,
)
from weightsmith.api.commands.requests import BakeCommand
from weightsmith.building.targets import target_of
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.ports import Progress, Store
from weightsmith.core.values import SAFETENSORS, Artifact, Published, Tree
from weightsmith.models.folder import scan
from weightsmith.models.gguf_config import (
    gguf_file_type,
    gguf_models,
    gguf_tensor_types,
    model_name,
)
from weightsmith.models.reshard import HASHED_AT_ONCE
from weightsmith.models.safetensors import read_header
from weightsmith.oci.modelpack import check_name
from weightsmith.oci.references import Reference
from weightsmith.provenance.attest import ImageInputs
from weightsmith.provenance.labels import PLAN, PREFIX, plan_label
from weightsmith.quantizers import formats
from weightsmith.quantizers.gguf_types import FILE_TYPES
from weightsmith.recipe.schema import ADAPTER, KINDS, LOADABLE
from weightsmith.serving.engine import ServedModel, ServeOptions
from weightsmith.serving.healthcheck import PROGRAM
from weightsmith.serving.plan import ServingConfig
from weightsmith.serving.targets import Target
from weightsmith.stages.bake import bake, layer_limit
from weightsmith.stages.publish import publish
from weightsmith.stages.render import render_unplanned, repository_name
from weightsmith.steps.bases import base_images, base_reference, data_base, public_base
from weightsmith.steps.healthcheck import healthcheck_layers
from weightsmith.steps.outputs import ImageOutputs, check_layout
from weightsmith.steps.tools import Tools

_MEMORY = 4 << 30
_PLATFORM = re.compile(r"linux/[a-z0-9_]+")


def bake_model(request: BakeCommand, tools: Tools) -> Published:
    """Assemble a model's image and load, write or push it, without starting it."""
    began = time.monotonic()
    _check(request)
    outputs = ImageOutputs(  # for its first name; a second one is loaded later
        load=bool(request.load) and request.push in ("", request.load),
        layout=request.layout and request.layout.absolute(),
        push=bool(request.push),
        force=request.force,
    )
    check_layout(outputs.layout)
    if request.push:
        to = Reference.parse(request.push)
        if request.kind == "ollama":
            check_name(to)
        tools.registry.check_push(to)
    target = target_of(request.target)
    model = open_model(request.model, request.name or _name(request.model))
    place = request.push or request.load or f"{repository_name(model.name)}:latest"
    prepare = partial(_inputs, request, model, target, place, tools)
    made = bake(prepare, place, tools, push=outputs.push).value
    published = publish(made, place, outputs, tools, started_in=outputs.layout).value
    if request.push and request.load and request.load != request.push:
        publish(made, request.load, ImageOutputs(load=True), tools)
    return replace(published, seconds=round(time.monotonic() - began, 3))


def _check(request: BakeCommand) -> None:
    if not (request.push or request.load or request.layout):
        raise UsageError(
            "missing: --push (or --load, --layout)", hint="`--help COMMAND` lists every flag"
        )
    if request.kind not in KINDS:
        raise UsageError(f"--kind {request.kind}: unknown", hint=f"one of {', '.join(KINDS)}")
    if request.kind == "thin":
        raise UsageError(
            "--kind thin: bake gets merged weights, and a thin image holds base and adapters",
            hint="build it: outputs.kinds: [thin] in a recipe",
        )
    if request.kind == ADAPTER:
        raise UsageError(
            "--kind adapter: `bake` assembles a finished model, and tests no adapter",
            hint="build it with `build --kind adapter`",
        )
    if request.load and Reference.parse(request.load).digest:
        raise UsageError(
            f"--load {request.load}: an engine takes an image by its tag, not by a digest",
            hint="give NAME:TAG",
        )
    if request.kind not in LOADABLE and request.load:
        raise UsageError(
            f"--load {request.load}: a container engine cannot load the kind {request.kind}",
            hint="give --push or --layout, or another --kind",
        )
    if request.kind not in LOADABLE and request.image.base:
        raise UsageError(
            f"--base-image {request.image.base}: the kind {request.kind} has no base",
            hint="leave it out, or give another --kind",
        )
    if request.kind == "volume":  # of other kinds, the base has platforms or none is needed
        for platform in request.image.platforms:
            if not _PLATFORM.fullmatch(platform):
                raise UsageError(
                    f"--platform {platform}: not a platform",
                    hint="give it as linux/amd64 or linux/arm64",
                )


def _name(path: Path) -> str:
    """Return the model file's name, or a default; it does not depend on the folder's name."""
    if path.is_file():
        return model_name(path.name)
    files = gguf_models(file.name for file in path.glob("*.gguf")) if path.is_dir() else []
    names = set(map(model_name, files))
    return names.pop() if len(names) == 1 else "model"


def _fitted(config: ServingConfig, folder: Path, model: Model, target: Target) -> ServingConfig:
    """Return a rendered configuration for the file that is baked, whatever its name was then.

    Raises UsageError if it was rendered for another engine.
    """
    if config.target.partition("-")[0] != target.engine.name:
        raise UsageError(
            f"--config {folder} was rendered for {config.target}, not for {target.name}",
            hint=f"render it again with --target {target.name}",
        )
    inside = target.engine.model_dir
    path = f"{inside}/{served_file(model, target)}".rstrip("/")
    # Without one, a path that no option has finds the variable that must not be there.
    absent = f"{inside}/no projector"
    projector = f"{inside}/{model.projector.file}" if model.projector else absent
    served = ServedModel(path=path, name=config.served_name, projector=projector, startup_seconds=0)
    known = target.engine.env(config.plan, served)
    places = {key: text for key, text in known.items() if text in (path, projector)}
    if model.projector and not places.keys() <= config.env.keys():
        raise UsageError(
            f"--config {folder} was rendered without {model.projector.file}",
            hint="render it again with the projector beside the model's file",
        )
    env, files = dict(config.env), dict(config.image_files)
    for key in places.keys() & env.keys():
        old, new = f"{key}={env.pop(key)}\n", f"{key}={places[key]}\n"
        if places[key] != absent:
            env[key] = places[key]
        for name in files:
            files[name] = files[name].replace(old, new if key in env else "")
    return replace(config, env=env, image_files=files)


def _inputs(
    request: BakeCommand, model: Model, target: Target, place: str, tools: Tools
) -> ImageInputs:
    artifact = _artifact(model, target, tools.store, tools.progress)
    folder = artifact.tree
    if request.kind == "ollama":  # it has no place for other files
        gguf = tuple(file for file in artifact.tree.files if file.path.endswith(".gguf"))
        artifact = replace(artifact, tree=replace(artifact.tree, files=gguf))
    _check_type(model, target, tools)
    config, engine = None, ""
    base_name = data_base(request.kind, request.image.base)
    labels = {
        "org.opencontainers.image.title": model.name,
        PREFIX + "target": target.name,
        PREFIX + "kind": request.kind,
        PREFIX + "format": target.format.name,
    }
    if request.kind == "image":
        if request.config:
            config = _fitted(read_config(request.config), request.config, model, target)
        else:
            # The size is of the model, not of this machine, so that the digest is reproducible.
            options = ServeOptions(host_memory_bytes=_MEMORY + 2 * model.weight_bytes)
            try:
                config = serving_config(model, target, options, place)
            except (UsageError, InputRefused) as error:
                why = f"no memory plan: {error.message}"
                tools.progress.warn(f"{why}; the engine's defaults are used")
                file, size = served_file(model, target), model.weight_bytes
                config = render_unplanned(target, model.name, file, size, model.projector)
        labels[PLAN] = plan_label(config.plan)
        engine, device = target.engine.name, config.plan.device
        base_name = base_reference(target.engine, device, request.image.base)
    platforms = request.image.platforms
    bases = base_images(base_name, engine, tools, platforms=platforms) if base_name else ()
    asking = [each.platform for each in bases if config and PROGRAM in config.healthcheck]
    return ImageInputs(
        name=model.name,
        version="0",
        artifact=artifact,
        engine=target.engine,
        config=config,
        bases=bases,
        platforms=platforms,
        base_name=public_base(base_name),
        kind=request.kind,
        labels=labels,
        order=request.image.order,
        largest_layer=layer_limit(request.image.max_layer_size),
        licensed=folder,
        healthcheck=healthcheck_layers(target.engine, asking, tools, optional=False),
        parameters={"target": target.name, "kind": request.kind, "order": request.image.order},
        network_in_jobs=tools.runner.networked,
    )


def _artifact(model: Model, target: Target, store: Store, progress: Progress) -> Artifact:
    ending = target.format.suffix
    known = bool(model.facts.architecture)  # else it is not known what the weights are
    if (
        target.format.unmerged  # it holds no adapters
        or not any(name.endswith(ending) for name in model.weights)
        or (known and not own_weights(model, target))
    ):
        raise InputRefused(
            f"{model.path} has no {target.format.name} weights, which {target.name} needs",
            hint=f"run `invoke quantize --format {target.format.name}` first"
            if target.format.name in formats()
            else "give the Hugging Face checkpoint"
            if target.format == SAFETENSORS
            else f"run `invoke build --target {target.name}`",
        )
    names = scan(model.root, gguf=True) if model.path.is_dir() else [*model.weights]
    others = {name for name in model.weights if not name.endswith(ending)}
    kept = sorted({*names} - others)
    for name in kept:
        if name.endswith(".safetensors"):
            try:
                read_header(model.root / name)
            except InputRefused as error:
                with (model.root / name).open("rb") as file:
                    begins = file.read(9)
                if begins[8:] == b"{":  # it is safetensors, and truncated
                    raise
                progress.warn(f"{error.message}; it is added to the image unchanged")
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        found = list(pool.map(lambda name: store.digest_file(model.root / name), kept))
    files = tuple(replace(one, path=name) for name, one in zip(kept, found, strict=True))
    return Artifact(format=target.format, tree=Tree(root=model.root, files=files))


def _check_type(model: Model, target: Target, tools: Tools) -> None:
    row = FILE_TYPES.get(target.format.name)
    files = gguf_models(model.weights)
    found = gguf_file_type(model.root / files[0]) if row and files else None
    if row is None or found is None or found == row.number:
        return
    named = next((other for other in FILE_TYPES.values() if other.number == found), None)
    if named is None or named.family == row.family:
        tools.progress.warn(
            f"the metadata of {files[0]} says {named.name if named else f'type {found}'}, but the"
            f" image's labels will say {row.name}, because of --target {target.name}"
        )
        return
    most = [*gguf_tensor_types(model.root / files[0])][:3]
    raise InputRefused(
        f"{files[0]} has weights of the type {named.name} (general.file_type {found}, tensors"
        f" mostly {', '.join(most)}), but {target.name} promises {row.name}",
        hint=f"give --target llamacpp-{named.name}, or run `invoke quantize --format {row.name}`",
    )
