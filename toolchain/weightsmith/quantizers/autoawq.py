"""AWQ by AutoAWQ (archived upstream): a second engine for the layout of `awq`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith.core.errors import UsageError
from weightsmith.core.trees import discard, remove
from weightsmith.core.values import Format, JsonValue
from weightsmith.quantizers.awq_search import patch_searches
from weightsmith.quantizers.checkpoints import (
    LLAMAS,
    awq_config,
    check_group,
    check_grouped,
    finish,
    group_option,
    in_groups,
    keep_option,
    peak_disk,
    zero_point_option,
)
from weightsmith.quantizers.packed import PackedLayout, view_of
from weightsmith.quantizers.packed_check import checked
from weightsmith.quantizers.quantizer import BuilderCommand, Quantizer, QuantizeRequest
from weightsmith.quantizers.running import (
    encoder,
    equal_length,
    python_step,
    read_settings,
    samples,
    texts,
)

AWQ_AUTOAWQ = Format(name="awq-autoawq", kind="awq", bits_per_weight=4.16)


def options(format_: Format, requested: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
    """Return the recipe's options that affect the output; raises UsageError."""
    zero_point_option(format_, requested)
    if keep := keep_option(requested):
        raise UsageError(
            f"keep: {keep[0]} cannot stay in 16 bits, because AutoAWQ scales the inputs of every "
            "matrix",
            hint="use awq or awq-compressed, which support keep",
        )
    return {"group_size": group_option(requested)}


def steps(request: QuantizeRequest) -> tuple[BuilderCommand, ...]:
    """Return the step: AutoAWQ, and conversion of its output by our code."""
    title = f"quantizing to {request.format.name} by AutoAWQ"
    return (python_step(__name__, request, title, group_size=_layout(request).group_size),)


def _layout(request: QuantizeRequest) -> PackedLayout:
    return in_groups(request.model, "awq", request.options.get("group_size"))


def main() -> None:
    """Run in the builder: quantize as set in the settings file of the command line."""
    settings = read_settings()
    raw, model = Path(settings["raw"]), Path(settings["model"])
    discard(raw)
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    library: Any = importlib.import_module("awq")
    patch_searches(importlib.import_module("awq.quantize.quantizer").AwqQuantizer)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    joined = equal_length(samples(texts(settings["calibration"]), encoder(tokenizer)))
    gpu = torch.cuda.is_available()
    loaded = library.AutoAWQForCausalLM.from_pretrained(
        str(model),
        trust_remote_code=False,
        device_map="cuda" if gpu else "cpu",
        **({} if gpu else {"torch_dtype": torch.float32}),
    )
    config = {
        "zero_point": True,
        "q_group_size": settings["group_size"],
        "w_bit": 4,
        "version": "GEMM",
    }
    # AutoAWQ concatenates and splits the samples again; it silently drops samples that are longer
    # than its limit, and an incomplete last one.
    loaded.quantize(
        tokenizer, quant_config=config, calib_data=joined, max_calib_seq_len=len(joined[0]),
        max_calib_samples=len(joined), n_parallel_calib_samples=8,
    )  # fmt: skip
    loaded.save_quantized(str(raw), safetensors=True)
    finish(model, raw, Path(settings["out"]), awq_config(settings["group_size"]))
    remove(raw)


QUANTIZER = Quantizer(
    name="autoawq",
    builder="autoawq",
    formats=(AWQ_AUTOAWQ,),
    recipe_number=5,
    check_input=lambda _format, model: check_grouped(model, LLAMAS),
    steps=steps,
    check=lambda request: checked(request, _layout(request), "autoawq"),
    peak_disk=peak_disk,
    options=options,
    check_options=check_group,
    calibrated=lambda _format, _options: True,
    view=view_of,
)

if __name__ == "__main__":
    main()
