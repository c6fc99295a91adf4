"""Sources, Artifact -> Artifact: with the weights of what drafts beside the model's.

A stage of its own, because what drafts changes no other result: neither merge nor quantizing nor
the model's layers in the image, and the draft is the same in all images that have it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from weightsmith.core.errors import InputRefused
from weightsmith.core.values import Artifact, Checkpoint, Digest, Snapshot, Sources, key_of, plain
from weightsmith.steps.drafting import beside, check_draft
from weightsmith.steps.stage_result import StageResult, unrecorded
from weightsmith.steps.step import (
    Foreseen,
    ForeseenWeights,
    Foresight,
    Results,
    Step,
    TargetStep,
)
from weightsmith.steps.thin import THIN
from weightsmith.steps.tools import Tools


def _draft(sources: Sources) -> Snapshot:
    if sources.draft is None:
        raise AssertionError("a recipe with a draft has its source")
    return sources.draft


@dataclass(frozen=True, eq=False, kw_only=True)
class DraftAloneStep(TargetStep[Sources, Sources]):
    """What drafts, as sources of its own."""

    name = "draft-alone"

    sources: Step[Sources, Sources]

    @cached_property
    def derivation(self) -> Digest:
        """What tells drafts apart: a fleet makes one for all recipes that have it."""
        draft = self.file.recipe.draft
        return key_of([self.name, plain(draft.model_dump() if draft else None)])

    def foresee(self, seen: Foresight) -> Foreseen[Sources]:
        """Return it."""
        return Foreseen(value=Sources(base=_draft(seen[self.sources])))

    def run(self, have: Results, _tools: Tools) -> StageResult[Sources]:
        """Return it."""
        return unrecorded(Sources(base=_draft(have[self.sources])))


@dataclass(frozen=True, eq=False, kw_only=True)
class BesideStep(TargetStep[Artifact, ForeseenWeights]):
    """Puts the weights of what drafts beside the model's."""

    name = "draft-beside"

    sources: Step[Sources, Sources]
    checkpoint: Step[Checkpoint, ForeseenWeights]
    weights: Step[Artifact, ForeseenWeights]
    draft: Step[Artifact, ForeseenWeights]

    def foresee(self, seen: Foresight) -> Foreseen[ForeseenWeights]:
        """Return the model's weights; the draft's are planned where it is served.

        Refuses a draft of another vocabulary, a larger one, and forms that have no room for one.
        """
        sources, wanted = seen[self.sources], self.file.recipe.serve.speculative
        if self.of.target.format.unmerged or THIN in self.file.recipe.outputs.kinds:
            raise InputRefused(
                f"{self.target}: a draft beside "
                + ("unmerged adapters" if self.of.target.format.unmerged else "a thin image")
                + " is not planned here",
                hint="merge the adapters into an image, or choose method ngram or mtp",
            )
        if wanted:
            size = seen[self.checkpoint].weight_bytes
            check_draft(wanted, _draft(sources), sources.base.tree, size)
        self.draft.permit(seen)
        return Foreseen(value=seen[self.weights])

    def run(self, have: Results, _tools: Tools) -> StageResult[Artifact]:
        """Return both; refuses a model whose adapters brought another vocabulary."""
        checkpoint, wanted = have[self.checkpoint], self.file.recipe.serve.speculative
        if wanted:
            size = checkpoint.tree.weight_bytes
            check_draft(wanted, _draft(have[self.sources]), checkpoint.tree, size)
        return unrecorded(beside(have[self.weights], have[self.draft]))
