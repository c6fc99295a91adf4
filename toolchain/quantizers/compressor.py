"""Calibrated compressed-tensors checkpoints for vLLM by llm-compressor: AWQ, and FP8 with scales.

`w4a16` is AWQ in compressed-tensors' layout (pack-quantized, a zero per group); `fp8-static` has a
fixed scale for each layer's activations, measured on the calibration text.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain.quantizers.checkpoints import (
    check_group,
    check_grouped,
    finish,
    group_option,
    group_size,
    peak_disk,
)
from toolchain.quantizers.packed import Layout, view_of
from toolchain.quantizers.packed_check import check_checkpoint
from toolchain.quantizers.quantizer import Quantizer, QuantizeRequest, Step
from toolchain.quantizers.running import blocks, encoder, python_step, read_settings, texts
from toolchain.values import Format, Json

W4A16 = Format(name="w4a16", kind="compressed-tensors", bits_per_weight=4.16)
FP8_STATIC = Format(name="fp8-static", kind="fp8", bits_per_weight=8.0)


def options(format_: Format, wanted: Mapping[str, Json]) -> Mapping[str, Json]:
    """Return the recipe's wishes that change the bytes."""
    return {"group_size": group_option(wanted)} if format_ == W4A16 else {}


def steps(request: QuantizeRequest) -> tuple[Step, ...]:
    """Return the one command: llm-compressor, and our own writing of what it made."""
    title = f"quantizing to {request.format.name} by llm-compressor"
    group = _layout(request).group_size
    return (python_step(__name__, request, title, method=request.format.name, group=group),)


def check(request: QuantizeRequest) -> Mapping[str, Json]:
    """Re-read the finished checkpoint against its original; raises CheckFailed."""
    found = check_checkpoint(request.output, request.model, _layout(request))
    return {**found, "engine": "llm-compressor"}


def _layout(request: QuantizeRequest) -> Layout:
    if request.format.name == FP8_STATIC.name:
        return Layout(method="float-quantized", bits=8, group_size=0, symmetric=True)
    config = json.loads((request.model / "config.json").read_text("utf-8"))
    group = group_size(config, request.options.get("group_size"))
    return Layout(method="pack-quantized", bits=4, group_size=group, symmetric=False)


def main() -> None:
    """Run in the builder: quantize by the settings file that the command line names."""
    told = read_settings()
    raw, model, out = Path(told["raw"]), Path(told["model"]), Path(told["out"])
    shutil.rmtree(raw, ignore_errors=True)
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    datasets: Any = importlib.import_module("datasets")
    library: Any = importlib.import_module("llmcompressor")
    _leave_memory_unpinned(torch)
    gpu = torch.cuda.is_available()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    samples = blocks(texts(told["calibration"]), encoder(tokenizer))
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples]
    network = transformers.AutoModelForCausalLM.from_pretrained(
        model, trust_remote_code=False, dtype="auto" if gpu else torch.float32
    )
    library.oneshot(
        model=network,
        tokenizer=tokenizer,
        dataset=datasets.Dataset.from_list(rows),
        recipe=_recipe(told["method"], int(told["group"])),
        max_seq_length=max(map(len, samples)),
        num_calibration_samples=len(samples),
    )
    network.save_pretrained(raw, save_compressed=True)
    saved = json.loads((raw / "config.json").read_text("utf-8"))["quantization_config"]
    finish(model, raw, out, saved)
    shutil.rmtree(raw)


def _recipe(method: str, group: int) -> list[Any]:
    modifiers: Any = importlib.import_module("llmcompressor.modifiers.quantization")
    if method == FP8_STATIC.name:
        return [modifiers.QuantizationModifier(scheme="FP8", targets="Linear", ignore=["lm_head"])]
    scaling: Any = importlib.import_module("llmcompressor.modifiers.transform.awq")
    schemes: Any = importlib.import_module("compressed_tensors.quantization")
    weights = schemes.QuantizationArgs(
        num_bits=4, type="int", symmetric=False, strategy="group", group_size=group
    )
    groups = {"group_0": schemes.QuantizationScheme(targets=["Linear"], weights=weights)}
    return [
        scaling.AWQModifier(),
        modifiers.QuantizationModifier(config_groups=groups, ignore=["lm_head"]),
    ]


def _leave_memory_unpinned(torch: Any) -> None:
    """Without a GPU there is none to pin memory for; 0.14 asks for one (pipelines/cache.py)."""
    if torch.accelerator.is_available():
        return
    cache: Any = importlib.import_module("llmcompressor.pipelines.cache").IntermediatesCache
    cache.pin_memory = lambda *_args, **_named: None


QUANTIZER = Quantizer(
    name="compressor",
    builder="compressor",
    formats=(W4A16, FP8_STATIC),
    recipe_number=1,
    check_input=check_grouped,
    steps=steps,
    check=check,
    peak_disk=peak_disk,
    options=options,
    check_options=check_group,
    calibrated=lambda _format, _options: True,
    view=view_of,
)

if __name__ == "__main__":
    main()
