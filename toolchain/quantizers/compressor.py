"""FP8 by llm-compressor, with a fixed scale of each matrix's inputs, measured on the text."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain.quantizers.checkpoints import check_config, finish, peak_disk
from toolchain.quantizers.packed import Layout, view_of
from toolchain.quantizers.packed_check import check_checkpoint
from toolchain.quantizers.quantizer import Quantizer, QuantizeRequest, Step
from toolchain.quantizers.running import blocks, encoder, python_step, read_settings, texts
from toolchain.values import Format, Json

FP8_STATIC = Format(name="fp8-static", kind="fp8", bits_per_weight=8.0)
LAYOUT = Layout(method="float-quantized", bits=8, group_size=0, symmetric=True)


def steps(request: QuantizeRequest) -> tuple[Step, ...]:
    """Return the one command: llm-compressor, and our own writing of what it made."""
    title = f"quantizing to {request.format.name} by llm-compressor"
    return (python_step(__name__, request, title),)


def check(request: QuantizeRequest) -> Mapping[str, Json]:
    """Re-read the finished checkpoint against its original; raises CheckFailed."""
    found = check_checkpoint(request.output, request.model, LAYOUT)
    return {**found, "engine": "llm-compressor"}


def main() -> None:
    """Run in the builder: quantize by the settings file that the command line names."""
    told = read_settings()
    raw, model, out = Path(told["raw"]), Path(told["model"]), Path(told["out"])
    shutil.rmtree(raw, ignore_errors=True)
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    datasets: Any = importlib.import_module("datasets")
    library: Any = importlib.import_module("llmcompressor")
    modifiers: Any = importlib.import_module("llmcompressor.modifiers.quantization")
    modifier = modifiers.QuantizationModifier
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
        recipe=[modifier(scheme="FP8", targets="Linear", ignore=["lm_head"])],
        max_seq_length=max(map(len, samples)),
        num_calibration_samples=len(samples),
    )
    network.save_pretrained(raw, save_compressed=True)
    saved = json.loads((raw / "config.json").read_text("utf-8"))["quantization_config"]
    finish(model, raw, out, saved)
    shutil.rmtree(raw)


def _leave_memory_unpinned(torch: Any) -> None:
    """Without a GPU there is none to pin memory for; 0.14 asks for one (pipelines/cache.py)."""
    if torch.accelerator.is_available():
        return
    cache: Any = importlib.import_module("llmcompressor.pipelines.cache").IntermediatesCache
    cache.pin_memory = lambda *_args, **_named: None


QUANTIZER = Quantizer(
    name="compressor",
    builder="compressor",
    formats=(FP8_STATIC,),
    recipe_number=1,
    check_input=check_config,
    steps=steps,
    check=check,
    peak_disk=peak_disk,
    calibrated=lambda _format, _options: True,
    view=view_of,
)

if __name__ == "__main__":
    main()
