"""What a build asks of whom, and how it was answered and judged."""

from __future__ import annotations

from dataclasses import dataclass

from weightsmith.evaluating.gate import DropLimit
from weightsmith.evaluating.task import Task
from weightsmith.recipe import Evaluate


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeTask:
    """One task of a build, whose adapters it is held against, and what may be lost."""

    task: Task
    wanted: Evaluate
    adapter: int | None = None
    """Number of the one adapter whose own task it is; None for all of them together."""

    @property
    def limit(self) -> DropLimit:
        """What the merged model and the image may lose."""
        return DropLimit(
            max_drop=self.wanted.max_drop,
            min_score=self.wanted.min_score,
            proven=self.wanted.certainty == "proven",
        )
