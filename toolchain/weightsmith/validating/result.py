"""Results of a validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from weightsmith.core.json_objects import INLINE, JsonObject, Measured
from weightsmith.core.values import Json
from weightsmith.validating.findings import ERROR, WARNING, Finding


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance(JsonObject):
    """Distance of two sets of logits over all positions."""

    max_abs: Measured
    mean_abs: Measured
    rms: Measured
    kl_mean: Measured
    """Kullback-Leibler divergence from the reference, in nats."""
    kl_max: Measured
    top1: Measured
    """Fraction of positions with the same most likely token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitLimits(JsonObject):
    """How far a merge may be from the exact one: as far as rounding moves the reference."""

    rms: Measured
    max_abs: Measured
    kl_mean: Measured
    kl_max: Measured


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDifference(JsonObject):
    """Distance of the hidden states after a decoder layer, relative to the reference's norm."""

    layer: int
    difference: float
    """Of the merged model from base and adapters."""
    rounding: float
    """Of the exact merge, rounded once, from base and adapters."""
    off: float = 0.0
    """Of the merged model from the exact merge: only arithmetic error if the merge is right."""
    parted: bool
    """Whether rounding does not explain it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ElementCount(JsonObject):
    """Numbers of compared tensors and elements, and of wrong elements."""

    tensors: int
    elements: int
    wrong: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyText(JsonObject):
    """Both sides' continuation of a probe."""

    after: str
    """The end of the probe."""
    reference: str
    """Up to its first token that differs."""
    merged: str
    tokens: int
    same: int
    """Number of equal tokens before the first that differs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison(JsonObject):
    """Measures of both models, if both ran."""

    limits: LogitLimits | None = None
    rounding: Distance | None = None
    """The exact merge, rounded once, against base and adapters."""
    from_exact: Distance | None = None
    """The merged model against the exact merge, rounded once."""
    first_difference: int | None = None
    """The first decoder layer whose difference rounding does not explain."""
    layers: tuple[LayerDifference, ...] = ()
    """In the model's order."""
    elements: ElementCount | None = None
    lost_to_rounding: float | None = None
    """Fraction of the adapters' effect that rounding removed; None if they have no effect."""
    probes: int = 0
    positions: int = 0
    streamed: bool = True
    """False if the architecture had to be loaded whole."""
    greedy: tuple[GreedyText, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation(JsonObject):
    """The result of a validation; measures are None if they were not taken."""

    max_abs_logit_diff: float | None = None
    mean_abs_logit_diff: float | None = None
    kl_mean: float | None = None
    """Mean Kullback-Leibler divergence per position, in nats."""
    kl_max: float | None = None
    top1_agreement: float | None = None
    """Fraction of positions with the same most likely next token."""
    comparison: Comparison | None = field(default=None, metadata=INLINE)
    """None if the models did not run."""
    passed: bool
    findings: tuple[Finding, ...]
    """Errors first, then warnings and notes."""
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    """Peak memory (resident set size) of the job's process."""

    @property
    def facts(self) -> Mapping[str, Json]:
        """All facts, as `weightsmith validate --json` prints them."""
        return self.to_json()

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that fail the validation."""
        return tuple(found for found in self.findings if found.severity == ERROR)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that may matter."""
        return tuple(found for found in self.findings if found.severity == WARNING)
