"""Checkpoint -> Artifact: the merged weights in the format that a target loads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from weightsmith.errors import InputRefused
from weightsmith.foreign import read_json
from weightsmith.ports import Entry
from weightsmith.quantizers import of_format
from weightsmith.quantizers.calibration import Texts
from weightsmith.quantizers.quantizer import Quantizer
from weightsmith.resources import builder_pins
from weightsmith.serving.model import ModelShape
from weightsmith.time_limits import GGUF_PER_GB, PACKING_PER_GB, job_seconds
from weightsmith.tools import Tools
from weightsmith.values import (
    SAFETENSORS,
    Artifact,
    Checkpoint,
    Digest,
    Format,
    Job,
    Json,
    StageInputs,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """One artifact as the user wants it; `options` are those that its format takes."""

    name: str
    """The model's name; in the file's metadata."""
    format: Format
    options: Mapping[str, Json] = field(default_factory=dict)
    texts: Texts | None = None
    """Calibration text; None where the format measures nothing."""
    statistics: Path | None = None
    """What was measured elsewhere, such as the user's importance matrix."""


def inputs(checkpoint: Digest, wanted: QuantizeOptions) -> StageInputs:
    """Return all that the quantized artifact depends on."""
    quantizer = of_format(wanted.format.name)
    return StageInputs(
        stage="quantize",
        recipe_number=quantizer.recipe_number,
        inputs={
            "checkpoint": checkpoint,
            "quantizer": quantizer.name,
            "format": wanted.format.name,
            "name": wanted.name,
            "options": dict(wanted.options),
            "calibration": wanted.texts.calibration_digest if wanted.texts else "",
            "builder": builder_pins(quantizer.builder),
        },
    )


def statistics_inputs(checkpoint: Digest, texts: Texts, quantizer: Quantizer) -> StageInputs:
    """Return what calibration's measurement depends on: the same for all formats of one family."""
    return StageInputs(
        stage="statistics",
        recipe_number=quantizer.recipe_number,
        inputs={
            "checkpoint": checkpoint,
            "quantizer": quantizer.name,
            "calibration": texts.calibration_digest,
            "builder": builder_pins(quantizer.builder),
        },
    )


def quantize(checkpoint: Checkpoint, wanted: QuantizeOptions, tools: Tools) -> Artifact:
    """Return the checkpoint in a format, quantized in its builder and read back.

    Raises InputRefused for a model that the quantizer cannot read, CheckFailed for an output
    that is not what was asked.
    """
    format_ = wanted.format
    if format_ == SAFETENSORS:
        return Artifact(format=format_, tree=checkpoint.tree, made_from=(checkpoint.digest,))
    stage = inputs(checkpoint.digest, wanted)
    entry = tools.store.find(stage.key)
    if entry is None:
        entry = tools.store.produce(
            stage.key,
            {"stage": "quantize", "inputs": stage.inputs},
            lambda folder: _run(folder, checkpoint, wanted, tools),
            resume=True,
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


def serving_config_of(tree_root: Path) -> Mapping[str, Json]:
    """Return config.json, and under `tokenizer` what the tokenizer's own file says of serving.

    Raises InputRefused where config.json is not JSON.
    """
    config = model_config(tree_root)
    try:
        tokenizer = read_json(tree_root / "tokenizer_config.json")
    except InputRefused:
        return config
    names = ("tokenizer_class", "model_max_length")
    return {**config, "tokenizer": {k: tokenizer[k] for k in names if k in tokenizer}}


def model_config(tree_root: Path) -> Mapping[str, Json]:
    """Return a checkpoint's config.json; InputRefused where it is not JSON."""
    return read_json(tree_root / "config.json")


def kept_bytes(checkpoint_bytes: int, format_: Format, config: Mapping[str, Json] | None) -> int:
    """Return the bytes that stay in 16 bits in a packed checkpoint: embeddings, and the head."""
    if not config or format_.suffix == ".gguf":
        return 0
    shape = ModelShape.from_config(config)
    tables = 1 if config.get("tie_word_embeddings") else 2
    return min(checkpoint_bytes, tables * 2 * shape.vocab * shape.hidden)


def _run(
    folder: Path, checkpoint: Checkpoint, wanted: QuantizeOptions, tools: Tools
) -> Mapping[str, Json]:
    quantizer = of_format(wanted.format.name)
    packed = wanted.format.suffix != ".gguf"
    config = model_config(checkpoint.tree.root) if packed else None
    kept = kept_bytes(checkpoint.tree.size, wanted.format, config)
    peak = quantizer.peak_disk(checkpoint.tree.size, kept, wanted.format)
    tools.store.require_room(peak, f"quantizing to {wanted.format.name}")
    known = None
    if wanted.texts and quantizer.statistics:
        known = statistics_inputs(checkpoint.digest, wanted.texts, quantizer)
        if entry := tools.store.find(known.key):
            wanted = replace(wanted, statistics=entry.tree.path(quantizer.statistics))
    tools.runner.prepare(quantizer.builder, tools.progress)
    job = job_of(checkpoint.tree.root, checkpoint.tree.size, wanted, folder)
    result = tools.runner.run(job, tools.progress)
    if quantizer.statistics:
        _keep_statistics(folder / quantizer.statistics, known, tools)
    return result


def job_of(model: Path, size: int, wanted: QuantizeOptions, folder: Path) -> Job:
    """Return the job that quantizes a checkpoint of `size` bytes into a folder."""
    quantizer = of_format(wanted.format.name)
    given = {"statistics": wanted.statistics} if wanted.statistics else {}
    texts = [dict(row) for row in wanted.texts.calibration] if wanted.texts else []
    per_gb = GGUF_PER_GB if wanted.format.suffix == ".gguf" else PACKING_PER_GB
    return Job(
        stage="quantize",
        builder=quantizer.builder,
        inputs={"model": model, **given},
        parameters={
            "quantizer": quantizer.name,
            "format": wanted.format.name,
            "name": wanted.name,
            "options": dict(wanted.options),
            "texts": texts,
        },
        output=folder,
        memory_bytes=(4 << 30) + 2 * size,
        seconds=job_seconds(size, per_gb=per_gb, tokens=sum(len(str(row)) for row in texts)),
    )


def _keep_statistics(measured: Path, stage: StageInputs | None, tools: Tools) -> None:
    """Move what calibration measured into the store, for the next format of this checkpoint."""
    if stage is not None and measured.is_file():
        tools.store.produce(
            stage.key,
            {"stage": "statistics", "inputs": stage.inputs},
            lambda folder: _copied(measured, folder),
        )
    measured.unlink(missing_ok=True)


def _copied(file: Path, folder: Path) -> Mapping[str, Json]:
    shutil.copyfile(file, folder / file.name)
    return {}
