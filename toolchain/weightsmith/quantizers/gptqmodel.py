"""AWQ and GPTQ by GPTQModel, on a CPU or a GPU: a second engine for the layouts of both.

A target's name states what changes the bytes, so a second tool is a target of its own and not an
option.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from weightsmith.core.trees import discard
from weightsmith.core.values import Format
from weightsmith.models.facts import read_facts
from weightsmith.quantizers import checkpoints, running
from weightsmith.quantizers.architectures import DENSE
from weightsmith.quantizers.autoawq import best_clip
from weightsmith.quantizers.packed import view_of
from weightsmith.quantizers.packed_check import checked
from weightsmith.quantizers.quantizer import Quantizer

AWQ_GPTQMODEL = Format(name="awq-gptqmodel", kind="awq", bits_per_weight=4.16)
GPTQ_GPTQMODEL = Format(name="gptq-gptqmodel", kind="gptq", bits_per_weight=4.16)

NO_AWQ = frozenset({"Cohere2ForCausalLM", "Gemma3ForCausalLM"})
"""Not supported by its AWQ: parallel layers' norms, rotary embeddings that differ by layer."""
_WIDE = 3072
"""Row length from which GPTQ uses several threads: its steps, one column each, are too small below.
Measured with one and two threads: 64 s and 114 s for rows of 576 and 1536 weights; 59 s and 49 s
for 2048 and 5632."""


def main() -> None:
    """Run in the builder: quantize as set in the settings file of the command line."""
    settings = running.read_settings()
    method, group, keep, model = settings.method, settings.group_size, settings.keep, settings.model
    discard(settings.raw)
    # With fewer, GPTQModel fails on two cores: "requests 2 workers but parent only has 1".
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    if method == "gptq" and max(checkpoints.row_lengths(read_facts(model)).values()) < _WIDE:
        os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, below
    _quantize(settings)
    config = checkpoints.grouped_config(method, group, keep, checkpoints.kept_modules(model, keep))
    checkpoints.finish(model, settings.raw, settings.out, config)


def _quantize(settings: running.ProgramSettings) -> None:
    method, group, model = settings.method, settings.group_size, settings.model
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    library: Any = importlib.import_module("gptqmodel")
    configs: Any = importlib.import_module("gptqmodel.quantization.config")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    read = running.samples(running.texts(settings.calibration), tokenizer)
    if method == "awq":
        # With samples of different lengths, GPTQModel silently uses only the last
        # (looper/awq_processor.py, _layer_input_features).
        read = running.equal_length(read)
    rows = [
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
        for ids in read
    ]
    gpu = torch.cuda.is_available()
    dynamic = checkpoints.negative_patterns(settings.keep) or None
    if method == "awq":
        config = configs.AWQConfig(
            bits=4, group_size=group, format=configs.FORMAT.GEMM, sym=False, dynamic=dynamic
        )
        backend = library.BACKEND.AUTO if gpu else library.BACKEND.AWQ_TORCH
        # Use float32, because most CPUs emulate 16-bit arithmetic; the packing kernel can take it.
        # GPTQModel saves a layer's weights by `tensor.cpu()` while it tries 20 scales in place, and
        # restores them after each (looper/awq_processor.py, _compute_best_scale of 7.6 and 7.7). On
        # a CPU that is no copy, and all 20 roundings accumulated.
        cpu = torch.Tensor.cpu
        torch.Tensor.cpu = lambda tensor, *args, **named: cpu(tensor, *args, **named).clone()
        search: Any = importlib.import_module("gptqmodel.looper.awq_processor").AWQProcessor
        # As for AutoAWQ.
        search._compute_best_clip = lambda own, weight, inputs: best_clip(  # noqa: SLF001
            own.qcfg.group_size, own.pseudo_quantize_tensor, weight, inputs
        )
        kernel = importlib.import_module("gptqmodel.nn_modules.qlinear.torch_awq").AwqTorchLinear
        kernel.SUPPORTS_DTYPES = [*kernel.SUPPORTS_DTYPES, torch.float32]
    else:
        # `mse`: choose a group's scale by squared error instead of by its largest weight.
        config = configs.GPTQConfig(
            bits=4, group_size=group, desc_act=False, sym=True, mse=2.0, dynamic=dynamic
        )
        backend = library.BACKEND.AUTO if gpu else library.BACKEND.GPTQ_TORCH
    config.device = "cuda" if gpu else "cpu"
    config.pack_impl = "original"  # the others compile a C++ extension each time
    dtype = "auto" if gpu else torch.float32
    loaded = library.GPTQModel.load(str(model), config, trust_remote_code=False, dtype=dtype)
    loaded.quantize(
        rows, batch_size=1, calibration_data_min_length=1, tokenizer=tokenizer, backend=backend
    )
    loaded.save(str(settings.raw))


QUANTIZER = Quantizer(
    name="gptqmodel",
    builder="gptqmodel",
    formats=(AWQ_GPTQMODEL, GPTQ_GPTQMODEL),
    recipe_number=9,
    check_input=lambda format_, model: checkpoints.check_grouped(
        model, DENSE - NO_AWQ if format_ == AWQ_GPTQMODEL else DENSE
    ),
    steps=lambda request: checkpoints.grouped_step(
        __name__, request, f"quantizing to {request.format.name} by GPTQModel"
    ),
    check=lambda request: checked(request, checkpoints.in_groups(request), "gptqmodel"),
    peak_disk=checkpoints.peak_disk,
    options=checkpoints.group_options,
    beside_adapters=lambda format_, chosen: (
        checkpoints.refuse_scales(format_, chosen) if format_ == AWQ_GPTQMODEL else chosen
    ),
    check_options=checkpoints.check_group,
    calibrated=lambda _format, _options: True,
    view=view_of,
)

if __name__ == "__main__":
    main()
