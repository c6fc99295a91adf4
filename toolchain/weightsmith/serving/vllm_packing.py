"""What vLLM 0.33 loads of packed checkpoints, by config.json's quantization_config.

Source: model_executor/layers/quantization/ (awq, gptq, utils/gptq_utils.py, compressed_tensors),
model_executor/kernels/linear for CPUs.
"""

from __future__ import annotations

from collections.abc import Mapping

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.models.packing import Packing
from weightsmith.serving.devices import AMX
from weightsmith.serving.machine import Machine

_GONE: Mapping[str, str] = {
    "gguf": "vLLM dropped GGUF in 0.24: choose a llamacpp target",
    "bitsandbytes": "vLLM dropped it in 0.28: start from the 16-bit checkpoint",
    "fbgemm_fp8": "vLLM refuses it as deprecated: choose vllm-fp8 from the 16-bit checkpoint",
    "fp_quant": "vLLM refuses it as deprecated: choose vllm-fp8 from the 16-bit checkpoint",
}
_GROUPS = frozenset({-1, 32, 64, 128})
"""Group sizes that the Marlin kernels have."""


def check_packing(packing: Packing | None, machine: Machine) -> tuple[str, ...]:
    """Return notes on a packed checkpoint for a machine; () for one that is not packed.

    Raises InputRefused for a packing that vLLM does not load, UsageError for one that this
    machine does not run.
    """
    if packing is None:
        return ()
    method = packing.method
    if method in _GONE:
        raise InputRefused(f"vLLM does not load {method} checkpoints", hint=_GONE[method])
    card = machine.gpu
    least = (7, 0) if method == "compressed-tensors" else (7, 5)
    if card and any(card.compute_capability) and card.compute_capability < least:
        raise UsageError(
            f"{method} needs compute capability {least[0]}.{least[1]}, which {card.name} does "
            "not have",
            hint="choose a later GPU, or another format",
        )
    if method == "awq":
        return _awq(packing)
    if method == "gptq":
        return _gptq(packing, machine)
    if method == "fp8":
        return _fp8(packing, machine)
    return ()


def _awq(packing: Packing) -> tuple[str, ...]:
    if packing.bits != 4:
        raise InputRefused(
            f"AWQ with {packing.bits} bits: vLLM has kernels for 4", hint="quantize it again"
        )
    return ()


def _gptq(packing: Packing, machine: Machine) -> tuple[str, ...]:
    bits, group = packing.bits, packing.group_size
    if packing.reordered and group != -1:
        raise InputRefused(
            "GPTQ with desc_act=true: vLLM dropped group activation ordering in 0.30",
            hint="quantize it again with desc_act=false, or static ordering",
        )
    if not packing.symmetric:
        raise InputRefused("GPTQ with sym=false: vLLM loads symmetric ones", hint="quantize anew")
    if bits not in {4, 8}:
        raise InputRefused(f"GPTQ with {bits} bits: vLLM loads 4 and 8", hint="quantize it again")
    if not machine.gpus and bits == 8:
        raise UsageError(
            "GPTQ with 8 bits does not run on a CPU", hint="choose 4 bits, or plan for a GPU"
        )
    if machine.gpus and group not in _GROUPS:
        return (f"group_size {group} has no fast kernel; -1, 32, 64 and 128 have",)
    return ()


def _fp8(packing: Packing, machine: Machine) -> tuple[str, ...]:
    if not machine.gpus:
        if packing.block and packing.block[-1] != 128:
            raise UsageError(
                f"FP8 in blocks of {list(packing.block)} does not run on a CPU",
                hint="blocks of 128 do",
            )
        if machine.device == AMX:
            return ()
        return ("FP8 on a CPU needs AMX (Intel's Sapphire Rapids or later) for most layouts",)
    if machine.gpu and not machine.gpu.fp8:
        return (f"{machine.device} has no FP8 arithmetic: weights are widened as they are used",)
    return ()
