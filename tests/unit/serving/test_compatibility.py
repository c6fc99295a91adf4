"""What an engine cannot load is refused before anything is made."""

import pytest

from toolchain.errors import InputRefused
from toolchain.planning import all_targets
from toolchain.serving.compatibility import TABLE, check_support


def test_fp8_needs_hardware_that_has_it() -> None:
    fp8 = all_targets()["vllm-fp8"].format
    for device in ("nvidia-l4", "cpu"):
        check_support("vllm", fp8, device)
    with pytest.raises(InputRefused, match=r"8\.9, nvidia-a10g has 8\.6"):
        check_support("vllm", fp8, "nvidia-a10g")
    with pytest.raises(InputRefused, match="no kernel for fp8 on a CPU"):
        check_support("sglang", fp8, "cpu")
    with pytest.raises(InputRefused, match="static_scaled_fp8_quant"):
        check_support("vllm", all_targets()["vllm-fp8-static"].format, "cpu")


@pytest.mark.parametrize("name", ["vllm-awq", "vllm-gptq", "vllm-w8a8", "vllm-awq-gptqmodel"])
def test_four_bits_and_int8_run_everywhere_that_a_plan_knows(name: str) -> None:
    format_ = all_targets()[name].format
    for device in ("cpu", "nvidia-t4", "nvidia-h100-80gb", "amd-mi300x", "24 GiB of GPU memory"):
        check_support("vllm", format_, device)


def test_each_row_says_where_it_is_from() -> None:
    assert all(row.source for row in TABLE.values())
