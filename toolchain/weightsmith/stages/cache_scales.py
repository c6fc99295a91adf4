"""Artifact -> Artifact: with the scales of vLLM's 8-bit KV cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from weightsmith.checkpoints.safetensors import build_header
from weightsmith.destinations import Destination
from weightsmith.errors import InputRefused
from weightsmith.foreign import read_json
from weightsmith.job_inputs import Input, Virtual
from weightsmith.jobs import CacheScalesJob
from weightsmith.outcome import Outcome, Timer
from weightsmith.quantizers.calibration import Texts
from weightsmith.quantizers.checkpoints import with_cache_scheme
from weightsmith.resources import builder_pins
from weightsmith.time_limits import job_seconds
from weightsmith.tools import Tools
from weightsmith.values import (
    Artifact,
    Checkpoint,
    Digest,
    Json,
    StageInputs,
    Stream,
    Tree,
    canonical,
)

BUILDER = "merge"
FILE = "kv-cache-scales.safetensors"
"""The scales lie beside the weights, whose files and layers do not change."""

_INDEX = "model.safetensors.index.json"
_SCALES = "scales.json"
_MEASURING, _WRITING = 1, 1


def inputs(checkpoint: Digest, texts: Texts) -> StageInputs:
    """Return everything that the scales depend on; the same for all formats of a checkpoint."""
    return StageInputs(
        stage="cache-scales",
        recipe_number=_MEASURING,
        inputs={
            "checkpoint": checkpoint,
            "calibration": texts.calibration_digest,
            "builder": builder_pins(BUILDER),
        },
    )


def with_cache_scales(
    checkpoint: Checkpoint,
    artifact: Artifact,
    texts: Texts,
    to: Destination,
    tools: Tools,
    *,
    demanded: bool,
) -> Outcome[Artifact]:
    """Return the artifact with scales that are measured on the checkpoint it was made from.

    For texts or layers that cannot be measured, raises InputRefused if scales are `demanded`; else
    warns and returns the artifact as it is.
    """
    timer = Timer("cache-scales", artifact.format.name, tools)
    try:
        measured = to.document(
            lambda: inputs(checkpoint.digest, texts),
            _SCALES,
            lambda folder: _measured(folder, checkpoint, texts, tools),
        )
    except InputRefused as error:
        if demanded:
            raise
        tools.progress.warn(f"the fp8 cache has scale 1.0: {error.message}")
        return timer.done(artifact, cached=False)
    scales: Mapping[str, list[float]] = measured.value
    stage = _written(artifact.digest, scales)
    made = to.files(lambda: stage, partial(_write, artifact.tree, scales))
    tree = _ScaledTree(made.tree, artifact.tree)
    found = Artifact(format=artifact.format, tree=tree, details=artifact.details)
    return timer.done(found, cached=measured.cached and made.cached)


def stored(measured: Mapping[str, Json], weights: Tree, tools: Tools) -> Tree | None:
    """Return weights with scales from the store; None if it lacks them.

    `measured` are the inputs of the measurement, as a build's record has them.
    """
    stage = StageInputs(stage="cache-scales", recipe_number=_MEASURING, inputs=measured)
    if (found := tools.store.find(stage.key)) is None:
        return None
    scales = read_json(found.tree.path(_SCALES))
    beside = tools.store.find(_written(weights.digest, scales).key)
    return _ScaledTree(beside.tree, weights) if beside else None


def _written(artifact: Digest, scales: Mapping[str, Json]) -> StageInputs:
    """Return what an artifact with scales depends on."""
    return StageInputs(
        stage="cache-scales-written",
        recipe_number=_WRITING,
        inputs={"artifact": artifact, "scales": Digest.of(canonical(scales))},
    )


class _ScaledTree(Tree):
    """The files of one tree beside the weights of another, which are not fetched for that."""

    __slots__ = ("_beside", "_weights")
    _beside: Tree
    _weights: Tree

    def __init__(self, beside: Tree, weights: Tree) -> None:
        files = [*beside.files, *(one for one in weights.files if _is_weight(one.path))]
        object.__setattr__(self, "_beside", beside)
        object.__setattr__(self, "_weights", weights)
        object.__setattr__(self, "files", tuple(sorted(files, key=lambda one: one.path)))
        object.__setattr__(self, "places", {})

    def __repr__(self) -> str:
        return f"_ScaledTree({len(self.files)} files)"

    def _of(self, name: str) -> Tree:
        return self._beside if self._beside.has(name) else self._weights

    @property
    def root(self) -> Path:
        return self._beside.root

    @property
    def texts(self) -> Path:
        return self._beside.texts

    def path(self, name: str) -> Path:
        return self._of(name).path(name)

    def source(self, name: str) -> Path | Stream:
        return self._of(name).source(name)

    def header(self, name: str) -> Path:
        return self._of(name).header(name)

    def mode(self, name: str) -> int:
        return self._of(name).mode(name)


def _measured(folder: Path, checkpoint: Checkpoint, texts: Texts, tools: Tools) -> Json:
    tools.runner.prepare(BUILDER, tools.progress)
    size = checkpoint.tree.weight_bytes
    job = CacheScalesJob(
        builder=BUILDER,
        model=Input.checkpoint(checkpoint),
        virtual=Virtual.of(checkpoint),
        texts=texts.calibration,
        output=folder,
        memory_bytes=(4 << 30) + 2 * size,
        seconds=job_seconds(size, tokens=sum(len(str(row)) for row in texts.calibration)),
    )
    return tools.runner.run(job, tools.progress)["scales"]


def _is_weight(name: str) -> bool:
    return name.endswith(".safetensors")


def _write(tree: Tree, scales: Mapping[str, list[float]], folder: Path) -> Mapping[str, Json]:
    """Write the scales, and the small files: configuration and index name them."""
    import numpy as np

    for entry in tree.files:
        if not _is_weight(entry.path):
            place = folder / entry.path
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tree.path(entry.path), place)
    named = {
        f"{module}.{kind}_scale": value
        for module, pair in scales.items()
        for kind, value in zip("kv", pair, strict=True)
    }
    header = build_header(((name, "F32", (1,)) for name in sorted(named)), {"format": "pt"})
    data = np.array([named[name] for name in sorted(named)], "<f4").tobytes()
    (folder / FILE).write_bytes(header + data)
    config = read_json(folder / "config.json")
    _write_json(folder / "config.json", with_cache_scheme(config))
    if (folder / _INDEX).is_file():
        index = read_json(folder / _INDEX)
        index["weight_map"] = {**index["weight_map"], **dict.fromkeys(named, FILE)}
        about = index.get("metadata") or {}
        total = about.get("total_size", 0) + len(data)
        index["metadata"] = {**about, "total_size": total}
        _write_json(folder / _INDEX, index)
    return {}


def _write_json(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
