"""The example of docs/explanation/memory-plan.md, redone by the planner."""

from pathlib import Path

from toolchain.serving import vllm
from toolchain.serving.engine import Wishes

PAGE = Path(__file__).parents[3] / "docs" / "explanation" / "memory-plan.md"
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "dtype": "bfloat16",
}


def test_the_page_says_what_the_planner_says():
    plan = vllm.plan(LLAMA_8B, 16_060_522_496, Wishes(gpu="nvidia-l40s", max_model_len=8192))
    page = PAGE.read_text("utf-8")

    assert f"{plan.weight_bytes:,} bytes" in page
    assert f"{plan.overhead_bytes:,}" in page
    assert f"{plan.margin_bytes:,}" in page
    assert f"{plan.kv_cache_bytes:,} bytes" in page
    assert f"{plan.kv_cache_bytes // 2**21:,} blocks" in page
    assert f"so {plan.max_num_seqs} requests of {plan.max_model_len} tokens" in page
