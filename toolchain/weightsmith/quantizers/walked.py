"""AWQ and GPTQ by our own walk, with one decoder layer in memory at a time.

AutoAWQ and GPTQModel load the whole model, and begin anew after a kill; both stay as formats of
their own.

`awq` and `gptq` have compressed-tensors' layout, the one that vLLM keeps: those of AutoAWQ and
AutoGPTQ are "to be deprecated later" (github.com/vllm-project/vllm/issues/30136). `awq-gemm` and
`gptq-v1` have these, for TGI and SGLang, and `awq-modelopt` has ModelOpt's, for TensorRT-LLM.

Only inputs are in the key: these results are multiplied in float32 by the machine's own libraries,
in an order that threads and CPUs decide, so another machine's may differ. An image's digest covers
the actual bytes.
"""

from __future__ import annotations

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.safe_parse import read_json
from weightsmith.core.values import AWQ, AWQ_GEMM, GPTQ, GPTQ_V1, Format
from weightsmith.forward.libraries import import_for_good
from weightsmith.models.facts import ModelFacts
from weightsmith.quantizers import checkpoints, modelopt_files, running
from weightsmith.quantizers.architectures import GROUPED, LLAMAS
from weightsmith.quantizers.packed import PackedLayout, view_of
from weightsmith.quantizers.packed_check import checked
from weightsmith.quantizers.quantizer import Options, Quantizer, QuantizeRequest


def check_input(format_: Format, model: ModelFacts) -> None:
    """Refuse an architecture that is not known, and rows that no group size divides."""
    if format_ != modelopt_files.AWQ:
        checkpoints.check_grouped(model, GROUPED)
        return
    checkpoints.check_grouped(model, LLAMAS)
    if (size := checkpoints.group_size(model, "auto")) not in modelopt_files.AWQ_GROUPS:
        raise InputRefused(
            f"TensorRT-LLM has kernels for groups of 64 or 128 weights, and rows of this model can"
            f" only have groups of {size}",
            hint="choose fp8 (target trtllm-fp8), or 16 bits",
        )


def options(format_: Format, requested: Options) -> Options:
    """Return the recipe's options that affect a format; raise UsageError."""
    chosen = checkpoints.group_options(format_, requested)
    if format_ == modelopt_files.AWQ and chosen["group_size"] == 32:
        raise UsageError(
            "group_size: TensorRT-LLM has no kernel for groups of 32",
            hint="use auto, or one of 128, 64",
        )
    return chosen


def check_options(model: ModelFacts, chosen: Options) -> None:
    """Refuse a group size and names in `keep` that do not fit the model."""
    checkpoints.check_group(model, chosen)
    checkpoints.check_kept(model, chosen)


def facts(request: QuantizeRequest, layout: PackedLayout) -> Options:
    """Return the facts of a finished walk for the report; raises CheckFailed if a check fails."""
    found = checked(request, layout, "walked")
    told = request.output / running.FACTS
    more = read_json(told) if told.is_file() else {}
    told.unlink(missing_ok=True)
    return {**found, **more}


def main() -> None:
    """Run in the builder: quantize as set in the settings file of the command line."""
    settings = running.read_settings()
    import_for_good()
    from weightsmith.quantizers.layerwise.quantizing import quantize

    with running.refusals():
        quantize(settings)


QUANTIZER = Quantizer(
    name="walked",
    builder="merge",
    formats=(AWQ, GPTQ, AWQ_GEMM, GPTQ_V1, modelopt_files.AWQ),
    recipe_number=2,
    check_input=check_input,
    steps=lambda request: checkpoints.grouped_step(
        __name__, request, f"calibrating {request.format.name}, layer by layer"
    ),
    check=lambda request: facts(request, checkpoints.in_groups(request)),
    # The finished layers, and the folder made of them.
    peak_disk=lambda size, kept, format_, _options: (
        2 * checkpoints.output_bytes(size, kept, format_)
    ),
    options=options,
    beside_adapters=lambda format_, chosen: (
        {**chosen, "scaled": False} if format_.kind == "awq" else chosen
    ),
    check_options=check_options,
    calibrated=lambda _format, _options: True,
    view=view_of,
    by_layer=True,
    compensated=True,
)

if __name__ == "__main__":
    main()
