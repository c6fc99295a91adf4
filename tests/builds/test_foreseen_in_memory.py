"""Plans: of a base without its weights, of one that the merge dequantizes, and with times."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from weightsmith.api.commands.plan import table
from weightsmith.building.explain import plan_of
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.stages import quantize

from tests.fakes.memory import Memory

TARGETS = ("llamacpp-q4_k_m", "vllm-awq", "vllm", "llamacpp-lora", "vllm-awq-lora")
SIZES = ("read_bytes", "write_bytes", "peak_memory_bytes", "disk_bytes")


def without_weights(memory: Memory) -> None:
    (memory.home / "base/model.safetensors").unlink()


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_its_sizes_are_those_of_the_weights(memory: Memory, target: str, adapters: bool) -> None:
    if target.endswith("lora") and not adapters:
        pytest.skip("adapters are what it serves")
    if not adapters:
        memory.write_recipe(adapters=None)
    here = memory.forecast(targets=[target])
    without_weights(memory)
    away = memory.forecast(targets=[target])

    stages = [(row["stage"], row["target"]) for row in here["stages"]]
    assert [(row["stage"], row["target"]) for row in away["stages"]] == stages
    for known, expected in zip(here["stages"], away["stages"], strict=True):
        for size in SIZES:
            # Headers and norms are left out, which count in a model of two megabytes.
            assert expected[size] == pytest.approx(known[size], rel=0.05, abs=20_000)
    assert away["serving"][target]["weight_bytes"] == pytest.approx(
        here["serving"][target]["weight_bytes"], rel=0.05
    )
    assert not any(row["cached"] for row in away["stages"])


def test_it_says_that_its_sizes_are_worked_out_and_is_measured(memory: Memory) -> None:
    without_weights(memory)
    found = memory.forecast(targets=["llamacpp-q4_k_m"], measure=True)

    assert "worked out from config.json" in found["stages"][0]["why"]
    text = table(found)
    assert "by the files' size" not in text
    assert "note: no weights there: their size is worked out from config.json" in text
    assert memory.jobs() == ["layer_time"]
    assert {row["stage"] for row in found["stages"] if row["seconds"]} >= {"validate", "quality"}


def test_a_tokenizer_that_llamacpp_cannot_know_is_refused_before_the_merge(memory: Memory) -> None:
    splits = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    data = json.dumps({"model": splits, "pre_tokenizer": {"type": "Whitespace"}})
    (memory.home / "base/tokenizer.json").write_text(data)

    with pytest.raises(InputRefused, match="does not know how") as refused:
        memory.forecast(targets=["llamacpp-q4_k_m"])
    assert refused.value.exit_code == 3
    assert memory.jobs() == []
    memory.forecast(targets=["vllm"])


def test_an_index_says_it_exactly(memory: Memory) -> None:
    without_weights(memory)
    index = {"metadata": {"total_size": 7_000_000_000}, "weight_map": {}}
    (memory.home / "base/model.safetensors.index.json").write_text(json.dumps(index))
    found = memory.forecast(targets=["vllm"])

    assert found["serving"]["vllm"]["weight_bytes"] == 3_500_000_000  # float32, served in 16 bits
    assert "model.safetensors.index.json's" in found["stages"][0]["why"]


def test_an_adapter_of_another_width_is_refused(memory: Memory) -> None:
    config = memory.home / "base/config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps({**told, "hidden_size": 512}))
    without_weights(memory)

    with pytest.raises(InputRefused, match=r"q_proj.* takes 256 inputs.* hidden size is 512"):
        memory.forecast(targets=["llamacpp-q4_k_m"])


def test_a_gemma_that_llama_cpp_scales_otherwise_is_planned_with_a_warning(memory: Memory) -> None:
    config = memory.home / "base/config.json"
    told = json.loads(config.read_text()) | {"architectures": ["Gemma3ForCausalLM"]}
    config.write_text(json.dumps(told))
    memory.forecast(targets=["llamacpp-q4_k_m", "vllm"])

    (said,) = [text for text in memory.progress.warnings if "attention" in text]
    assert said.startswith("llamacpp-q4_k_m: llama.cpp divides")
    assert said.endswith("so its answers will differ; choose target vllm")
    assert memory.jobs() == []


def test_weights_as_pickles_are_refused_as_in_a_build(memory: Memory) -> None:
    without_weights(memory)
    (memory.home / "base/pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputRefused, match=r"pytorch_model\.bin"):
        memory.forecast(targets=["llamacpp-q4_k_m"])


def quantize_base(memory: Memory) -> int:
    """Store the base's matrices in 8-bit floats, and return the size of their files in 16 bits."""
    folder = memory.home / "base"
    tensors, whole = load_file(folder / "model.safetensors"), 0
    for name, tensor in list(tensors.items()):
        whole += 2 * tensor.numel()
        if tensor.dim() == 2 and "proj" in name:
            tensors[name] = tensor.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    packing = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": packing}))
    return whole


def test_of_a_dequantized_base_everything_can_be_made(memory: Memory) -> None:
    """DeepSeek-V3 is published in 8-bit floats alone."""
    whole = quantize_base(memory)
    memory.write_recipe(merge={"quantized_base": "dequantize"})
    plan = memory.forecast(targets=["llamacpp-q8_0", "llamacpp-f16"])["serving"]

    assert plan["llamacpp-f16"]["weight_bytes"] == pytest.approx(whole, rel=0.1)
    assert plan["llamacpp-q8_0"]["weight_bytes"] == pytest.approx(whole * 8.5 / 16, rel=0.1)
    memory.write_recipe(merge={"quantized_base": "refuse"})
    with pytest.raises(InputRefused, match="quantized"):
        memory.forecast(targets=["llamacpp-q8_0"])


@pytest.fixture
def whole(memory: Memory) -> int:
    """Quantize the base, and return the size of the merge's weights, which are in 32 bits."""
    size = 2 * quantize_base(memory)
    memory.write_recipe(merge={"quantized_base": "dequantize"})
    return size


def test_what_runs_beside_validation_reads_the_dequantized_weights(
    memory: Memory, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def needed(_model: Any, size: int, _options: Any) -> int:
        sizes.append(size)
        return 1 << 30

    monkeypatch.setattr(quantize, "quantize_memory", needed)
    memory.two_at_once = True
    memory.runner.prepare("gguf", memory.progress)

    assert memory.forecast(targets=["llamacpp-q4_k_m"])["stages"]
    assert sizes
    assert sizes == pytest.approx([whole] * len(sizes), rel=0.1)


def test_a_file_that_fits_no_layer_once_dequantized_is_refused(memory: Memory, whole: int) -> None:
    def check(size: float) -> None:
        request = memory.request(f"image.max_layer_size={int(size)}", targets=["llamacpp-f16"])
        plan_of(request, memory.tools)

    check(1.1 * whole / 2)  # a GGUF file of 16 bits
    with pytest.raises(UsageError, match="one layer") as caught:
        check(0.9 * whole / 2)
    assert "quantize.split_max_size" in caught.value.hint


def test_scales_of_a_cache_are_measured_on_the_dequantized_weights(
    memory: Memory, whole: int
) -> None:
    (memory.home / "texts.jsonl").write_text('{"text": "The lamp blinks twice."}\n' * 12)
    memory.write_recipe(merge={"quantized_base": "dequantize"}, calibration={"data": "texts.jsonl"})
    row = memory.planned("cache-scales", "serve.kv_cache_dtype=fp8", targets=["vllm"])

    assert row["read_bytes"] == pytest.approx(whole, rel=0.1)


def test_stages_that_run_the_model_have_times(memory: Memory) -> None:
    plain, timed = memory.forecast(), memory.forecast(measure=True)

    seconds = {row["stage"]: row["seconds"] for row in timed["stages"]}
    assert {stage for stage, value in seconds.items() if value} == {
        "validate", "reference", "quality",
    }  # fmt: skip
    # A pass with a token of each of eight probes takes at least 80 layers of half a second.
    assert seconds["validate"] > 16 * 80 * 0.5
    assert timed["layer_time"]["layers"] == 80
    assert memory.jobs() == ["layer_time"]
    json.dumps(timed, allow_nan=False)
    assert "one of 80 layers took 0.5 s for 8 tokens" in table(timed).replace("\n", " ")
    assert "min" in table(timed)
    assert "layer_time" not in plain
    assert "time" not in table(plain).splitlines()[2]


def test_what_is_cached_takes_no_time(memory: Memory) -> None:
    memory.build()
    found = memory.forecast(measure=True)

    assert {row["seconds"] for row in found["stages"] if row["cached"]} == {None}
