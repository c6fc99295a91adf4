"""Rules that every engine on GPUs keeps, and the traps of each."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weightsmith.building.targets import all_targets
from weightsmith.core.errors import UsageError
from weightsmith.serving import engines, llamacpp_options, sglang, tgi, trtllm, vllm
from weightsmith.serving.devices import GPUS
from weightsmith.serving.engine import ServedModel, ServeOptions
from weightsmith.serving.memory import GIB

from tests.fakes.configs import LLAMA_8B, LLAMA_8B_BYTES, facts
from tests.fakes.rendering import L40S, rendered

ON_GPUS = ["vllm", "tgi", "sglang", "trtllm"]


def test_the_engines_and_what_they_load():
    wanted = {"vllm", "vllm-awq", "tgi", "tgi-awq", "llamacpp-q4_k_m", "sglang", "sglang-awq"}

    assert wanted | {"trtllm"} <= set(all_targets())
    # GGUF left vLLM in 0.24.
    assert not any("gguf" in engines()[name].accepts for name in ON_GPUS)


@pytest.mark.parametrize("engine", ON_GPUS)
def test_memory_adds_up(engine):
    plan = rendered(engine, **L40S).plan
    whole = GPUS["nvidia-l40s"].usable_bytes

    taken = plan.weights_bytes_per_gpu + plan.kv_cache_bytes + plan.overhead_bytes
    assert taken + plan.margin_bytes <= whole
    assert plan.kv_bytes_total <= plan.kv_cache_bytes
    assert plan.max_concurrency >= plan.max_num_seqs
    assert plan.kv_bytes_per_token == 131072
    assert 0 <= plan.kv_bytes_per_request - 8192 * 131072 < 64 * 131072


@pytest.mark.parametrize("engine", ON_GPUS)
def test_two_gpus_share_weights_and_cache(engine):
    plan = rendered(engine, **L40S, gpu_count=2).plan

    assert plan.tensor_parallel_size == 2
    assert plan.weights_bytes_per_gpu == LLAMA_8B_BYTES // 2
    assert plan.kv_bytes_per_token == 131072
    assert plan.shm_bytes >= GIB


def test_vllm_on_a_cpu_gets_the_shared_memory_that_it_asks_for():
    """160 MiB by its own message; a container without the setting has 64, and it ends there."""
    assert rendered("vllm").plan.shm_bytes >= 160 << 20


wishes = st.fixed_dictionaries(
    {
        "gpu": st.sampled_from(["nvidia-a10g", "nvidia-l40s", "nvidia-a100-80gb"]),
        "gpu_count": st.sampled_from([1, 2, 4]),
        "max_model_len": st.none() | st.integers(16, 131072),
        "max_num_seqs": st.none() | st.integers(1, 300),
        "kv_cache_dtype": st.sampled_from(["", "fp8_e5m2"]),
    }
)


def planned(engine, wish):
    try:
        return engines()[engine].plan(facts(LLAMA_8B), LLAMA_8B_BYTES, ServeOptions(**wish))
    except UsageError:
        return None


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(["vllm", "tgi", "sglang"]), wishes, st.data())
def test_what_fits_still_fits_when_less_is_wished(engine, wish, data):
    plan = planned(engine, wish)
    if plan is None:
        return
    fewer = data.draw(st.integers(1, plan.max_num_seqs))
    shorter = data.draw(st.integers(1 if engine != "tgi" else 2, plan.max_model_len))

    for change in ({"max_num_seqs": fewer}, {"max_model_len": shorter}, {"gpu_count": 4}):
        asked = {"max_model_len": plan.max_model_len, "max_num_seqs": plan.max_num_seqs}
        assert planned(engine, {**wish, **asked, **change}) is not None, change


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ON_GPUS), wishes)
def test_a_plan_holds_its_requests_and_leaves_the_margin(engine, wish):
    if engine == "trtllm":
        wish = {**wish, "kv_cache_dtype": ""}
    plan = planned(engine, wish)
    if plan is None:
        return
    each = plan.weights_bytes_per_gpu + plan.kv_cache_bytes + plan.overhead_bytes // plan.gpus
    assert each + plan.margin_bytes <= GPUS[plan.device].usable_bytes
    assert plan.kv_bytes_total <= plan.kv_cache_bytes * plan.gpus
    assert plan.max_num_seqs <= plan.max_concurrency
    assert plan.max_num_batched_tokens >= plan.max_num_seqs


@pytest.mark.parametrize("engine", ON_GPUS)
def test_every_way_out_of_a_misfit_is_one(engine):
    wish = {"gpu": "nvidia-l4", "max_model_len": 32768, "max_num_seqs": 4}
    with pytest.raises(UsageError, match="nvidia-l4") as caught:
        engines()[engine].plan(facts(LLAMA_8B), LLAMA_8B_BYTES, ServeOptions(**wish))

    told = caught.value.details["plan"]
    assert (told.fits, told.max_model_len) == (False, 32768)
    kinds = {tuple(sorted(set(way) - {"text"})) for way in told.nearest}
    assert ("max_model_len", "max_num_seqs") in kinds
    assert ("gpu", "gpu_count") in kinds
    assert ("gpu_count",) in kinds
    for way in told.nearest:
        changed = {key: value for key, value in way.items() if key in ServeOptions.__slots__}
        size = way.get("weight_bytes", LLAMA_8B_BYTES)
        assert (
            engines()[engine].plan(facts(LLAMA_8B), size, ServeOptions(**{**wish, **changed})).fits
        )


@pytest.mark.parametrize("engine", ON_GPUS[1:])
def test_it_needs_a_gpu(engine):
    with pytest.raises(UsageError, match="needs a GPU"):
        rendered(engine)


@pytest.mark.parametrize("engine", ON_GPUS)
@pytest.mark.parametrize("option", ["trust-remote-code", "trust_remote_code"])
def test_no_image_runs_code_of_a_checkpoint(engine, option):
    with pytest.raises(UsageError, match="cannot be set") as caught:
        rendered(engine, **L40S, extra={option: True})
    assert "runs no code of a checkpoint" in caught.value.hint


SECRETS = {
    "vllm": {"api-key", "hf-token"},
    "sglang": {"api-key", "admin-api-key", "ssl-keyfile-password"},
    "tgi": {"api-key", "ngrok-authtoken"},
    "trtllm": set(),
    "llamacpp": {"api-key", "hf-token"},
}
"""Options of each engine that take a secret itself, and not the name of a file with one."""


@pytest.mark.parametrize("engine", SECRETS)
def test_no_image_holds_a_secret(engine):
    check = llamacpp_options.extra_options
    names = {*llamacpp_options.ENVIRONMENT, *llamacpp_options.COMMAND_LINE}
    if engine != "llamacpp":
        known = {"vllm": vllm, "sglang": sglang, "tgi": tgi, "trtllm": trtllm}[engine]
        check, names = known.known_options().checked, set(known.known_options().kinds)
    secret = re.compile(r"api[-_]key$|(hf|auth)[-_]?token$|password$|secret")

    assert {name for name in names if secret.search(name)} == SECRETS[engine]
    for name in SECRETS[engine]:
        with pytest.raises(UsageError) as caught:
            check({name: "s3cret"})
        assert "s3cret" not in caught.value.message + caught.value.hint


@pytest.mark.parametrize("engine", ON_GPUS)
@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"gpu_count": 3, "tensor_parallel_size": 3}, "does not divide the model's 32"),
        (
            {"gpu_count": 4, "tensor_parallel_size": 2, "pipeline_parallel_size": 1},
            "gpu_count is 4",
        ),
        ({"max_model_len": 200_000}, "131072 positions"),
        ({"kv_cache_dtype": "q3_0"}, "no such type"),
        ({"gpu_memory_utilization": 1.5}, "outside"),
        ({"max_num_batched_tokens": 2, "max_num_seqs": 8}, "at least one token"),
        ({"extra": {"nonsense-option": 1}}, "no such option"),
    ],
)
def test_wishes_that_cannot_be(engine, wish, says):
    with pytest.raises(UsageError, match=says):
        rendered(engine, gpu="nvidia-a100-80gb", **wish)


def test_heads_that_three_gpus_cannot_share_are_split_by_layers():
    plan = rendered("vllm", gpu="nvidia-l40s", gpu_count=3).plan

    assert (plan.tensor_parallel_size, plan.pipeline_parallel_size) == (1, 3)


def test_float16_on_old_gpus_and_not_for_models_that_overflow():
    plan = rendered("vllm", weights=4 * GIB, gpu="nvidia-t4").plan
    assert plan.settings["dtype"] == "float16"
    assert any("no bfloat16" in note for note in plan.notes)

    with pytest.raises(UsageError, match="bfloat16"):
        rendered("vllm", weights=4 * GIB, gpu="nvidia-t4", dtype="bfloat16")
    gemma = {**LLAMA_8B, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
    with pytest.raises(UsageError, match="float16"):
        rendered("vllm", config=gemma, weights=4 * GIB, gpu="nvidia-t4")


def test_eight_bit_caches_need_the_hardware():
    with pytest.raises(UsageError, match=r"8\.9"):
        rendered("vllm", gpu="nvidia-a100-80gb", kv_cache_dtype="fp8")
    assert rendered("vllm", gpu="nvidia-a100-80gb", kv_cache_dtype="fp8_e5m2").plan.fits


# TGI: launcher/src/main.rs and backends/v3/src/main.rs of 3.3.


@settings(max_examples=60, deadline=None)
@given(wishes)
def test_tgi_accepts_its_own_budgets(wish):
    plan = planned("tgi", {**wish, "kv_cache_dtype": ""})
    if plan is None:
        return
    env = tgi.env(plan, ServedModel(path="/models", name="m", startup_seconds=600))
    total, batch = int(env["MAX_TOTAL_TOKENS"]), plan.kv_cache_bytes * plan.gpus // 131072
    assert int(env["MAX_INPUT_TOKENS"]) < total <= batch
    assert int(env["MAX_BATCH_PREFILL_TOKENS"]) <= batch
    assert 0 < int(env["MAX_BATCH_SIZE"]) <= int(env["MAX_CONCURRENT_REQUESTS"])
    # With both of them the launcher stops; the batch's total is measured where it is unset.
    assert not {"MAX_INPUT_LENGTH", "MAX_BATCH_TOTAL_TOKENS", "QUANTIZE"} & set(env)


def test_windows_are_planned_at_full_length_where_the_engine_may_keep_less():
    windows = {**LLAMA_8B, "architectures": ["Gemma3ForCausalLM"], "sliding_window": 1024}

    for engine in ("sglang", "trtllm"):
        plan = rendered(engine, config=windows, **L40S).plan
        assert plan.kv_bytes_per_token == 131072
        assert any("full length" in note for note in plan.notes)
    # SGLang would else divide its memory by a ratio, and end before the planned number.
    assert rendered("sglang", config=windows, **L40S).plan.settings["disable-hybrid-swa-memory"]
