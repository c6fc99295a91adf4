import shlex
from dataclasses import replace

import pytest
import yaml
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.models.facts import Packing
from weightsmith.serving.engine import ServedAdapter, ServeOptions
from weightsmith.serving.machine import machine_for
from weightsmith.serving.memory import GIB
from weightsmith.serving.vllm import ENGINE, check_packing, check_pictures, known_options

from tests.fakes.configs import (
    LLAMA_8B,
    LLAMA_8B_BYTES,
    QWEN3_NEXT,
    config,
    facts,
    shape_of,
)  # fmt: skip
from tests.fakes.rendering import rendered


def plan(model, weight_bytes, wishes):
    return ENGINE.plan(facts(model), weight_bytes, wishes)


def settings_of(made) -> dict:
    return yaml.safe_load(made.files["vllm.yaml"])


def test_keys_have_dashes_and_are_known_to_the_pinned_version():
    wishes = {"gpu": "nvidia-h100-80gb", "gpu_count": 2, "kv_cache_dtype": "fp8"}
    extra = {"enable_prefix_caching": False, "override_generation_config": {"temperature": 0.2}}
    settings = settings_of(rendered("vllm", extra=extra, **wishes))

    assert {key.removeprefix("no-") for key in settings} <= set(known_options().kinds)
    assert None not in settings.values()
    # `vllm serve` drops the first of the two.
    assert settings["enable-prefix-caching"] is False
    assert settings["no-enable-prefix-caching"] is True
    assert settings["override-generation-config"] == {"temperature": 0.2}
    assert settings["tensor-parallel-size"] == 2


@pytest.mark.parametrize(
    ("hidden", "intermediate", "layers", "heads", "vocab", "tied", "weights", "held"),
    [
        (576, 1536, 30, 9, 49152, True, 256, 1550),
        (2048, 8192, 16, 32, 128256, True, 2357, 2552),
        (2048, 8192, 16, 32, 128256, False, 2858, 2543),
        (2048, 8192, 20, 32, 32000, False, 2570, 1821),
    ],
)
def test_what_a_cpu_holds_beside_weights_and_cache(
    hidden, intermediate, layers, heads, vocab, tied, weights, held
):
    """Against the peak of what its control group counted, less weights and cache, in MiB.

    Of vLLM 0.32.0 for CPUs with bfloat16 weights drawn at random, eight requests of 1,500 tokens
    at once, and 2,048 tokens a step, on two CPUs of an EPYC.
    """
    more = {"intermediate_size": intermediate, "vocab_size": vocab, "tie_word_embeddings": tied}
    model = config("LlamaForCausalLM", layers, hidden, heads, 3 if heads == 9 else 8, **more)
    wishes = {"max_model_len": 2048, "max_num_seqs": 8, "host_memory_bytes": 16 * GIB}
    made = plan(model, weights << 20, ServeOptions(**wishes))

    assert held << 20 <= made.overhead_bytes <= 1.2 * (held << 20)


@pytest.mark.parametrize("target", ["vllm-mxfp4a16", "vllm-mxfp8"])
def test_float16_is_left_where_scales_are_exponents(target):
    """Marlin, the kernel of GPUs before Blackwell, multiplies such weights with bfloat16 alone."""
    config = {**LLAMA_8B, "dtype": "float16"}
    made = rendered(target, config=config, gpu="nvidia-l40s", max_model_len=4096)

    assert settings_of(made)["dtype"] == "bfloat16"
    assert any("GPUs before Blackwell" in note for note in made.plan.notes)
    with pytest.raises(UsageError, match=r"no kernel for float16 on nvidia-l40s") as refused:
        rendered(target, config=config, gpu="nvidia-l40s", max_model_len=4096, dtype="float16")
    assert "serve.dtype=bfloat16" in refused.value.hint
    blackwell = rendered(target, config=config, gpu="nvidia-b200", dtype="float16")
    assert settings_of(blackwell)["dtype"] == "float16"


@pytest.mark.parametrize("target", ["vllm-w8a8", "vllm-fp8-block"])
def test_float16_is_left_where_kernels_for_amx_have_none(target):
    """An image for any CPU may start on one with AMX, whose kernel would end the server."""

    def served(target, **options):
        options |= {"config": {**LLAMA_8B, "dtype": "float16"}, "host_memory_bytes": 64 * GIB}
        made = rendered(target, max_model_len=4096, **options)
        said = [note for note in made.plan.notes if "served in bfloat16" in note]
        return settings_of(made)["dtype"], len(said)

    for device in ("cpu", "cpu-amx"):
        assert served(target, gpu=device) == ("bfloat16", 1)
        assert served(target, gpu=device, dtype="bfloat16") == ("bfloat16", 0)
        assert served("vllm-awq", gpu=device) == ("float16", 0)
    assert served(target, gpu="cpu", dtype="float16") == ("float16", 0)
    assert served(target, gpu="nvidia-l40s") == ("float16", 0)
    with pytest.raises(UsageError, match=r"no kernel for float16 on cpu-amx") as refused:
        served(target, gpu="cpu-amx", dtype="float16")
    assert "serve.dtype=bfloat16" in refused.value.hint


@pytest.mark.parametrize(
    ("target", "device", "said"),
    [
        ("vllm-fp8", "cpu", True),
        ("vllm-fp8", "cpu-amx", True),
        ("vllm-mix", "cpu", True),
        ("vllm-fp8-block", "cpu-amx", False),
        ("vllm-w8a8", "cpu", False),
        ("vllm-fp8", "nvidia-l40s", False),
    ],
)
def test_a_plan_says_where_fp8_is_multiplied_one_by_one(target, device, said):
    made = rendered(target, gpu=device, max_model_len=4096, host_memory_bytes=64 * GIB)
    assert any("fp8 weights one by one" in note for note in made.plan.notes) is said


def test_a_cpu_server_gets_its_cache_in_bytes_and_no_more():
    made = rendered("vllm", max_model_len=4096, max_num_seqs=2, host_memory_bytes=64 * GIB)
    settings = settings_of(made)

    # By its own message 160 MiB; a container without the setting has 64, and it ends there.
    assert made.plan.shm_bytes >= 160 << 20
    # 2 requests x 128 blocks of 32 tokens and the null block, 4 MiB each.
    assert settings["kv-cache-memory-bytes"] == (2 * 128 + 1) * 32 * 131072
    assert settings["block-size"] == 32
    assert "gpu-memory-utilization" not in settings
    assert made.env["VLLM_CPU_INT4_W4A8"] == "0"
    assert made.env["TORCH_COMPILE_DISABLE"] == "1"


def test_a_cpu_server_keeps_no_prepared_pictures():
    """By default it would keep 8 GiB of them, whatever memory it has."""
    sees = {**LLAMA_8B, "vision_config": {"hidden_size": 64}}
    wishes = {"host_memory_bytes": 64 * GIB}
    made = rendered("vllm", config=sees, **wishes)

    assert settings_of(made)["mm-processor-cache-gb"] == 0
    assert any("reads pictures" in note for note in made.plan.notes)
    more = rendered("vllm", config=sees, extra={"mm-processor-cache-gb": 1}, **wishes)
    assert settings_of(more)["mm-processor-cache-gb"] == 1
    for other in (rendered("vllm", config=sees, gpu="nvidia-l40s"), rendered("vllm", **wishes)):
        assert "mm-processor-cache-gb" not in settings_of(other)


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"enable-prefx-caching": True}, "no such option"),
        ({"max-num-seqs": 4}, "max_num_seqs"),
        ({"quantization": "awq"}, "quantization"),
        ({"trust_remote_code": True}, "trust-remote-code"),
        ({"api-key": "x"}, "api-key"),
        ({"ssl-certfile": "/tls/cert.pem"}, "probes speak HTTP"),
        ({"seed": None}, "null"),
        ({"disable-log-stats": False}, "no way to say"),
        ({"enforce-eager": "yes"}, "enforce-eager"),
        ({"no-enable-prefix-caching": True}, "set it to false"),
        ({"seed": 1, "--seed": 2}, "twice"),
    ],
)
def test_options_that_vllm_would_misread_are_refused(extra, says):
    with pytest.raises(UsageError) as caught:
        plan(LLAMA_8B, LLAMA_8B_BYTES, ServeOptions(gpu="nvidia-l40s", extra=extra))

    assert says in caught.value.message + caught.value.hint


@pytest.mark.parametrize(("gpu", "version"), [("nvidia-l40s", "0.33.0"), ("cpu", "0.32.0")])
def test_an_unknown_option_gets_near_misses_and_the_version_that_lacks_it(gpu, version):
    wish = ServeOptions(gpu=gpu, extra={"enable_prefix_cachng": True})
    with pytest.raises(UsageError, match=f"vllm {version} has no such option") as caught:
        plan(LLAMA_8B, LLAMA_8B_BYTES, wish)

    assert "enable-prefix-caching" in caught.value.hint


@pytest.mark.parametrize("name", ["--api-key", "-x", " ", "a\nhost: evil", "x\x00"])
def test_a_name_that_is_an_option_or_a_line_is_refused(name):
    with pytest.raises(UsageError, match="served name"):
        rendered("vllm", name=name, gpu="nvidia-l40s")


@pytest.mark.parametrize(
    "name", ["a: b", "x # y", "'q\"", "{{ x }}", "!!python/none", "null", "8k"]
)
def test_no_name_breaks_out_of_the_file(name):
    settings = settings_of(rendered("vllm", name=name, gpu="nvidia-l40s"))

    assert settings["served-model-name"] == name
    assert settings["model"] == "/models"


def test_latent_attention_on_a_cpu_takes_prompts_whole():
    latent = {**LLAMA_8B, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    wishes = ServeOptions(host_memory_bytes=256 * GIB, max_model_len=8192, max_num_seqs=1)

    assert plan(latent, LLAMA_8B_BYTES, wishes).max_num_batched_tokens == 8192
    assert plan(LLAMA_8B, LLAMA_8B_BYTES, wishes).max_num_batched_tokens == 2048


def test_kserves_own_vllm_gets_the_adapters():
    two = tuple(ServedAdapter(name=n, folder=f"adapters/{n}", rank=8) for n in ("bill", "pay"))
    for adapters, model in ((two, "support"), ((replace(two[0], name=""),), "support-base")):
        made = rendered("vllm-lora", gpu="nvidia-l40s", adapters=adapters)
        _, service = yaml.safe_load_all(made.files["kserve.yaml"])
        (container,) = service["spec"]["template"]["containers"]
        words = shlex.split(container["env"][0]["value"])

        assert service["spec"]["model"]["name"] == model
        named = [f"{a.name or 'support'}=/mnt/models/{a.folder}" for a in adapters]
        assert words[words.index("--lora-modules") + 1 :] == named


@pytest.mark.parametrize(
    ("change", "extra", "state"),
    [
        # vLLM's own figures for these shapes: (3, 8192) and (32, 128, 128).
        ({}, {}, 1_097_728),
        ({}, {"mamba-ssm-cache-dtype": "float32"}, 2_146_304),
        ({"mamba_ssm_dtype": "float32"}, {}, 2_146_304),
    ],
)
def test_recurrent_states_may_be_wider_than_the_weights(change, extra, state):
    wishes = ServeOptions(gpu="nvidia-h100-80gb", max_model_len=8192, max_num_seqs=1, extra=extra)
    token = 2 * 2 * 256 * 2
    block = -(-state // (16 * token)) * 16
    # Four groups of twelve layers: one of attention, three with two states each.
    blocks = -(-8192 // block) + 3 * 2

    planned = plan({**QWEN3_NEXT, **change}, 10**10, wishes)

    assert planned.kv_bytes_per_request == blocks * 12 * block * token


def test_a_cpu_keeps_recurrent_states_in_float32():
    wish = ServeOptions(host_memory_bytes=64 * GIB, max_model_len=4096, max_num_seqs=1)
    wide, odd = (
        replace(wish, extra={"mamba-ssm-cache-dtype": dtype}) for dtype in ("float32", "int3")
    )
    plain, told = (plan(QWEN3_NEXT, 10**9, one) for one in (wish, wide))

    assert plain.kv_bytes_per_request == told.kv_bytes_per_request
    with pytest.raises(UsageError, match="mamba-ssm-cache-dtype"):
        plan(QWEN3_NEXT, 10**9, odd)


SHAPE = shape_of(LLAMA_8B)
GPU = machine_for(ServeOptions(gpu="nvidia-l4"), SHAPE)
OLD = machine_for(ServeOptions(gpu="nvidia-a100-80gb"), SHAPE)
CPU = machine_for(ServeOptions(host_memory_bytes=1 << 33), SHAPE)


def packed(method, **more):
    return Packing.of({"quant_method": method, **more})


@pytest.mark.parametrize("machine", [GPU, CPU])
@pytest.mark.parametrize(
    "packing",
    [
        None,
        packed("awq", bits=4, version="gemm", group_size=128),
        packed("gptq", bits=4, sym=True, desc_act=False, group_size=128),
        packed("gptq", bits=4, sym=True, desc_act=True, group_size=-1),
        packed("compressed-tensors"),
    ],
)
def test_what_vllm_loads_everywhere(packing, machine):
    assert check_packing(packing, machine) == ()


@pytest.mark.parametrize(
    ("packing", "says"),
    [
        (packed("gptq", bits=4, desc_act=True, group_size=128), "desc_act"),
        (packed("gptq", bits=4, sym=False), "sym=false"),
        (packed("gptq", bits=3), "3 bits"),
        (packed("awq", bits=8), "8 bits"),
        (packed("gguf"), "gguf"),
        (packed("bitsandbytes"), "bitsandbytes"),
        (packed("fbgemm_fp8"), "fbgemm"),
    ],
)
def test_what_vllm_no_longer_loads(packing, says):
    with pytest.raises(InputRefused, match=says):
        check_packing(packing, GPU)


def test_what_is_slow_or_needs_more_is_noted_or_refused():
    eight = packed("gptq", bits=8, sym=True, group_size=128)
    assert check_packing(eight, GPU) == ()
    with pytest.raises(UsageError, match="CPU"):
        check_packing(eight, CPU)
    assert "group_size 256" in check_packing(packed("gptq", group_size=256), GPU)[0]
    assert "AMX" in check_packing(packed("fp8"), CPU)[0]
    assert check_packing(packed("fp8"), replace(CPU, device="cpu-amx")) == ()
    assert "widened" in check_packing(packed("fp8"), OLD)[0]
    assert check_packing(packed("fp8"), GPU) == ()
    with pytest.raises(UsageError, match="blocks"):
        check_packing(packed("fp8", weight_block_size=[64, 64]), CPU)


GEMMA, SMOLVLM = "Gemma3ForConditionalGeneration", "SmolVLMForConditionalGeneration"


@pytest.mark.parametrize(
    ("architecture", "on_cpu", "told"),
    [(GEMMA, True, True), (GEMMA, False, False), ("LlavaForConditionalGeneration", True, False)],
)
def test_a_plan_says_where_a_picture_is_read_in_one_direction(architecture, on_cpu, told):
    notes = check_pictures(architecture, {}, on_cpu=on_cpu)

    assert "reads pictures" in notes[0]
    assert any("one direction" in note for note in notes) is told


def test_a_server_that_would_not_start_on_a_cpu_is_refused():
    with pytest.raises(UsageError, match="num2words"):
        check_pictures(SMOLVLM, {}, on_cpu=True)

    assert check_pictures(SMOLVLM, {}, on_cpu=False)
    none = {"limit-mm-per-prompt": {"image": 0, "video": 0}}
    assert check_pictures(SMOLVLM, none, on_cpu=True) == []
