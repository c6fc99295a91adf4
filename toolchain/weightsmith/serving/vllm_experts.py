"""vLLM's kernels for quantized experts on CPUs with AMX, and what each of them takes.

Source, of vLLM 0.32: `is_supported_config` of layers/fused_moe/experts/cpu_moe.py, what chooses
among its classes (layers/fused_moe/oracle/), and the models' own routers.
"""

from __future__ import annotations

from weightsmith.serving.engine import ExpertKernel

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
