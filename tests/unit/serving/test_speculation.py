"""`serve.speculative`: what each engine is told, what it takes, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.serving.memory import GIB
from weightsmith.serving.speculation import Speculation

from tests.fakes.configs import LLAMA_8B, QWEN3_NEXT, config
from tests.fakes.rendering import L40S, rendered

MOE = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
GLM = config("Glm4MoeForCausalLM", 8, 2048, 16, 8, head_dim=128, **MOE)
GLM_MTP = GLM | {"num_nextn_predict_layers": 1}
WEIGHTS = 4 * GIB


def drafting(method: str, tokens: int = 3) -> Speculation:
    return Speculation(method=method, tokens=tokens)


def told(target: str, speculation: Speculation | None, **options: Any) -> Any:
    wishes = {"config": GLM_MTP, "weights": WEIGHTS, **L40S, **options}
    return rendered(target, speculation=speculation, **wishes)


def test_vllm_gets_json_in_its_file() -> None:
    """The keys are those of SpeculativeConfig in vLLM's config/speculative.py."""
    made = told("vllm", drafting("mtp"))
    assert json.loads(made.plan.settings["speculative-config"]) == {
        "method": "mtp",
        "num_speculative_tokens": 3,
    }
    assert "speculative-config: " in made.files["vllm.yaml"]
    found = told("vllm", drafting("ngram", 5)).plan.settings["speculative-config"]
    assert json.loads(found)["num_speculative_tokens"] == 5
    assert "speculative-config" not in told("vllm", None).plan.settings


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (
            "mtp",
            {"algorithm": "NEXTN", "num-steps": 3, "eagle-topk": 1, "num-draft-tokens": 4},
        ),
        ("ngram", {"algorithm": "NGRAM", "num-draft-tokens": 3}),
    ],
)
def test_sglang_gets_options_that_it_has(method: str, options: dict[str, Any]) -> None:
    made = told("sglang", drafting(method))
    found = {k: v for k, v in made.plan.settings.items() if k.startswith("speculative-")}
    assert found == {f"speculative-{key}": value for key, value in options.items()}
    for key, value in found.items():
        assert f"{key}: {json.dumps(value)}" in made.files["sglang.yaml"]


def test_llama_cpp_gets_a_variable_and_arguments() -> None:
    made = told("llamacpp-q4_k_m", drafting("ngram", 6))
    assert made.env["LLAMA_ARG_SPEC_TYPE"] == "ngram-simple"
    at = made.command.index("--spec-ngram-simple-size-m")
    assert made.command[at + 1] == "6"


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_the_cache_of_further_layers_is_planned(target: str) -> None:
    """One layer beside eight of the same shape: an eighth more for each token."""
    without, with_ = told(target, None).plan, told(target, drafting("mtp")).plan
    assert with_.kv_bytes_per_token * 8 == without.kv_bytes_per_token * 9
    assert with_.kv_bytes_total * 8 == without.kv_bytes_total * 9
    assert with_.overhead_bytes > without.overhead_bytes  # logits of what is drafted
    assert any("greedy answers stay the same" in note for note in with_.notes)


def test_beside_layers_with_a_state_it_is_one_of_full_attention() -> None:
    model = QWEN3_NEXT | {"num_nextn_predict_layers": 1}
    more: dict[str, Any] = {"config": model, "gpu": "nvidia-h100-80gb", "weights": 40 * GIB}
    without, with_ = told("vllm", None, **more).plan, told("vllm", drafting("mtp"), **more).plan
    assert with_.kv_bytes_per_request > without.kv_bytes_per_request


def test_ngram_takes_no_cache_of_its_own() -> None:
    for target in ("vllm", "llamacpp-q4_k_m"):
        without, with_ = told(target, None).plan, told(target, drafting("ngram")).plan
        assert with_.kv_bytes_total == without.kv_bytes_total


@pytest.mark.parametrize(
    ("target", "method", "options", "why"),
    [
        ("trtllm", "ngram", {}, "has no method ngram"),
        ("tgi", "ngram", {}, "has no method ngram"),
        ("llamacpp-q4_k_m", "mtp", {}, "has no method mtp; it has ngram"),
        ("vllm", "mtp", {"config": GLM}, "states no layers for further tokens"),
        ("vllm", "mtp", {"config": LLAMA_8B}, "states no layers for further tokens"),
        (
            "vllm",
            "mtp",
            {"config": GLM | {"num_nextn_predict_layers": 2}},
            "tokens 3 is no multiple of the model's 2 layers",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    target: str, method: str, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(InputRefused, match=why) as refused:
        told(target, drafting(method), **options)
    assert refused.value.exit_code == 3
    assert refused.value.hint


@pytest.mark.parametrize(
    ("target", "extra"),
    [
        ("vllm", {"speculative-config": {"method": "ngram"}}),
        ("vllm", {"spec_tokens": 3}),
        ("sglang", {"speculative-algorithm": "NGRAM"}),
        ("llamacpp-q4_k_m", {"LLAMA_ARG_SPEC_TYPE": "ngram-mod"}),
        ("llamacpp-q4_k_m", {"draft-p-min": 0.5}),
    ],
)
def test_it_is_said_in_one_place(target: str, extra: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="say the same thing"):
        told(target, drafting("ngram"), extra=extra)
