"""Checkpoint + Artifact -> how much was lost: held-out text through both, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from weightsmith.quantizers import of_format
from weightsmith.quantizers.calibration import Texts
from weightsmith.resources import builder_pins
from weightsmith.time_limits import job_seconds
from weightsmith.tools import Tools
from weightsmith.values import Artifact, Checkpoint, Digest, Job, Json, StageInputs

BUILDER = "merge"
RECIPE_NUMBER = 2
_MEMORY_BYTES = 8 << 30
"""Limit of the container beside the weights."""
_TOKEN_BYTES = 4 << 20
"""For a token's logits, of both sides and while they are compared, in a large vocabulary."""
_RESULT = "quality.json"


def inputs(checkpoint: Digest, artifact: Digest, texts: Texts, tokens: int) -> StageInputs:
    """Return all that a measured quality depends on; limits are applied to it afterwards."""
    return StageInputs(
        stage="quality",
        recipe_number=RECIPE_NUMBER,
        inputs={
            "checkpoint": checkpoint,
            "artifact": artifact,
            "texts": texts.held_out_digest,
            "tokens": tokens,
            "builder": builder_pins(BUILDER),
        },
    )


def quality(
    checkpoint: Checkpoint, artifact: Artifact, texts: Texts, tokens: int, tools: Tools
) -> Mapping[str, Json]:
    """Return what `weightsmith.quality.measure` finds, measured once per artifact and text.

    Empty for the merged checkpoint itself; `skipped` says why where an architecture cannot be
    measured. Raises CheckFailed for weights that are no numbers.
    """
    if not artifact.format.packed:
        return {}
    stage = inputs(checkpoint.digest, artifact.digest, texts, tokens)
    entry = tools.store.find(stage.key) or tools.store.produce(
        stage.key,
        {"stage": "quality", "inputs": stage.inputs},
        lambda folder: _run(folder, checkpoint.tree.root, artifact, texts, tokens, tools),
    )
    found = json.loads(entry.tree.path(_RESULT).read_text("utf-8"))
    return {**found, "cached": entry.cached}


def _run(
    folder: Path, model: Path, artifact: Artifact, texts: Texts, tokens: int, tools: Tools
) -> Mapping[str, Json]:
    found = measured(folder, model, artifact.tree.root, artifact.format.name, texts, tokens, tools)
    (folder / _RESULT).write_text(json.dumps(found), "utf-8")
    return {}


def measured(
    folder: Path,
    model: Path,
    artifact: Path,
    format_name: str,
    texts: Texts,
    tokens: int,
    tools: Tools,
) -> Mapping[str, Json]:
    """Measure a file or folder in its builder; `folder` is an empty one for the job."""
    quantizer = of_format(format_name)
    if quantizer.view is None:
        return {"skipped": f"{quantizer.name} has no view for the quality gate"}
    tools.runner.prepare(BUILDER, tools.progress)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    job = Job(
        stage="quality",
        builder=BUILDER,
        inputs={"model": model, "artifact": artifact},
        parameters={
            "quantizer": quantizer.name,
            "texts": [dict(row) for row in texts.held_out],
            "tokens": tokens,
        },
        output=folder,
        # The gate holds a layer in float32; a text or a template of the model's may ask for more.
        memory_bytes=_MEMORY_BYTES + 2 * size + tokens * _TOKEN_BYTES,
        seconds=job_seconds(size, tokens=tokens),
        use_gpu=False,
    )
    return tools.runner.run(job, tools.progress)
