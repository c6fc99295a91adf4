import json
from dataclasses import replace

import pytest
from weightsmith.quantizers import formats
from weightsmith.quantizers.quality.limits import limits_for, refusal
from weightsmith.quantizers.quality.result import (
    LayerError,
    Loss,
    QualityResult,
    QualityVerdict,
    TensorError,
)
from weightsmith.recipe.schema import Quality, QualityLimits
from weightsmith.stages.quality import larger_than

from tests.unit.quantizers.quality.conftest import TEXTS

GOOD = Loss(
    kl_mean=0.0,
    kl_p99=0.0,
    top1=1.0,
    perplexity=3.0,
    perplexity_reference=3.0,
    perplexity_ratio=1.0,
    texts=2,
    tokens=300,
    layer_error=0.0,
)


def exceeded(loss, limits):
    return QualityResult(loss=loss).judged(limits, TEXTS).exceeded


def test_smaller_formats_may_lose_more_but_none_below_four_bits():
    allowed = [
        limits_for(formats()[name], Quality())["kl_mean"]
        for name in ("f16", "q8_0", "q5_k_m", "q4_k_m", "q2_k")
    ]

    assert allowed == sorted(allowed)
    assert allowed[-1] == allowed[-2]
    assert len(set(allowed)) == 3


def test_a_formats_own_limit_wins_over_that_of_all():
    quality = Quality(
        limits={"*": QualityLimits(kl_mean=0.5, top1=0.1), "q4_k_m": QualityLimits(kl_mean=0.25)}
    )

    found = limits_for(formats()["q4_k_m"], quality)
    assert (found["kl_mean"], found["top1"]) == (0.25, 0.1)
    assert limits_for(formats()["q8_0"], quality)["kl_mean"] == 0.5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("kl_mean", 9.0), ("kl_mean", float("nan")), ("kl_p99", 99.0), ("top1", 0.5)),
        *(("perplexity_ratio", 3.0), ("layer_error", 0.6)),
    ],
)
def test_each_measure_can_stop_a_model(key, value):
    limits = limits_for(formats()["q4_k_m"], Quality())

    assert exceeded(GOOD, limits) == ()
    (told,) = exceeded(replace(GOOD, **{key: value}), limits)
    assert told.startswith(f"{key} {value:g}")


def test_the_refusal_names_the_worst_and_what_to_try():
    loss = replace(
        GOOD,
        worst_layers=(LayerError(layer=7, error=0.5),),
        worst_tensors=(TensorError(tensor="model.layers.7.mlp.down_proj.weight", error=0.2),),
    )
    found = QualityResult(loss=loss, verdict=QualityVerdict(limits={}, exceeded=("kl_mean 1",)))

    error = refusal(formats()["q2_k"], found, larger_than(formats()["q2_k"]))

    assert error.exit_code == 4
    assert "7 (0.5)" in error.message
    assert "model.layers.7.mlp.down_proj.weight" in error.message
    assert "with more bits (q3_k_m, q4_k_m)" in error.hint


@pytest.mark.parametrize(
    ("name", "larger"),
    [
        ("q4_k_m", ("q5_k_m", "q6_k")),
        ("q8_0", ("f16",)),
        ("f16", ()),
        ("iq2_xs", ("q3_k_m", "q4_k_m")),
        ("awq", ()),
    ],
)
def test_a_hint_names_formats_with_more_bits(name, larger):
    """Of Q8_0, q5_k_m was once named as the larger type."""
    assert larger_than(formats()[name]) == larger


def test_what_other_texts_might_not_show_is_no_finding():
    limits = {"kl_mean": 0.25, "top1": 0.86}
    near = replace(
        GOOD, kl_mean=0.3, top1=0.8, intervals={"kl_mean": (0.2, 0.4), "top1": (0.7, 0.9)}
    )
    over = replace(near, intervals={"kl_mean": (0.26, 0.4), "top1": (0.7, 0.85)})

    assert exceeded(near, limits) == ()
    assert exceeded(over, limits) == ("kl_mean 0.3, at most 0.25", "top1 0.8, at least 0.86")


def test_a_ratio_of_perplexities_needs_a_reference_that_predicts_the_text():
    """A Gemma without its template: 14,800 against 13,500, with a divergence of 0.007 nats."""
    unknown = limits_for(formats()["q8_0"], Quality(), perplexity=13_500.0)
    asked = Quality(limits={"*": QualityLimits(perplexity_ratio=1.05)})

    assert set(unknown) == {"kl_mean", "kl_p99", "layer_error"}
    assert limits_for(formats()["q8_0"], Quality(), perplexity=20.0)["perplexity_ratio"] == 1.05
    assert limits_for(formats()["q8_0"], asked, perplexity=13_500.0)["perplexity_ratio"] == 1.05


def test_general_text_widens_the_defaults_and_not_what_the_recipe_says():
    quality = Quality(limits={"*": QualityLimits(kl_p99=0.5)})
    own = limits_for(formats()["q4_k_m"], quality)

    general = limits_for(formats()["q4_k_m"], quality, general=True)

    assert general["kl_mean"] > own["kl_mean"]
    assert general["top1"] < own["top1"]
    assert general["kl_p99"] == 0.5
    assert general["layer_error"] == own["layer_error"]


def test_a_quality_is_the_same_after_writing_and_reading():
    judged = QualityResult(loss=GOOD).judged({"kl_mean": 0.5}, TEXTS)
    skipped = QualityResult(skipped="no view")

    for found in (judged, skipped, QualityResult(loss=GOOD)):
        assert QualityResult.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert skipped.to_json() == {"skipped": "no view"}
    assert list(judged.to_json()) == [
        "kl_mean", "kl_p99", "top1", "perplexity", "perplexity_reference", "perplexity_ratio",
        "texts", "tokens", "layer_error", "intervals", "worst_layers", "worst_tensors",
        "limits", "exceeded", "calibration",
    ]  # fmt: skip
    assert skipped.judged({"kl_mean": 0.5}, TEXTS) == skipped


def test_of_a_mix_the_budget_is_what_to_change():
    found = QualityResult(loss=GOOD, verdict=QualityVerdict(limits={}, exceeded=("kl_mean 1",)))

    error = refusal(formats()["mix"], found, larger_than(formats()["mix"]))

    assert "a larger budget (quantize.bits or quantize.size)" in error.hint
    assert "tensor_types" not in error.hint
