"""The models that answer a task before an image exists, and the keys of their answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weightsmith.core.resources import builder_pins
from weightsmith.core.values import (
    AdapterSnapshot,
    Checkpoint,
    Digest,
    JsonValue,
    Sources,
    StageInputs,
    Tree,
    VirtualWeights,
)
from weightsmith.evaluating.results import RecipeTask
from weightsmith.evaluating.task import Task
from weightsmith.models.tokenizer_files import TEMPLATE_FILES, TOKENIZER_FILES

BUILDER = "merge"
RECIPE_NUMBER = 6
_VOICE = frozenset((*TOKENIZER_FILES, *TEMPLATE_FILES))
"""Files that decide how a question becomes tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedModel:
    """A model to query: a checkpoint with unmerged adapters, each with its weight."""

    model: Tree
    adapters: tuple[AdapterSnapshot, ...] = ()
    weights: tuple[float, ...] | None = None
    """Weights that replace the adapters' own."""
    speakers: tuple[AdapterSnapshot, ...] = ()
    """Adapters whose tokenizer and chat template word the questions; none: its own."""
    computed: VirtualWeights | None = None
    """What computes the model's weights, if its files have none."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The model without its adapters."""
        return Checkpoint(tree=self.model, computed=self.computed)

    @property
    def factors(self) -> tuple[float, ...]:
        """One weight per adapter."""
        return self.weights or tuple(adapter.weight for adapter in self.adapters)


def subjects(sources: Sources, adapter: int | None) -> Mapping[str, EvaluatedModel]:
    """Return the models that answer a task before merging: `base`, and `adapter` if there is one.

    `adapter` is the number of the adapter that the task belongs to, used at full weight; None means
    all adapters together. All are asked alike: a tokenizer or chat template that an adapter brings
    words the base's questions too.
    """
    base = sources.base.tree
    if not sources.adapters:
        return {"base": EvaluatedModel(model=base)}
    used = sources.adapters if adapter is None else (sources.adapters[adapter],)
    speakers = used if any(_voice(one.snapshot.tree) - _voice(base) for one in used) else ()
    return {
        "base": EvaluatedModel(model=base, speakers=speakers),
        "adapter": EvaluatedModel(
            model=base, adapters=used, weights=None if adapter is None else (1.0,)
        ),
    }


def with_merged(
    task: RecipeTask, sources: Sources, checkpoint: Checkpoint
) -> Mapping[str, EvaluatedModel]:
    """Return the same for a task of a recipe, and `merged`, if anything was merged."""
    found = dict(subjects(sources, task.adapter))
    if checkpoint.digest != sources.base.digest:
        found["merged"] = EvaluatedModel(model=checkpoint.tree, computed=checkpoint.computed)
    return found


def _voice(tree: Tree) -> frozenset[tuple[str, Digest]]:
    return frozenset((file.path, file.digest) for file in tree.files if file.path in _VOICE)


def inputs(subject: EvaluatedModel, task: Task) -> StageInputs:
    """Return everything that the reference answers depend on."""
    voices: list[JsonValue] = [sorted(_voice(a.snapshot.tree)) for a in subject.speakers]
    return StageInputs(
        stage="reference",
        recipe_number=RECIPE_NUMBER,
        inputs={
            "base": subject.model.digest,
            "adapters": [a.snapshot.digest for a in subject.adapters],
            "weights": subject.factors,
            "questions": task.digest,
            "max_tokens": task.max_tokens,
            "builder": builder_pins(BUILDER),
            **({"speakers": voices} if voices else {}),
        },
    )
