"""Limits per format on the difference between a quantized model and its checkpoint.

A measure is beyond its limit only if its whole 95 % interval over texts is. Q8_0 of a model was
once refused because its perplexity on general text was 1.096 times the reference's, at 14,800
against 13,500, with a divergence of 0.007 nats. So the ratio of perplexities has no default limit
where the reference does not predict the text. Wider limits would miss broken files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weightsmith.core.errors import CheckFailed
from weightsmith.core.values import Format
from weightsmith.quantizers.gguf_types import MIX
from weightsmith.quantizers.quality.result import QualityResult
from weightsmith.recipe.schema import Quality, QualityLimits


def _limits(mean: float, p99: float, top1: float, ratio: float, layer: float) -> QualityLimits:
    return QualityLimits(
        kl_mean=mean, kl_p99=p99, top1=top1, perplexity_ratio=ratio, layer_error=layer
    )


# By minimum bits per weight (measurements are in benchmarks/README.md). The divergence is a mean
# over some hundred answer tokens, a few of which are ties: on a model of 135 million weights, good
# files of four to six bits had 0.02 to 0.18. So the layer error separates good files (0.04 to 0.17)
# from coarse or broken ones (0.22 and more). Below four bits the limits stay the same, because
# fine-tuning is lost there.
_DEFAULTS = (
    (15.0, _limits(0.001, 0.02, 0.99, 1.01, 0.02)),
    (7.5, _limits(0.01, 0.2, 0.96, 1.05, 0.1)),
    (0.0, _limits(0.25, 3.0, 0.86, 1.3, 0.25)),
)
_FP8 = _limits(0.03, 0.6, 0.94, 1.1, 0.12)
"""fp8 has only three bits of mantissa: 0.007, 0.16, 0.979, 0.999 and 0.056 on the support bot,
where int8 has 0.001, 0.016, 1, 0.999 and 0.04."""
_GROUPED = frozenset({"awq", "gptq", "modelopt-awq"})
_GROUPED_LAYER = 0.35
"""One scale per 64 or 128 weights is coarser than GGUF's per 32: 0.17 and 0.16 on the support bot,
where q4_k_m has a layer error of 0.10, and q2_k, which fails, 0.22."""
ANY_FORMAT = "*"
_PREDICTED = 100.0
"""Perplexity up to which a model predicts a text; general text has about 20 with a good model, and
14,800 with one that does not know it."""
_GENERAL = 2.0
"""Measured: the support bot's q4_k_m errs 5 times as often on general text as on its own task."""


def limits_for(
    format_: Format, quality: Quality, *, general: bool = False, perplexity: float = 1.0
) -> Mapping[str, float]:
    """Return a format's limits: the defaults for its size, overridden by the recipe.

    The recipe's `*` applies to all formats, a format's name only to that one. On `general` text,
    which the model was not tuned on, more next tokens are nearly tied, so the defaults for
    divergence and agreement are wider. If the reference's `perplexity` shows that it does not
    predict the text, its ratio and the likeliest tokens say nothing and have no default limits.
    """
    bits = format_.bits_per_weight
    found = next(limits for least, limits in _DEFAULTS if bits >= least)
    merged = (_FP8 if format_.kind in {"fp8", "modelopt-fp8"} else found).model_dump()
    if format_.kind in _GROUPED:
        merged["layer_error"] = _GROUPED_LAYER
    if general:
        merged |= {key: merged[key] * _GENERAL for key in ("kl_mean", "kl_p99")}
        merged["top1"] = 1 - (1 - merged["top1"]) * _GENERAL
    if perplexity > _PREDICTED:
        del merged["perplexity_ratio"], merged["top1"]
    for name in (ANY_FORMAT, format_.instead_of, format_.name):
        if name in quality.limits:
            merged |= quality.limits[name].model_dump(exclude_none=True)
    return {key: float(value) for key, value in merged.items()}


def refusal(format_: Format, quality: QualityResult, larger: Sequence[str]) -> CheckFailed:
    """Return the error for a model over its limits: where the loss is, and what to try.

    `larger` names formats with more bits per weight.
    """
    where = ""
    if quality.loss and quality.loss.worst_layers:
        worst = (f"{one.layer} ({one.error:.2g})" for one in quality.loss.worst_layers)
        where += f"; worst layers: {', '.join(worst)}"
    if quality.loss and quality.loss.worst_tensors:
        where += f"; worst weights: {quality.loss.worst_tensors[0].tensor}"
    tries = {
        "gguf": "an imatrix, quantize.tensor_types for the worst weights, or more calibration text",
        "awq": "a smaller group size, or more calibration text like the task",
        "gptq": "a smaller group size, or more calibration text like the task",
        "modelopt-awq": "a smaller group size, or more calibration text like the task",
    }
    hint = tries.get(format_.kind, "more calibration text")
    if format_.name == MIX.name:
        hint = "a larger budget (quantize.bits or quantize.size), or more calibration text"
    if larger:
        hint = f"a format with more bits ({', '.join(larger)}), {hint}"
    hint = f"try {hint}; quality.limits.{format_.name} sets the limits"
    if quality.loss and quality.loss.damaged:
        hint = (
            "no rounding explains this: quantize again, and check disk and memory if it "
            "happens again; `quality: {gate: measure}` refuses nothing"
        )
    much = "; ".join(quality.exceeded)
    return CheckFailed(
        f"{format_.name} differs too much from the merged model: {much}{where}", hint=hint
    )
