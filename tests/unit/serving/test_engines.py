"""Rules that every engine on GPUs keeps, and the traps of each."""

import json
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from weightsmith.building.targets import all_targets
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.values import AWQ
from weightsmith.serving import engines, llamacpp_options, sglang, tgi, trtllm, vllm
from weightsmith.serving.devices import GPUS
from weightsmith.serving.engine import ServedModel, ServeOptions
from weightsmith.serving.memory import GIB
from weightsmith.serving.targets import find

from tests.fakes import command_line
from tests.fakes.configs import LLAMA_8B, LLAMA_8B_BYTES, facts
from tests.fakes.rendering import L40S, rendered
from tests.paths import ROOT

ON_GPUS = ["vllm", "tgi", "sglang", "trtllm"]


def test_the_engines_and_what_they_load():
    wanted = {"vllm", "vllm-awq", "tgi", "tgi-awq", "llamacpp-q4_k_m", "sglang", "sglang-awq"}

    assert wanted | {"trtllm", "vllm-gptq", "vllm-fp8", "llamacpp-f16"} <= set(all_targets())
    assert "llamacpp" not in all_targets()  # it loads no safetensors
    assert all(name == engine.name for name, engine in engines().items())
    # GGUF left vLLM in 0.24.
    assert not any("gguf" in engines()[name].accepts for name in ON_GPUS)


@pytest.mark.parametrize("engine", ON_GPUS)
def test_two_gpus_share_weights_and_cache(engine):
    plan = rendered(engine, **L40S, gpu_count=2).plan

    assert plan.tensor_parallel_size == 2
    assert plan.weights_bytes_per_gpu == LLAMA_8B_BYTES // 2
    assert plan.kv_bytes_per_token == 131072
    assert plan.shm_bytes >= GIB


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


def test_what_is_archived_upstream_says_so_where_it_is_chosen():
    """In the list of targets, the page and the plan, with the date and what to take instead."""
    listed = json.loads(command_line.run("targets", "--json").out)["targets"]
    page = (ROOT / "docs/reference/targets.md").read_text("utf-8")
    plan = json.loads((ROOT / "tests/golden/renders/tgi-a10g/plan.json").read_text("utf-8"))

    dates = {"tgi-awq": "2026-03-21", "tgi": "2026-03-21", "vllm-awq-autoawq": "2025-05-11"}
    assert all(date in listed[name]["legacy"] for name, date in dates.items())
    assert all(date in page for date in dates.values())
    assert "2026-03-21" in plan["notes"][-1]
    assert "an image of vLLM" in plan["notes"][-1]
    assert {name for name, told in listed.items() if told["legacy"]} == {
        name for name in listed if name.startswith("tgi") or "-autoawq" in name
    }


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
        size, options = way.get("weight_bytes", LLAMA_8B_BYTES), ServeOptions(**wish | changed)
        assert engines()[engine].plan(facts(LLAMA_8B), size, options).fits


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
        ({"gpu_count": 4, "tensor_parallel_size": 2, "pipeline_parallel_size": 1}, "count is 4"),
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


def test_an_unknown_target_gets_near_misses_and_the_list():
    with pytest.raises(UsageError) as caught:
        find("llamacpp-q4km", all_targets())

    assert "llamacpp-q4_k_m" in caught.value.hint
    assert "llamacpp-f16" in caught.value.hint


def test_sglang_does_not_get_packed_weights_whose_rows_it_reorders():
    llama4 = {**LLAMA_8B, "architectures": ["Llama4ForConditionalGeneration"]}

    assert rendered("sglang", config=llama4, **L40S)
    for target in ("sglang-fp8", "sglang-nvfp4a16"):
        wishes = {**L40S, "format": all_targets()[target].format}
        with pytest.raises(InputRefused, match="without their scales"):
            rendered(target, config=llama4, **wishes)


def test_sglangs_file_holds_what_it_can_read():
    extra = {"enable-mixed-chunk": True, "enable-tf32-matmul": False, "gc-threshold": [700, 10]}
    config = rendered("sglang", **L40S, extra=extra)
    told = yaml.safe_load(config.files["sglang.yaml"])

    assert all(sglang.known_options().kinds[key] in {"value", "flag"} for key in told)
    assert not any(isinstance(one, list | dict) or one in (None, False) for one in told.values())
    assert config.command[:2] == ("--config", sglang.CONFIG_FILE)
    assert config.command[2:] == ("--no-enable-tf32-matmul", "--gc-threshold", "700", "10")
    assert (told["host"], told["port"], told["enable-metrics"]) == ("0.0.0.0", 30000, True)


def test_sglangs_fraction_leaves_room_for_activations():
    plan = rendered("sglang", **L40S).plan
    whole = GPUS["nvidia-l40s"].usable_bytes

    assert 0.5 < plan.gpu_memory_utilization <= 0.9
    static = plan.weights_bytes_per_gpu + plan.kv_cache_bytes
    assert static == int(whole * plan.gpu_memory_utilization)
    assert whole - static >= plan.overhead_bytes + plan.margin_bytes
    packed = sglang.plan(facts(LLAMA_8B), 6 * GIB, ServeOptions(**L40S, format=AWQ))
    assert packed.settings["dtype"] == "float16"


def test_sglang_is_probed_patiently_because_health_generates():
    deployment = next(yaml.safe_load_all(rendered("sglang", **L40S).files["kubernetes.yaml"]))
    container = deployment["spec"]["template"]["spec"]["containers"][0]

    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["timeoutSeconds"] >= 20


def test_tgi_has_larger_blocks_where_flashinfer_has_no_kernel():
    narrow = {**LLAMA_8B, "head_dim": 96}

    assert rendered("tgi", **L40S).plan.kv_bytes_per_request == 8192 * 131072
    odd = rendered("tgi", config=narrow, **{**L40S, "max_model_len": 8000}).plan
    assert odd.kv_bytes_per_request == 8192 * 32 * 8 * 2 * 96 * 2


def test_tgi_takes_gemma_3s_prompts_whole():
    gemma = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    config = rendered("tgi", config={**LLAMA_8B, **gemma}, **L40S)

    # "`max_batch_prefill_tokens` must be >= `max_input_tokens`", where prompts are not divided.
    assert int(config.env["MAX_BATCH_PREFILL_TOKENS"]) >= int(config.env["MAX_INPUT_TOKENS"])


def test_tgi_needs_no_root_for_its_port_and_no_arguments():
    extra = {"max-best-of": 1, "json_output": True}
    config = rendered("tgi", **L40S, extra=extra, kv_cache_dtype="fp8")

    assert any("archived" in note for note in config.plan.notes)
    assert int(config.env["PORT"]) == config.port >= 1024
    assert config.command == ()
    assert (config.env["MAX_BEST_OF"], config.env["JSON_OUTPUT"]) == ("1", "true")
    assert config.env["KV_CACHE_DTYPE"] == "fp8_e4m3fn"


@pytest.mark.parametrize("gpu", ["nvidia-b200", "nvidia-rtx-5090", "nvidia-t4", "amd-mi300x"])
def test_tgi_has_kernels_for_some_gpus_only(gpu):
    with pytest.raises(UsageError, match="no kernels"):
        rendered("tgi", weights=4 * GIB, gpu=gpu, max_model_len=1024, max_num_seqs=1)


def test_tgi_cannot_read_later_tokenizers_and_knows_no_later_models():
    for later, says in (
        ({"tokenizer": {"tokenizer_class": "TokenizersBackend"}}, "transformers 5"),
        ({"model_type": "qwen3"}, "qwen3"),
    ):
        with pytest.raises(InputRefused, match=says):
            rendered("tgi", config={**LLAMA_8B, **later}, **L40S)


@pytest.mark.parametrize(
    ("rope", "told", "refused"),
    [
        ({"rope_type": "default", "rope_theta": 500000.0}, {}, True),
        ({"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}, {}, True),
        ({"full_attention": {"rope_theta": 10000.0}}, {}, True),
        ({"rope_type": "default", "rope_theta": 10000.0}, {}, False),
        ({"rope_type": "default", "rope_theta": 500000.0}, {"rope_theta": 500000.0}, False),
    ],
)
def test_tgi_does_not_read_later_rotations(rope, told, refused):
    plain = {k: v for k, v in LLAMA_8B.items() if k not in ("rope_theta", "rope_scaling")}
    config = {**plain, "rope_parameters": rope, **told}

    if refused:
        with pytest.raises(InputRefused, match="rope_parameters"):
            rendered("tgi", config=config, **L40S)
    else:
        assert rendered("tgi", config=config, **L40S)


def test_nothing_stands_in_trtllms_file_and_arguments():
    config = rendered("trtllm", **L40S)
    told = yaml.safe_load(config.files["trtllm.yaml"])
    given = {word.removeprefix("--") for word in config.command if word.startswith("--")}

    assert config.command[0] == "/models"
    assert config.command[1:3] == ("--host", "0.0.0.0")
    assert not given & set(told)
    assert told["kv_cache_config"]["free_gpu_memory_fraction"] == 0.9
    assert config.command[-2:] == ("--extra_llm_api_options", trtllm.CONFIG_FILE)
    assert set(told) <= set(trtllm.known_options().kinds)
    plan, whole = config.plan, GPUS["nvidia-l40s"].usable_bytes
    free = whole - plan.weights_bytes_per_gpu - plan.overhead_bytes
    assert plan.kv_cache_bytes == int(free * 0.9)
    assert config.served_name == "models"
    with pytest.raises(UsageError, match="no option for another name"):
        rendered("trtllm", **L40S, served_model_name="mine")
