from dataclasses import replace

import pytest
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.models.facts import Packing
from weightsmith.serving.engine import ServeOptions
from weightsmith.serving.machine import machine_for
from weightsmith.serving.vllm import check_packing

from tests.fakes.configs import shape_of

SHAPE = shape_of(
    {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 100,
    }
)
GPU = machine_for(ServeOptions(gpu="nvidia-l4"), SHAPE)
OLD = machine_for(ServeOptions(gpu="nvidia-a100-80gb"), SHAPE)
CPU = machine_for(ServeOptions(host_memory_bytes=1 << 33), SHAPE)


def packed(method, **more):
    return Packing.of({"quant_method": method, **more})


@pytest.mark.parametrize("machine", [GPU, CPU])
@pytest.mark.parametrize(
    "packing",
    [
        None,
        packed("awq", bits=4, version="gemm", group_size=128),
        packed("gptq", bits=4, sym=True, desc_act=False, group_size=128),
        packed("gptq", bits=4, sym=True, desc_act=True, group_size=-1),
        packed("compressed-tensors"),
    ],
)
def test_what_vllm_loads_everywhere(packing, machine):
    assert check_packing(packing, machine) == ()


@pytest.mark.parametrize(
    ("packing", "says"),
    [
        (packed("gptq", bits=4, desc_act=True, group_size=128), "desc_act"),
        (packed("gptq", bits=4, sym=False), "sym=false"),
        (packed("gptq", bits=3), "3 bits"),
        (packed("awq", bits=8), "8 bits"),
        (packed("gguf"), "gguf"),
        (packed("bitsandbytes"), "bitsandbytes"),
        (packed("fbgemm_fp8"), "fbgemm"),
    ],
)
def test_what_vllm_no_longer_loads(packing, says):
    with pytest.raises(InputRefused, match=says):
        check_packing(packing, GPU)


def test_eight_bit_gptq_is_for_gpus():
    eight = packed("gptq", bits=8, sym=True, group_size=128)

    assert check_packing(eight, GPU) == ()
    with pytest.raises(UsageError, match="CPU"):
        check_packing(eight, CPU)


def test_what_is_slow_or_needs_more_is_noted():
    assert "group_size 256" in check_packing(packed("gptq", group_size=256), GPU)[0]
    assert "AMX" in check_packing(packed("fp8"), CPU)[0]
    assert check_packing(packed("fp8"), replace(CPU, device="cpu-amx")) == ()
    assert "widened" in check_packing(packed("fp8"), OLD)[0]
    assert check_packing(packed("fp8"), GPU) == ()
    with pytest.raises(UsageError, match="blocks"):
        check_packing(packed("fp8", weight_block_size=[64, 64]), CPU)
