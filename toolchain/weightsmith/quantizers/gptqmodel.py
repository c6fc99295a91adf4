"""AWQ and GPTQ by GPTQModel, on a CPU or a GPU: 4-bit checkpoints for vLLM, TGI and SGLang."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightsmith.checkpoints.facts import ModelFacts, read_facts
from weightsmith.quantizers.awq_search import best_clip
from weightsmith.quantizers.checkpoints import (
    DENSE,
    awq_config,
    check_group,
    check_grouped,
    finish,
    group_option,
    group_size,
    peak_disk,
    row_lengths,
    zero_point_option,
)
from weightsmith.quantizers.packed import Layout, view_of
from weightsmith.quantizers.packed_check import check_checkpoint
from weightsmith.quantizers.quantizer import Quantizer, QuantizeRequest, Step
from weightsmith.quantizers.running import (
    encoder,
    even,
    python_step,
    read_settings,
    samples,
    texts,
)
from weightsmith.quantizers.unquantized import keep_option, kept_modules, negative_patterns
from weightsmith.trees import discard, remove
from weightsmith.values import AWQ, GPTQ, Format, Json

NO_AWQ = frozenset({"Cohere2ForCausalLM", "Gemma3ForCausalLM"})
"""What its AWQ cannot do: norms of layers in parallel, rotations that differ between layers."""
_WIDE = 3072
"""Weights of the longest row."""


def options(format_: Format, wanted: Mapping[str, Json]) -> Mapping[str, Json]:
    """Return the recipe's wishes that change these formats' bytes."""
    if format_ == AWQ:
        zero_point_option(format_, wanted)
    return {"group_size": group_option(wanted), "keep": keep_option(wanted)}


def steps(request: QuantizeRequest) -> tuple[Step, ...]:
    """Return the one command: GPTQModel, and our own writing of what it made."""
    return (
        python_step(
            __name__,
            request,
            f"quantizing to {request.format.name} by GPTQModel",
            method=request.format.kind,
            group_size=_layout(request).group_size,
            keep=request.options.get("keep", []),
        ),
    )


def check_input(format_: Format, model: ModelFacts) -> None:
    """Refuse architectures that are not known, and rows that no group size divides."""
    check_grouped(model, DENSE - NO_AWQ if format_ == AWQ else DENSE)


def check(request: QuantizeRequest) -> Mapping[str, Json]:
    """Re-read the finished checkpoint against its original; raises CheckFailed."""
    keep = tuple(request.options.get("keep", ()))
    found = check_checkpoint(request.output, request.model, _layout(request), keep)
    return {**found, "engine": "gptqmodel"}


def _layout(request: QuantizeRequest) -> Layout:
    model = read_facts(request.model)
    method = request.format.kind
    return Layout(
        method=method,
        bits=4,
        group_size=group_size(model, request.options.get("group_size")),
        symmetric=method == "gptq",
    )


def main() -> None:
    """Run in the builder: quantize by the settings file that the command line names."""
    settings = read_settings()
    group, keep = int(settings["group_size"]), list(settings["keep"])
    raw, out, model = Path(settings["raw"]), Path(settings["out"]), Path(settings["model"])
    discard(raw)
    # With fewer it stops on two cores: "requests 2 workers but parent only has 1".
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    if settings["method"] == "gptq" and _is_narrow(model):  # read when torch is imported, below
        os.environ["OMP_NUM_THREADS"] = "1"
    _quantize(settings["method"], model, raw, settings["calibration"], group, keep)
    kept = kept_modules(model, keep)
    if settings["method"] == "awq":
        quantization = awq_config(group, kept)
    else:
        quantization = {
            "quant_method": "gptq", "bits": 4, "group_size": group, "sym": True,
            "desc_act": False, "lm_head": False, "checkpoint_format": "gptq",
        }  # fmt: skip
        if kept:  # vLLM and SGLang read the first, TGI the second
            quantization["dynamic"] = negative_patterns(keep)
            quantization["modules_to_not_convert"] = kept
    finish(model, raw, out, quantization)
    remove(raw)


def _quantize(
    method: str, model: Path, raw: Path, calibration: str, group: int, keep: list[str]
) -> None:
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    library: Any = importlib.import_module("gptqmodel")
    configs: Any = importlib.import_module("gptqmodel.quantization.config")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    read = samples(texts(calibration), encoder(tokenizer))
    if method == "awq":
        # Of samples that are not of one length it searches by the last alone, and says nothing
        # (looper/awq_processor.py, _layer_input_features).
        read = even(read)
    rows = [
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
        for ids in read
    ]
    gpu = torch.cuda.is_available()
    dynamic = negative_patterns(keep) or None
    if method == "awq":
        wanted = configs.AWQConfig(
            bits=4, group_size=group, format=configs.FORMAT.GEMM, sym=False, dynamic=dynamic
        )
        backend = library.BACKEND.AUTO if gpu else library.BACKEND.AWQ_TORCH
        # 16-bit arithmetic is emulated on most CPUs; the kernel that packs takes any type.
        _let_cpu_copy(torch)
        _clip_by_gram(importlib.import_module("gptqmodel.looper.awq_processor").AWQProcessor)
        kernel = importlib.import_module("gptqmodel.nn_modules.qlinear.torch_awq").AwqTorchLinear
        kernel.SUPPORTS_DTYPES = [*kernel.SUPPORTS_DTYPES, torch.float32]
    else:
        # `mse`: a group's scale is that of the least squared error, not that of its largest weight.
        wanted = configs.GPTQConfig(
            bits=4, group_size=group, desc_act=False, sym=True, mse=2.0, dynamic=dynamic
        )
        backend = library.BACKEND.AUTO if gpu else library.BACKEND.GPTQ_TORCH
    wanted.device = "cuda" if gpu else "cpu"
    wanted.pack_impl = "original"  # the others compile a C++ extension each time
    dtype = "auto" if gpu else torch.float32
    loaded = library.GPTQModel.load(str(model), wanted, trust_remote_code=False, dtype=dtype)
    loaded.quantize(
        rows, batch_size=1, calibration_data_min_length=1, tokenizer=tokenizer, backend=backend
    )
    loaded.save(str(raw))


def _is_narrow(model: Path) -> bool:
    """Say whether GPTQ's steps, a column of a matrix each, are too small to be shared by threads.

    With rows of 576 and 1536 weights two threads took 114 s for what one did in 64; with 2048 and
    5632 they took 49 for 59.
    """
    return max(row_lengths(read_facts(model)).values()) < _WIDE


def _let_cpu_copy(torch: Any) -> None:
    """Make `tensor.cpu()` a copy on a CPU as well, where it is the tensor itself.

    GPTQModel keeps a layer's weights by it while it tries 20 scales on them in place, and puts
    them back after each (looper/awq_processor.py, _compute_best_scale of 7.6 and 7.7): in float32
    on a CPU, all 20 roundings stayed.
    """
    own = torch.Tensor.cpu
    torch.Tensor.cpu = lambda tensor, *args, **named: own(tensor, *args, **named).clone()


def _clip_by_gram(search: Any) -> None:
    """Give GPTQModel's AWQProcessor the search for clipping that AutoAWQ has here."""
    search._compute_best_clip = lambda own, weight, inputs: best_clip(  # noqa: SLF001
        own.qcfg.group_size, own.pseudo_quantize_tensor, weight, inputs
    )


QUANTIZER = Quantizer(
    name="gptqmodel",
    builder="gptqmodel",
    formats=(AWQ, GPTQ),
    recipe_number=9,
    check_input=check_input,
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
