"""The example of docs/explanation/memory-plan.md, redone by the planner."""

from weightsmith.serving import vllm
from weightsmith.serving.engine import ServeOptions

from tests.fakes.configs import LLAMA_8B, LLAMA_8B_BYTES, facts
from tests.paths import ROOT

PAGE = ROOT / "docs" / "explanation" / "memory-plan.md"


def test_the_page_says_what_the_planner_says():
    plan = vllm.plan(
        facts(LLAMA_8B), LLAMA_8B_BYTES, ServeOptions(gpu="nvidia-l40s", max_model_len=8192)
    )
    page = PAGE.read_text("utf-8")

    assert f"{plan.weight_bytes:,} bytes" in page
    assert f"{plan.overhead_bytes:,}" in page
    assert f"{plan.margin_bytes:,}" in page
    assert f"{plan.kv_cache_bytes:,} bytes" in page
    assert f"{plan.kv_cache_bytes // 2**21:,} blocks" in page
    assert f"so {plan.max_num_seqs} requests of {plan.max_model_len} tokens" in page
