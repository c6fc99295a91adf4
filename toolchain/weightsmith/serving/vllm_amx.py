"""vLLM's kernels for 8-bit weights and for quantized experts on CPUs with AMX: what they take.

Source, of vLLM 0.32: `is_supported_config` of layers/fused_moe/experts/cpu_moe.py, what chooses
among its classes (layers/fused_moe/oracle/), and the models' own routers.
"""

from __future__ import annotations

from dataclasses import replace

from weightsmith.core.errors import UsageError
from weightsmith.core.values import Format
from weightsmith.serving.devices import AMX, is_cpu
from weightsmith.serving.engine import ExpertKernel, ServeOptions

_SOFTMAX = frozenset({
    "DeepseekV2ForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeHybridForCausalLM",
    "GraniteMoeSharedForCausalLM", "MixtralForCausalLM", "OlmoeForCausalLM", "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "Qwen3VLMoeForConditionalGeneration",
    "Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration",
})  # fmt: skip
"""Models that choose experts by a softmax, without a bias: RoutingMethodType.Default and
RenormalizeNaive (layers/fused_moe/config.py, get_routing_method_type)."""
_GROUPED = frozenset({
    "DeepseekV3ForCausalLM", "ExaoneMoeForCausalLM", "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM",
})  # fmt: skip
"""By a sigmoid with a bias, in groups: RoutingMethodType.DeepSeekV3."""

# Of other hidden sizes, check_moe_marlin_supports_config leaves AWQ and GPTQ to MoeWNA16Config,
# whose weights the kernel does not take (oracle/int_wna16.py, _process_weights_cpu). Group sizes
# divide all rows anyway.
INT4 = ExpertKernel(name="CPUExpertsInt4", architectures=_SOFTMAX, hidden=128)
INT8 = ExpertKernel(name="CPUExpertsInt8", architectures=_SOFTMAX, hidden=32, width=32)
# Whole blocks: validate_fp8_block_shape_moe. Hidden sizes: convert_weight_packed.
FP8_BLOCK = ExpertKernel(
    name="CPUExpertsFp8", architectures=_SOFTMAX | _GROUPED, hidden=32, width=128
)

_BFLOAT16 = frozenset({"fp8-block", "w8a8"})
"""Formats whose kernels end the server at its first float16 token: `scalar path not implemented` in
csrc/cpu/sgl-kernels/gemm_int8.cpp, moe_int8.cpp and gemm_fp8.cpp."""


def without_float16(
    format_: Format, device: str, own: str, options: ServeOptions
) -> tuple[ServeOptions, tuple[str, ...]]:
    """Return options that serve a format in bfloat16 where its kernels have no float16, and why.

    That is for every CPU, because one that an image for any CPU starts on may have AMX. `own` is
    the checkpoint's type. Raises UsageError if the options want float16 on a CPU with AMX.
    """
    if not is_cpu(device) or format_.name not in _BFLOAT16:
        return options, ()
    if options.dtype == "float16" and device == AMX:
        raise UsageError(
            f"{format_.name} weights: vLLM has no kernel for float16 on {AMX}",
            hint="set serve.dtype=bfloat16, or leave it out",
        )
    if options.dtype or own != "float16":
        return options, ()
    note = f"{format_.name} weights are served in bfloat16: on CPUs with AMX, vLLM has no float16"
    return replace(options, dtype="bfloat16"), (note,)
