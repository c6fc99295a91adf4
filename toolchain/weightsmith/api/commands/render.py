"""`render`: plan a model on disk and write its serving files."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from weightsmith.api.commands.requests import RenderCommand
from weightsmith.building.targets import all_targets, can_make, target_of
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.safe_parse import parse_file
from weightsmith.core.values import SAFETENSORS
from weightsmith.models.facts import ModelFacts, read_facts
from weightsmith.models.folder import check_templates, no_folder, scan
from weightsmith.models.gguf_config import (
    check_gguf_templates,
    files_with,
    gguf_models,
    model_name,
    parts_of,
    projector_of,
)
from weightsmith.quantizers import of_format
from weightsmith.quantizers.checkpoints import inputs_per_scale
from weightsmith.recipe.file import check_section, with_settings
from weightsmith.recipe.schema import Serve
from weightsmith.serving.engine import Projector, ServeOptions
from weightsmith.serving.plan import ServingConfig, ServingPlan
from weightsmith.serving.targets import Target
from weightsmith.stages.render import render
from weightsmith.steps.destinations import write_files
from weightsmith.steps.serve_options import serve_options
from weightsmith.steps.sizes import estimated_bytes, expected_projector, expected_weights

_CONFIG = "serving.json"
"""The file with everything that `bake` needs from a rendered folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model on disk: a folder, or one GGUF file."""

    path: Path
    name: str
    facts: ModelFacts
    weights: tuple[str, ...]
    """The files that hold weights, relative to `root`."""
    weight_bytes: int
    """Size of all weight files, in bytes."""
    projector: Projector | None = None
    """The weight file that lets it read pictures."""
    notes: tuple[str, ...] = ()
    """Assumptions about the model, shown to the user."""

    @property
    def root(self) -> Path:
        """The folder that contains the model's files."""
        return self.path if self.path.is_dir() else self.path.parent


def open_model(path: Path, name: str = "") -> Model:
    """Return the model at a path; raise InputRefused if there is none or it is not safe to read."""
    root, of_files = path, "config.json"
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputRefused(
                f"{path} is not a .gguf file", hint="give a .gguf file or the model's folder"
            )
        weights, root = files_with(path), path.parent
        of_files, name = weights[0], name or model_name(path.name)
    elif not path.is_dir():
        raise no_folder(path, "give the model's folder or .gguf file")
    else:
        names = scan(path, gguf=True)
        check_templates(path, names)
        weights = tuple(n for n in names if n.endswith((".gguf", ".safetensors")))
        if not weights:
            raise InputRefused(
                f"{path} has no .safetensors or .gguf file",
                hint="give the folder that contains the weights",
            )
        if "config.json" not in names:
            if not (models := gguf_models(weights)):
                raise InputRefused(
                    f"{path} has {weights[0]}, but no config.json",
                    hint="give the folder that has both; in the hub's cache, that is"
                    " snapshots/COMMIT",
                )
            of_files = models[0]
    for file in gguf_models(weights):
        check_gguf_templates(root / file)
    sizes = {file: (root / file).stat().st_size for file in weights}
    projector = projector_of(weights)
    return Model(
        path=path,
        name=name or path.absolute().name,
        facts=read_facts(root if of_files == "config.json" else root / of_files),
        weights=weights,
        weight_bytes=sum(sizes.values()),
        projector=Projector(file=projector, size=sizes[projector]) if projector else None,
    )


def foresee_model(path: Path, name: str = "") -> Model:
    """Return the model at a path, or a forecast of it if only its config.json is there.

    The size then comes from the index, or from config.json; raises what `open_model` raises.
    """
    names = scan(path, gguf=True) if path.is_dir() else []
    if "config.json" not in names or any(n.endswith((".gguf", ".safetensors")) for n in names):
        return open_model(path, name)
    check_templates(path, names)
    facts = read_facts(path)
    size, note = expected_weights(path, facts)
    return Model(
        path=path,
        name=name or path.absolute().name,
        facts=facts,
        weights=("model.safetensors",),
        weight_bytes=size,
        notes=(note,),
    )


def serving_config(
    model: Model, target: Target, options: ServeOptions, image: str = ""
) -> ServingConfig:
    """Plan and render a target for a model; raises UsageError if it does not fit the memory."""
    if target.format.unmerged:
        raise UsageError(
            f"{target.name} serves adapters beside a base, and this is a model without any",
            hint=f"name them in a recipe, and run `invoke plan --target {target.name}`",
        )
    size, projector = model.weight_bytes, model.projector
    if not own_weights(model, target):
        if can_make(target.format):
            of_format(target.format.name).check_input(target.format, model.facts)
            group = inputs_per_scale(target.format, model.facts, "auto")
            options = replace(options, group_size=group)
        size = estimated_bytes(model.weight_bytes, target.format, model.facts)
        projector = expected_projector(target, model.facts)
    return render(
        target=target,
        name=model.name,
        version="0",
        model=model.facts,
        model_file=served_file(model, target),
        weight_bytes=size,
        options=options,
        image=image,
        made_from=(),
        projector=projector,
        notes=model.notes,
    )


def served_file(model: Model, target: Target) -> str:
    """Return the file that the server opens: the GGUF file, or the first of its parts.

    "" for engines that open a folder, and for a checkpoint that is not GGUF yet. Raises
    InputRefused for a folder with several models.
    """
    found = gguf_models(model.weights)
    if target.format.suffix != ".gguf" or not found:
        return ""
    parts = parts_of(found[0])
    if set(found) != set(parts):
        raise InputRefused(
            f"the GGUF files of {model.path} are not all the parts of one model:"
            f" {', '.join(found[:3])}",
            hint="give the .gguf file itself; of parts, all must be there",
        )
    return parts[0]


def own_weights(model: Model, target: Target) -> tuple[str, ...]:
    """Return the files that already have the target's format; () if they must be quantized first.

    Raises InputRefused for a model that cannot be converted: a GGUF file for an engine that does
    not load GGUF, or a checkpoint packed in another format.
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
    kinds, packing = model.facts.weight_kinds, model.facts.packing
    if packing and packing.method == "compressed-tensors" and not target.engine.layouts:
        kinds -= {"awq", "gptq"}  # integers of four bits, in a layout that this engine lacks
    if target.format == SAFETENSORS or target.format.kind in kinds:  # an engine detects packing
        return own
    if "safetensors" not in kinds:
        packed = ", ".join(sorted(kinds)) or "in an unsupported format"
        served: dict[str, list[str]] = {}
        for other in all_targets().values():
            if other.engine == target.engine and other.format.kind in kinds:
                served.setdefault(other.format.kind, []).append(other.name)
        raise InputRefused(
            f"{model.path} has packed weights ({packed}), but {target.name} serves"
            f" {target.format.name}",
            hint=f"choose {' or '.join(sorted(min(names, key=len) for names in served.values()))}"
            if served
            else "start from the 16-bit checkpoint",
        )
    return ()


def render_folder(asked: RenderCommand) -> tuple[tuple[str, ...], ServingPlan]:
    """Write the serving files that a command asks for; return their paths and the plan.

    Options are those of `--set serve.KEY=VALUE` and, on top, flags that are not at their default.
    """
    data = with_settings({"serve": {}}, asked.settings)
    if extra := sorted(set(data) - {"serve"}):
        raise UsageError(
            f"--set {extra[0]}: only serve.KEY can be set here",
            hint="other recipe keys are for `build` and `plan`",
        )
    if not isinstance(data["serve"], dict):
        raise UsageError(
            "--set serve=…: serve is a mapping of keys", hint="as in --set serve.max_num_seqs=4"
        )
    serve = {**data["serve"], **asked.serve.model_dump(exclude_defaults=True)}
    options = serve_options(check_section(Serve, serve, "the command line"))
    model = foresee_model(asked.model, asked.name)
    config = serving_config(model, target_of(asked.target), options)
    text = json.dumps(config.to_json(), indent=2, sort_keys=True) + "\n"
    files = {**config.files, _CONFIG: text}
    write_files(files, asked.out)
    return tuple(str(asked.out / name) for name in sorted(files)), config.plan


def read_config(folder: Path) -> ServingConfig:
    """Return what `render` wrote to a folder; raises UsageError or InputRefused."""
    path = folder / _CONFIG
    try:
        return ServingConfig.from_json(parse_file(path))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist", hint="make it with `invoke render`") from None
    except (OSError, ValueError) as error:
        raise InputRefused(f"{path} is damaged: {error}", hint="render the folder again") from None
