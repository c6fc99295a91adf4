"""FP8 and 4 bits in compressed-tensors' layouts by llm-compressor, for vLLM.

`fp8-static` has a fixed, calibrated input scale per matrix; `awq-compressed` moves scales between
layers like AWQ and packs groups of inputs (scheme W4A16_ASYM).
"""

from __future__ import annotations

import importlib
import json
from functools import partial
from typing import Any

from weightsmith.core.trees import discard
from weightsmith.core.values import PACKED, Format, JsonValue
from weightsmith.models.facts import read_facts
from weightsmith.quantizers import checkpoints, running
from weightsmith.quantizers.architectures import LLAMAS
from weightsmith.quantizers.packed import PackedLayout, view_of
from weightsmith.quantizers.packed_check import checked
from weightsmith.quantizers.quantizer import Options, Quantizer, QuantizeRequest

FP8_STATIC = Format(name="fp8-static", kind="fp8", bits_per_weight=8.0)
AWQ_COMPRESSED = Format(name="awq-compressed", kind="awq", bits_per_weight=4.16, layout=PACKED)


def _options(format_: Format, requested: Options) -> Options:
    found: dict[str, JsonValue] = {"keep": checkpoints.keep_option(requested)}
    if format_ == AWQ_COMPRESSED:
        found |= {
            "group_size": checkpoints.group_option(requested),
            "zero_point": bool(requested.get("zero_point", True)),
        }
    return found


def _layout(request: QuantizeRequest) -> PackedLayout:
    if request.format == FP8_STATIC:
        return PackedLayout(
            method="float-quantized", bits=8, group_size=0, symmetric=True, inputs=True
        )
    model = read_facts(request.model)
    return PackedLayout(
        method=PACKED,
        bits=4,
        group_size=checkpoints.group_size(model, request.options.get("group_size")),
        symmetric=not request.options.get("zero_point", True),
        rescaled=True,
    )


def main() -> None:
    """Run in the builder: quantize as set in the settings file of the command line."""
    settings = running.read_settings()
    raw, model = settings.raw, settings.model
    discard(raw)
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    datasets: Any = importlib.import_module("datasets")
    library: Any = importlib.import_module("llmcompressor")
    if not torch.accelerator.is_available():
        # Version 0.14 needs a GPU for pinned memory (pipelines/cache.py).
        cache: Any = importlib.import_module("llmcompressor.pipelines.cache").IntermediatesCache
        cache.pin_memory = lambda *_args, **_named: None
    gpu = torch.cuda.is_available()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    read = running.samples(running.texts(settings.calibration), tokenizer)
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in read]
    network = transformers.AutoModelForCausalLM.from_pretrained(
        model, trust_remote_code=False, dtype="auto" if gpu else torch.float32
    )
    ignored = ["lm_head", *checkpoints.kept_modules(model, settings.keep)]
    modifiers: Any = importlib.import_module("llmcompressor.modifiers.quantization")
    if settings.method == FP8_STATIC.name:
        quantized = modifiers.QuantizationModifier(scheme="FP8", targets="Linear", ignore=ignored)
        recipe = [quantized]
    else:
        awq: Any = importlib.import_module("llmcompressor.modifiers.transform.awq")
        weights = {
            "num_bits": 4, "type": "int", "strategy": "group", "dynamic": False,
            "group_size": settings.group_size, "symmetric": settings.symmetric,
        }  # fmt: skip
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        quantized = modifiers.QuantizationModifier(config_groups=groups, ignore=ignored)
        recipe = [awq.AWQModifier(), quantized]
    library.oneshot(
        model=network,
        tokenizer=tokenizer,
        dataset=datasets.Dataset.from_list(rows),
        recipe=recipe,
        max_seq_length=max(map(len, read)),
        num_calibration_samples=len(read),
        # Shuffling changes the last bits of sums of activations.
        shuffle_calibration_samples=False,
    )
    network.save_pretrained(raw, save_compressed=True)
    saved = json.loads((raw / "config.json").read_text("utf-8"))["quantization_config"]
    checkpoints.finish(model, raw, settings.out, saved)


QUANTIZER = Quantizer(
    name="compressor",
    builder="compressor",
    formats=(FP8_STATIC, AWQ_COMPRESSED),
    recipe_number=4,
    check_input=lambda _format, model: checkpoints.check_config(model, LLAMAS),
    steps=lambda request: running.python_step(
        __name__,
        request,
        f"quantizing to {request.format.name} by llm-compressor",
        method=request.format.name,
        group_size=_layout(request).group_size,
        symmetric=_layout(request).symmetric,
    ),
    check=lambda request: checked(request, _layout(request), "llm-compressor"),
    peak_disk=checkpoints.peak_disk,
    options=_options,
    beside_adapters=lambda format_, chosen: (
        checkpoints.refuse_scales(format_, chosen) if format_ == AWQ_COMPRESSED else chosen
    ),
    check_options=checkpoints.check_group,
    calibrated=lambda _format, _options: True,
    view=partial(view_of, rescaled=True),
)

if __name__ == "__main__":
    main()
