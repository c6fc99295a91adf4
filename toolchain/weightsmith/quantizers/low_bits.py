"""Integers of 2, 3 and 5 bits for vLLM's Humming kernels, by the same walk as `gptq`.

compressed-tensors packs a row's codes without gaps, so that three bits take three (`packed.py`).
Only symmetric ones are made: so are its presets (W2A16, W3A16, W5A16), and what vLLM's kernels were
tested with (vllm-project/vllm#46389). Rounding alone makes nonsense of a model with 2 and 3 bits
(Llama 3 8B in vllm-project/vllm#45185); the walk spreads errors to other weights.
"""

from __future__ import annotations

from weightsmith.core.values import Format
from weightsmith.models.facts import read_facts
from weightsmith.quantizers import checkpoints, running
from weightsmith.quantizers.architectures import GROUPED
from weightsmith.quantizers.packed import PackedLayout, view_of
from weightsmith.quantizers.quantizer import BuilderCommand, Quantizer, QuantizeRequest
from weightsmith.quantizers.walked import check_options, facts

BITS = {f"w{bits}a16": bits for bits in (2, 3, 5)}
"""Format -> bits of a code."""


def _layout(request: QuantizeRequest) -> PackedLayout:
    size = checkpoints.group_size(read_facts(request.model), request.options.get("group_size"))
    bits = BITS[request.format.name]
    return PackedLayout(method="pack-quantized", bits=bits, group_size=size, symmetric=True)


def _steps(request: QuantizeRequest) -> tuple[BuilderCommand]:
    layout, name = _layout(request), request.format.name
    return running.python_step(
        "weightsmith.quantizers.walked",
        request,
        f"calibrating {name}, layer by layer",
        method=name,
        bits=layout.bits,
        group_size=layout.group_size,
    )


QUANTIZER = Quantizer(
    name="low_bits",
    builder="merge",
    formats=tuple(
        Format(name=name, kind="compressed-tensors", bits_per_weight=bits + 0.13)
        for name, bits in BITS.items()
    ),
    recipe_number=1,
    check_input=lambda _format, model: checkpoints.check_grouped(model, GROUPED),
    steps=_steps,
    check=lambda request: facts(request, _layout(request)),
    peak_disk=lambda size, kept, format_, _options: (
        2 * checkpoints.output_bytes(size, kept, format_)
    ),
    options=checkpoints.group_options,
    check_options=check_options,
    calibrated=lambda _format, _options: True,
    view=view_of,
    by_layer=True,
    compensated=True,
)
