"""Plans of builds whose base is quantized, and which the merge dequantizes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from weightsmith.building.explain import forecast, plan_of
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.stages import quantize

from tests.fakes.memory import Memory


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
    asked = memory.request(targets=["llamacpp-q8_0", "llamacpp-f16"])

    plan = forecast(asked.file, asked.targets, memory.dist, memory.tools)["serving"]

    assert plan["llamacpp-f16"]["weight_bytes"] == pytest.approx(whole, rel=0.1)
    assert plan["llamacpp-q8_0"]["weight_bytes"] == pytest.approx(whole * 8.5 / 16, rel=0.1)
    memory.write_recipe(merge={"quantized_base": "refuse"})
    asked = memory.request(targets=["llamacpp-q8_0"])
    with pytest.raises(InputRefused, match="quantized"):
        forecast(asked.file, asked.targets, memory.dist, memory.tools)


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
    asked = memory.request(targets=["llamacpp-q4_k_m"])
    memory.runner.prepare("gguf", memory.progress)

    plan = forecast(asked.file, asked.targets, memory.dist, memory.tools)

    assert plan["stages"]
    assert sizes
    assert sizes == pytest.approx([whole] * len(sizes), rel=0.1)


def test_a_file_that_fits_no_layer_once_dequantized_is_refused(memory: Memory, whole: int) -> None:
    def check(size: float) -> None:
        request = memory.request(f"image.max_layer_size={int(size)}", targets=["llamacpp-f16"])
        plan_of(request, memory.tools)

    check(1.1 * whole / 2)  # a GGUF file of 16 bits
    with pytest.raises(UsageError, match="one layer"):
        check(0.9 * whole / 2)


def test_scales_of_a_cache_are_measured_on_the_dequantized_weights(
    memory: Memory, whole: int
) -> None:
    (memory.home / "texts.jsonl").write_text('{"text": "The lamp blinks twice."}\n' * 12)
    memory.write_recipe(merge={"quantized_base": "dequantize"}, calibration={"data": "texts.jsonl"})
    asked = memory.request("serve.kv_cache_dtype=fp8", targets=["vllm"])

    plan = forecast(asked.file, asked.targets, memory.dist, memory.tools)
    (row,) = (row for row in plan["stages"] if row["stage"] == "cache-scales")

    assert row["read_bytes"] == pytest.approx(whole, rel=0.1)
