"""Checkpoint -> Artifact: the merged weights in the format that a target loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from toolchain.errors import InputRefused
from toolchain.ports import Entry, Tools
from toolchain.quantizers import of_format
from toolchain.resources import builder_pins
from toolchain.values import (
    SAFETENSORS,
    Artifact,
    Checkpoint,
    Digest,
    Format,
    Job,
    Json,
    StageInputs,
)


def inputs(
    checkpoint: Digest, name: str, format_: Format, options: Mapping[str, Json]
) -> StageInputs:
    """Return all that the quantized artifact depends on; `name` is in the file's metadata."""
    quantizer = of_format(format_.name)
    return StageInputs(
        stage="quantize",
        recipe_number=quantizer.recipe_number,
        inputs={
            "checkpoint": checkpoint,
            "quantizer": quantizer.name,
            "format": format_.name,
            "name": name,
            "options": dict(options),
            "builder": builder_pins(quantizer.builder),
        },
    )


def quantize(
    checkpoint: Checkpoint, name: str, format_: Format, options: Mapping[str, Json], tools: Tools
) -> Artifact:
    """Return the checkpoint in a format, quantized in its builder and read back.

    Raises InputRefused for a model that the quantizer cannot read, CheckFailed for an output
    that is not what was asked.
    """
    if format_ == SAFETENSORS:
        return Artifact(format=format_, tree=checkpoint.tree, made_from=(checkpoint.digest,))
    stage = inputs(checkpoint.digest, name, format_, options)
    entry = tools.store.find(stage.key)
    if entry is None:
        entry = tools.store.produce(
            stage.key,
            {"stage": "quantize", "inputs": stage.inputs},
            lambda folder: _run(folder, checkpoint, name, format_, options, tools),
        )
    return found(checkpoint.digest, format_, entry)


def found(checkpoint: Digest, format_: Format, entry: Entry) -> Artifact:
    """Return the artifact that a store entry holds."""
    return Artifact(
        format=format_,
        tree=entry.tree,
        made_from=(checkpoint,),
        details={**entry.meta, "cached": entry.cached},
    )


def model_config(tree_root: Path) -> Mapping[str, Json]:
    """Return a checkpoint's config.json; InputRefused where it is not JSON."""
    path = tree_root / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputRefused(f"{path}: not readable JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputRefused(f"{path}: a model configuration is a JSON object")
    return config


def _run(
    folder: Path,
    checkpoint: Checkpoint,
    name: str,
    format_: Format,
    options: Mapping[str, Json],
    tools: Tools,
) -> Mapping[str, Json]:
    quantizer = of_format(format_.name)
    peak = quantizer.peak_disk(checkpoint.tree.size, format_)
    tools.store.require_room(peak, f"quantizing to {format_.name}")
    tools.runner.prepare(quantizer.builder, tools.progress)
    return tools.runner.run(
        Job(
            stage="quantize",
            builder=quantizer.builder,
            inputs={"model": checkpoint.tree.root},
            parameters={
                "quantizer": quantizer.name,
                "format": format_.name,
                "name": name,
                "options": dict(options),
            },
            output=folder,
            memory_bytes=(4 << 30) + 2 * checkpoint.tree.size,
        ),
        tools.progress,
    )
