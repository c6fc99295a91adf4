"""Formats with a scale per block are refused where GPUs would share a block."""

import pytest
from weightsmith.building.targets import all_formats
from weightsmith.core.errors import UsageError
from weightsmith.serving.compatibility import check_blocks

from tests.fakes.configs import facts

MODEL = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 2,
    "vocab_size": 1000, "head_dim": 128,
}  # fmt: skip
EXPERTS = {
    **MODEL, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4,
    "moe_intermediate_size": 768,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "name", "gpus", "what"),
    [
        (MODEL, "fp8-block", 8, ""),
        (MODEL, "fp8-block", 16, ""),
        (MODEL, "fp8-block", 64, "4096 of o_proj"),
        ({**MODEL, "head_dim": 64}, "fp8-block", 8, "k_proj"),
        ({**MODEL, "head_dim": 64}, "nvfp4a16", 8, ""),
        (EXPERTS, "fp8-block", 2, ""),
        (EXPERTS, "fp8-block", 4, "768 of an expert's down_proj"),
        (EXPERTS, "mxfp4a16", 8, ""),
        (EXPERTS, "mxfp4a16", 16, "768 of an expert's down_proj"),
        (EXPERTS, "fp8", 16, ""),
        (EXPERTS, "fp8-block", 1, ""),
    ],
)
def test_each_gpu_has_whole_blocks(model: dict, name: str, gpus: int, what: str) -> None:
    if not what:
        check_blocks(facts(model), all_formats()[name], gpus)
        return
    with pytest.raises(UsageError, match=what) as refused:
        check_blocks(facts(model), all_formats()[name], gpus)
    assert "fewer GPUs" in refused.value.hint
