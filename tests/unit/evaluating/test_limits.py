import pytest
from weightsmith.evaluating.limits import judge, limits_for, refusal
from weightsmith.quantizers import formats
from weightsmith.recipe import Quality, QualityLimits

GOOD = {"kl_mean": 0.0, "kl_p99": 0.0, "top1": 1.0, "perplexity_ratio": 1.0, "layer_error": 0.0}


def test_smaller_formats_may_lose_more_but_none_below_four_bits():
    allowed = [
        limits_for(formats()[name], Quality())["kl_mean"]
        for name in ("f16", "q8_0", "q5_k_m", "q4_k_m", "q2_k")
    ]

    assert allowed == sorted(allowed)
    assert allowed[-1] == allowed[-2]
    assert len(set(allowed)) == 3


def test_fp8_lies_between_int8_and_four_bits():
    found = [limits_for(formats()[name], Quality()) for name in ("w8a8", "fp8", "gptq")]

    for key in ("kl_mean", "kl_p99", "layer_error"):
        assert sorted(limits[key] for limits in found) == [limits[key] for limits in found]
    assert limits_for(formats()["fp8-static"], Quality()) == found[1]


def test_coarser_groups_may_err_more_at_a_layer():
    found = {
        name: limits_for(formats()[name], Quality())["layer_error"]
        for name in ("q4_k_m", "awq-compressed", "awq", "awq-autoawq", "gptq")
    }

    assert list(found.values()) == [0.25, 0.25, 0.35, 0.35, 0.35]


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
        ("kl_mean", 9.0),
        ("kl_p99", 99.0),
        ("top1", 0.5),
        ("perplexity_ratio", 3.0),
        ("layer_error", 0.6),
    ],
)
def test_each_measure_can_stop_a_model(key, value):
    limits = limits_for(formats()["q4_k_m"], Quality())

    assert judge(GOOD, limits).exceeded == ()
    (told,) = judge({**GOOD, key: value}, limits).exceeded
    assert told.startswith(f"{key} {value:g}")


def test_not_a_number_stops_a_model():
    limits = limits_for(formats()["q4_k_m"], Quality())

    assert judge({**GOOD, "kl_mean": float("nan")}, limits).exceeded


def test_the_refusal_names_the_worst_and_what_to_try():
    found = {
        **GOOD,
        "exceeded": ["kl_mean 1, at most 0.08"],
        "worst_layers": [{"layer": 7, "error": 0.5}],
        "worst_tensors": [{"tensor": "model.layers.7.mlp.down_proj.weight", "error": 0.2}],
    }

    error = refusal(formats()["q2_k"], found)

    assert error.exit_code == 4
    assert "7 (0.5)" in error.message
    assert "model.layers.7.mlp.down_proj.weight" in error.message
    assert "q5_k_m" in error.hint


def test_general_text_widens_the_defaults_and_not_what_the_recipe_says():
    quality = Quality(limits={"*": QualityLimits(kl_p99=0.5)})
    own = limits_for(formats()["q4_k_m"], quality)

    general = limits_for(formats()["q4_k_m"], quality, general=True)

    assert general["kl_mean"] > own["kl_mean"]
    assert general["top1"] < own["top1"]
    assert general["kl_p99"] == 0.5
    assert general["layer_error"] == own["layer_error"]
