"""Measures how long one layer of a model takes on this machine."""

from __future__ import annotations

from weightsmith.core.job_inputs import Input
from weightsmith.core.jobs import LayerTimeJob
from weightsmith.core.time_limits import job_seconds
from weightsmith.core.values import Sources
from weightsmith.forward.measured_layer import LayerTime
from weightsmith.steps.tools import Tools

_COUNTS = (8, 256)
"""Tokens in one pass: a step of a few answers, and texts that are read."""
_BUILDER = "merge"


def measured_layer_time(sources: Sources, tools: Tools) -> LayerTime:
    """Run the job that measures a layer of the base's shapes on this machine."""
    base = sources.base.tree
    tools.runner.prepare(_BUILDER, tools.progress)
    with tools.scratch() as folder:
        job = LayerTimeJob(
            builder=_BUILDER,
            model=Input.tree(base),
            counts=_COUNTS,
            output=folder,
            memory_bytes=(4 << 30) + base.weight_bytes // 4,
            seconds=job_seconds(base.weight_bytes),
            use_gpu=True,
        )
        return LayerTime.from_json(tools.runner.run(job, tools.progress))
