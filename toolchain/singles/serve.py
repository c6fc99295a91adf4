"""`invoke render` and `invoke bake`: a model on disk, made ready to serve."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from toolchain.checkpoints.folder import scan
from toolchain.checkpoints.gguf_config import gguf_config
from toolchain.checkpoints.packing import weight_kinds
from toolchain.errors import InputRefused, UsageError
from toolchain.oci.references import Reference
from toolchain.oci.registry import Registry
from toolchain.planning import all_targets, estimated_bytes
from toolchain.ports import Store, Tools
from toolchain.serving.engine import Wishes
from toolchain.serving.targets import Target, find
from toolchain.singles.arguments import required
from toolchain.stages.bake import bake
from toolchain.stages.base import base_image, base_reference
from toolchain.stages.publish import Outputs, publish
from toolchain.stages.quantize import model_config
from toolchain.stages.record import write_files
from toolchain.stages.render import portable, render
from toolchain.values import Artifact, FileEntry, Json, ServingConfig, Tree, plain

_CONFIG = "serving.json"
"""Everything that `bake` needs of a rendered folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model on disk: a folder, or one GGUF file."""

    path: Path
    name: str
    config: Mapping[str, Json]
    weights: tuple[str, ...]
    """The files that hold weights, relative to `root`."""

    @property
    def root(self) -> Path:
        """The folder that its files are in."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum((self.root / name).stat().st_size for name in self.weights)


def open_model(path: Path, name: str = "") -> Model:
    """Return the model at a path; InputRefused where there is none or it is not safe to read."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputRefused(f"{path}: a model file is a .gguf", hint="or name a folder")
        return Model(
            path=path, name=name or path.stem, config=gguf_config(path), weights=(path.name,)
        )
    if not path.is_dir():
        raise InputRefused(f"{path} does not exist", hint="give the model's folder or .gguf file")
    names = scan(path)
    weights = tuple(n for n in names if n.endswith((".gguf", ".safetensors")))
    if not weights:
        raise InputRefused(f"{path}: no .safetensors or .gguf file in it")
    config = model_config(path) if "config.json" in names else gguf_config(path / weights[0])
    return Model(path=path, name=name or path.absolute().name, config=config, weights=weights)


def serving_config(model: Model, target: Target, wishes: Wishes, image: str = "") -> ServingConfig:
    """Plan and render a target for a model; raises UsageError where it does not fit."""
    own = own_weights(model, target)
    size = model.weight_bytes
    if not own:
        size = estimated_bytes(model.weight_bytes, target.format, model.config)
    return render(
        target=target,
        name=model.name,
        version="0",
        model_config=model.config,
        model_file=own[0] if len(own) == 1 and target.format.suffix == ".gguf" else "",
        weight_bytes=size,
        wishes=wishes,
        image=image,
        made_from=(),
    )


def own_weights(model: Model, target: Target) -> tuple[str, ...]:
    """Return the files that are in the target's format already; () where it is yet to be made.

    Raises InputRefused for a model that cannot become it: a GGUF file for an engine that loads
    none, a checkpoint that is packed in another way.
    """
    suffix = target.format.suffix
    own = tuple(name for name in model.weights if name.endswith(suffix))
    if suffix == ".gguf":
        return own
    if not own:
        raise InputRefused(
            f"{model.path} is GGUF, which {target.engine.name} does not load",
            hint="GGUF files are for llamacpp targets; give the Hugging Face checkpoint",
        )
    kinds = weight_kinds(model.config)
    if target.format.kind in kinds:
        return own
    if "safetensors" not in kinds:
        packed = ", ".join(sorted(kinds)) or "in a way that no target serves"
        raise InputRefused(
            f"{model.path}: its weights are packed ({packed}), {target.name} serves"
            f" {target.format.name}",
            hint=f"choose {' or '.join(f'{target.engine.name}-{kind}' for kind in sorted(kinds))}"
            if kinds
            else "start from the 16-bit checkpoint",
        )
    return ()


def render_model(
    path: Path, target: str, name: str, wishes: Wishes, out: Path
) -> Mapping[str, Json]:
    """Write a target's serving files for a model; return their paths and the plan."""
    config = serving_config(open_model(path, name), find(target, all_targets()), wishes)
    text = json.dumps(plain(config), indent=2, sort_keys=True) + "\n"
    files = {**config.files, _CONFIG: text}
    write_files(files, out)
    return {"files": [str(out / name) for name in sorted(files)], "plan": config.plan}


@dataclass(frozen=True, slots=True, kw_only=True)
class BakeRequest:
    """What `invoke bake` is asked."""

    model: Path
    target: str
    config: Path | None
    name: str
    base_image: str
    order: str
    kind: str
    push: str
    load: str
    layout: Path | None
    force: bool


def bake_model(request: BakeRequest, registry: Registry, tools: Tools) -> Mapping[str, Json]:
    """Assemble a model's image and bring it where it is asked for; starts nothing."""
    began = time.monotonic()
    _check(request)
    if request.push:
        registry.check_push(Reference.parse(request.push))
    target = find(request.target, all_targets())
    model = open_model(request.model, request.name)
    place = request.push or request.load or f"{model.name}:latest"
    config = (
        _read_config(request.config)
        if request.config
        else serving_config(model, target, Wishes(), place)
    )
    artifact = _artifact(model, target, tools.store)
    wanted = base_reference(target.engine, str(config.plan["device"]), request.base_image)
    image = bake(
        artifact,
        config,
        base=base_image(wanted, target.engine.name, registry, tools),
        labels={
            "org.opencontainers.image.title": model.name,
            "dev.weightsmith.target": target.name,
            "dev.weightsmith.format": target.format.name,
            "dev.weightsmith.artifact.digest": artifact.digest,
            "dev.weightsmith.plan": json.dumps(portable(config.plan), sort_keys=True),
        },
        store=tools.store,
        model_dir=target.engine.model_dir,
        order="weights-first" if request.order == "weights-first" else "engine-first",
    )
    tools.progress.stage("publish", place)
    published = publish(image, place, _outputs(request, push=bool(request.push)), registry, tools)
    if request.push and request.load and request.load != request.push:
        publish(image, request.load, Outputs(load=True), registry, tools)
    seconds = round(time.monotonic() - began, 3)
    tools.progress.finish("publish", seconds, cached=False)
    return {**plain(published), "seconds": seconds}


def _check(request: BakeRequest) -> None:
    if not (request.push or request.load or request.layout):
        required(**{"push (or --load, --layout)": ""})
    if request.order not in ("engine-first", "weights-first"):
        raise UsageError(
            f"--order {request.order}: unknown", hint="one of engine-first, weights-first"
        )
    if request.kind != "image":
        raise UsageError(f"--kind {request.kind}: not there yet", hint="use --kind image")


def _outputs(request: BakeRequest, *, push: bool) -> Outputs:
    same = not push or request.load == request.push
    return Outputs(
        load=bool(request.load) and same, layout=request.layout, push=push, force=request.force
    )


def _artifact(model: Model, target: Target, store: Store) -> Artifact:
    """Return the files that go into the image; InputRefused where they are of another format."""
    if not own_weights(model, target):
        raise InputRefused(
            f"{model.path}: no {target.format.name} weights, which {target.name} serves",
            hint=f"run `invoke quantize --format {target.format.name}` first",
        )
    names = scan(model.root) if model.path.is_dir() else [model.path.name]
    files = []
    for name in names:
        entry = store.digest_file(model.root / name)
        files.append(FileEntry(path=name, size=entry.size, digest=entry.digest))
    return Artifact(
        format=target.format, tree=Tree(root=model.root, files=tuple(files)), made_from=()
    )


def _read_config(folder: Path) -> ServingConfig:
    path = folder / _CONFIG
    try:
        data = json.loads(path.read_text("utf-8"))
        for name in ("entrypoint", "command", "healthcheck", "made_from"):
            data[name] = tuple(data[name])
        return ServingConfig(**data)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist", hint="make it with `invoke render`") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputRefused(f"{path} is damaged: {error}", hint="render the folder again") from None
