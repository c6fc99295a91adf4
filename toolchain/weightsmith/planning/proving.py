"""Whether reference answers and validation run as one job."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from weightsmith.checkpoints.facts import read_facts
from weightsmith.destinations import InStore
from weightsmith.planning.memory import fit_together
from weightsmith.planning.request import BuildRequest
from weightsmith.planning.tasks import tasks_of
from weightsmith.stages.reference import keep_answers, next_job
from weightsmith.together import Together
from weightsmith.tools import Tools
from weightsmith.values import Checkpoint, Sources


def proving(request: BuildRequest, sources: Sources, checkpoint: Checkpoint, tools: Tools) -> Tools:
    """Return the tools for both stages: validation also answers, if questions are unanswered.

    Only if one job may use the memory of both.
    """
    tasks, store = tasks_of(request.file), InStore(tools.store)
    first = partial(next_job, tasks, sources, checkpoint, store, tools)
    model = read_facts(sources.base.tree.root)
    if first() is None or not fit_together(model, sources, tasks, tools.memory):
        return tools
    keep = partial(keep_answers, tasks, sources, checkpoint, store)
    together = Together(tools.runner, first, keep, tools.clock)
    return replace(tools, runner=together, clock=together.time)
