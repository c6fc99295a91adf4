"""AWQ and GPTQ by GPTQModel, on a CPU or a GPU: 4-bit checkpoints for vLLM, TGI and SGLang."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from toolchain.quantizers.checkpoints import (
    check_grouped,
    finish,
    group_option,
    group_size,
    peak_disk,
)
from toolchain.quantizers.packed import Layout, PackedView
from toolchain.quantizers.packed_check import check_checkpoint
from toolchain.quantizers.quantizer import Quantizer, QuantizeRequest, Step, View
from toolchain.quantizers.running import blocks, python_step, read_settings, texts
from toolchain.values import Format, Json

# 4 bits, a 16-bit scale and a 4-bit zero per 128 inputs; embeddings stay as they are.
AWQ = Format(name="awq", kind="awq", bits_per_weight=4.25)
GPTQ = Format(name="gptq", kind="gptq", bits_per_weight=4.25)


def options(format_: Format, wanted: Mapping[str, Json]) -> Mapping[str, Json]:
    """Return the recipe's wishes that change these formats' bytes."""
    found = {"group_size": group_option(wanted)}
    return found | ({"zero_point": wanted.get("zero_point", True)} if format_ == AWQ else {})


def steps(request: QuantizeRequest) -> tuple[Step, ...]:
    """Return the one command: GPTQModel, and our own writing of what it made."""
    return (
        python_step(
            __name__,
            request,
            f"quantizing to {request.format.name} by GPTQModel",
            method=request.format.name,
            layout=_told(_layout(request)),
        ),
    )


def check(request: QuantizeRequest) -> Mapping[str, Json]:
    """Re-read the finished checkpoint against its original; raises CheckFailed."""
    found = check_checkpoint(request.output, request.model, _layout(request))
    return {**found, "engine": "gptqmodel"}


def view(folder: Path, _model: Path) -> View:
    """Return the finished checkpoint's tensors for the quality gate."""
    return PackedView(folder)


def _layout(request: QuantizeRequest) -> Layout:
    import json

    config = json.loads((request.model / "config.json").read_text("utf-8"))
    method = request.format.name
    return Layout(
        method=method,
        bits=4,
        group_size=group_size(config, request.options.get("group_size")),
        symmetric=method == "gptq" or not request.options.get("zero_point", True),
    )


def _told(layout: Layout) -> dict[str, Json]:
    return {"group_size": layout.group_size, "symmetric": layout.symmetric}


def main() -> None:
    """Run in the builder: quantize by the settings file that the command line names."""
    told = read_settings()
    group, symmetric = int(told["layout"]["group_size"]), bool(told["layout"]["symmetric"])
    raw, out, model = Path(told["raw"]), Path(told["out"]), Path(told["model"])
    shutil.rmtree(raw, ignore_errors=True)
    # With fewer it stops on two cores: "requests 2 workers but parent only has 1".
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    _quantize(told["method"], model, raw, told["calibration"], group, symmetric=symmetric)
    if told["method"] == "awq":
        quantization = awq_config(group, zero_point=not symmetric)
    else:
        quantization = {
            "quant_method": "gptq", "bits": 4, "group_size": group, "sym": True,
            "desc_act": False, "lm_head": False, "checkpoint_format": "gptq",
        }  # fmt: skip
    finish(model, raw, out, quantization, lambda _done, _total: None)
    shutil.rmtree(raw)


def awq_config(group: int, *, zero_point: bool) -> dict[str, Json]:
    """Return the quantization_config of AutoAWQ's GEMM layout, as its readers know it."""
    return {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group,
        "zero_point": zero_point, "modules_to_not_convert": None,
    }  # fmt: skip


def _quantize(
    method: str, model: Path, raw: Path, calibration: str, group: int, *, symmetric: bool
) -> None:
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    library: Any = importlib.import_module("gptqmodel")
    configs: Any = importlib.import_module("gptqmodel.quantization.config")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    encode = partial(_encode, tokenizer)
    samples = [
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
        for ids in blocks(texts(calibration), encode)
    ]
    gpu = torch.cuda.is_available()
    if method == "awq":
        wanted = configs.AWQConfig(
            bits=4, group_size=group, format=configs.FORMAT.GEMM, sym=symmetric
        )
        backend = library.BACKEND.AUTO if gpu else library.BACKEND.AWQ_TORCH
        # 16-bit arithmetic is emulated on most CPUs; the kernel that packs takes any type.
        kernel = importlib.import_module("gptqmodel.nn_modules.qlinear.torch_awq").AwqTorchLinear
        kernel.SUPPORTS_DTYPES = [*kernel.SUPPORTS_DTYPES, torch.float32]
    else:
        wanted = configs.GPTQConfig(bits=4, group_size=group, desc_act=False, sym=True)
        backend = library.BACKEND.AUTO if gpu else library.BACKEND.GPTQ_TORCH
    wanted.device = "cuda" if gpu else "cpu"
    dtype = "auto" if gpu else torch.float32
    loaded = library.GPTQModel.load(str(model), wanted, trust_remote_code=False, dtype=dtype)
    loaded.quantize(
        samples, batch_size=1, calibration_data_min_length=1, tokenizer=tokenizer, backend=backend
    )
    loaded.save(str(raw))


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


QUANTIZER = Quantizer(
    name="gptqmodel",
    builder="gptqmodel",
    formats=(AWQ, GPTQ),
    recipe_number=1,
    check_input=check_grouped,
    steps=steps,
    check=check,
    peak_disk=peak_disk,
    options=options,
    calibrated=lambda _format, _options: True,
    view=view,
)

if __name__ == "__main__":
    sys.exit(main())
