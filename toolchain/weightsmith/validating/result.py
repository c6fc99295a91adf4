"""Results of a validation: findings, one sentence each, and measures of the models."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from weightsmith.core.json_objects import INLINE, JsonObject, Measured

ERROR, WARNING, NOTE = "error", "warning", "note"
_LAYER = re.compile(r"\.(?:layers|h|blocks?|layer)\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A difference that fails the validation (`error`), may matter (`warning`), or is a `note`."""

    severity: str
    check: str
    """The check that found it: `files`, `tokenizer`, `elements`, `outputs`, `layers`, `logits`."""
    message: str
    tensor: str = ""
    """The tensor or file concerned."""
    layer: int | None = None
    """Its decoder layer, counted from 0."""


def finding(severity: str, check: str, message: str, tensor: str = "") -> Finding:
    """Return a finding; the layer is read from the tensor's name."""
    return Finding(
        severity=severity, check=check, message=message, tensor=tensor, layer=layer_of(tensor)
    )


def layer_of(tensor: str) -> int | None:
    """Return the number of the decoder layer in a tensor's name, or None."""
    match = _LAYER.search(f".{tensor}.")
    return int(match[1]) if match else None


def failed(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings that fail a validation."""
    return [found for found in findings if found.severity == ERROR]


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
    def errors(self) -> tuple[Finding, ...]:
        """The findings that fail the validation."""
        return tuple(found for found in self.findings if found.severity == ERROR)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that may matter."""
        return tuple(found for found in self.findings if found.severity == WARNING)
