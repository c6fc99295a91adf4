"""The room that a plan leaves for weights, at a wanted length and number of requests.

The engine's own plan is asked, so there is no second set of rules.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from weightsmith.core.errors import UsageError
from weightsmith.models.facts import ModelFacts
from weightsmith.serving.auto import largest
from weightsmith.serving.devices import is_cpu
from weightsmith.serving.engine import Engine, ServeOptions
from weightsmith.serving.plan import ServingPlan

_STEP = 256
"""Tokens by which lengths are tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightRoom:
    """An engine that serves a model on GPUs, with weights of a size that is not known yet."""

    engine: Engine
    model: ModelFacts
    options: ServeOptions
    tokens: int
    """Of a request."""

    @classmethod
    def of(cls, engine: Engine, model: ModelFacts, options: ServeOptions) -> WeightRoom:
        """Return that of a recipe's `serve`; `auto` for the number of requests stands for one.

        Raises UsageError without a GPU or a length.
        """
        if not options.gpu_memory_bytes and (not options.gpu or is_cpu(options.gpu)):
            raise UsageError(
                "quantize.fit: gpu needs the GPU that the weights are to fit on",
                hint="set serve.gpu (such as nvidia-l4) or serve.gpu_memory; or give the budget as"
                " quantize.size",
            )
        if options.max_model_len is None:
            raise UsageError(
                "quantize.fit: gpu needs the length of a request, whose cache is taken off first",
                hint="set serve.max_model_len, and serve.max_num_seqs for more requests than one",
            )
        wanted = replace(
            options, max_num_seqs=options.max_num_seqs or 1, host_memory_bytes=0, adapters=()
        )
        return cls(engine=engine, model=model, options=wanted, tokens=options.max_model_len)

    @property
    def bytes(self) -> int:
        """The most bytes of weights, projector included, that fit as a whole; 0 if none do.

        Raises what the engine's plan raises for options that are wrong.
        """
        least = max(1, self.options.projector_bytes)
        smallest = self._plan(least, self.tokens)
        if smallest is None:
            return 0
        # A plan adds up sizes of any length, so what fits is tried.
        most = max(0, smallest.usable_bytes - least)
        return least + largest(lambda more: self._plan(least + more, self.tokens) is not None, most)

    def longest(self, size: int) -> int:
        """Return the longest request, up to the wanted one, beside weights of a size; 0: none."""
        steps = self.tokens // _STEP
        return _STEP * largest(lambda n: self._plan(size, n * _STEP) is not None, steps)

    def _plan(self, size: int, tokens: int) -> ServingPlan | None:
        try:
            plan = self.engine.plan(self.model, size, replace(self.options, max_model_len=tokens))
        except UsageError as error:
            if "plan" not in error.details:
                raise
            return None
        return plan if plan.fits else None
