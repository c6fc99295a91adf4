"""Results of the quality gate: the distance of quantized weights from the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from weightsmith.core.json_objects import INLINE, OMITTED, JsonObject
from weightsmith.core.values import Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerError(JsonObject):
    """The error of one decoder layer's output, relative to what the layer adds."""

    layer: int
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorError(JsonObject):
    """The relative error of one tensor's weights."""

    tensor: str
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFault(JsonObject):
    """A tensor with rows that are further from the checkpoint's than their type explains."""

    tensor: str
    row: int
    """First of the rows."""
    kind: str
    """How the tensor is stored."""
    error: float
    """Relative error of the rows."""
    limit: float

    def __str__(self) -> str:
        """Return it as a phrase."""
        return (
            f"{self.tensor} is damaged from row {self.row} on: error {self.error:.2g}, at most "
            f"{self.limit:.2g} for {self.kind}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss(JsonObject):
    """The distance measured on held-out text."""

    kl_mean: float
    """Mean Kullback-Leibler divergence per token, of the checkpoint's next-token distribution to
    the quantized model's, in nats."""
    kl_p99: float
    """The divergence's 99th percentile, in nats."""
    top1: float
    """Fraction of tokens with the same most likely next token, or one nearly as likely in the
    checkpoint."""
    perplexity: float
    perplexity_reference: float
    """The merged checkpoint's."""
    perplexity_ratio: float
    """Ratio of the perplexity to the merged checkpoint's."""
    texts: int
    tokens: int
    layer_error: float
    """The largest error of a layer's output, relative to what the layer adds, on the checkpoint's
    own input."""
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """95 % intervals of `kl_mean`, `kl_p99`, `top1` and `perplexity_ratio` over texts; {} if there
    are too few texts."""
    worst_layers: tuple[LayerError, ...] = ()
    worst_tensors: tuple[TensorError, ...] = ()
    damaged: tuple[TensorFault, ...] = field(default=(), metadata=OMITTED)
    """Up to three tensors that no rounding explains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityVerdict(JsonObject):
    """The limits, and those that are exceeded."""

    limits: Mapping[str, float]
    """Measure -> limit; `top1` is a minimum, the others are maxima."""
    exceeded: tuple[str, ...] = ()
    """One phrase for each exceeded limit; empty if the weights passed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextsUsed(JsonObject):
    """Which texts the weights were calibrated on, and which were held out to measure them."""

    source: str
    texts: int
    held_out: int
    general: int
    """Number of general texts that were added because there were too few."""
    digest: Digest
    held_out_digest: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityResult(JsonObject):
    """The loss by quantization and its verdict, or why it was not measured."""

    skipped: str = field(default="", metadata=OMITTED)
    """Why it was not measured; empty if it was."""
    loss: Loss | None = field(default=None, metadata=INLINE)
    verdict: QualityVerdict | None = field(default=None, metadata=INLINE)
    calibration: TextsUsed | None = field(default=None, metadata=OMITTED)

    def judged(self, limits: Mapping[str, float], calibration: TextsUsed) -> Self:
        """Return it with its verdict and the texts it was measured on; as it is if it was skipped.

        `top1` is a minimum, the other limits are maxima. A limit is exceeded if the value and its
        whole interval are beyond it: what other texts might not show is no finding. A damaged
        tensor is one, whatever it changes.
        """
        if self.loss is None:
            return self
        exceeded = [str(fault) for fault in self.loss.damaged]
        for key, limit in limits.items():
            value, least = float(getattr(self.loss, key)), key == "top1"
            low, high = self.loss.intervals.get(key, (value, value))
            nearest = high if least else low
            # Not the opposite comparison: NaN exceeds any limit.
            if not any(end >= limit if least else end <= limit for end in (value, nearest)):
                exceeded.append(f"{key} {value:g}, {'at least' if least else 'at most'} {limit:g}")
        return replace(
            self,
            verdict=QualityVerdict(limits=limits, exceeded=tuple(exceeded)),
            calibration=calibration,
        )

    @property
    def exceeded(self) -> tuple[str, ...]:
        """One phrase for each exceeded limit."""
        return self.verdict.exceeded if self.verdict else ()


def short(value: float) -> float:
    """Round to six digits, more than two machines agree on."""
    return float(f"{value:.6g}")
