"""What calibrating layer by layer is planned to take, against what was measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.models.facts import ModelFacts
from weightsmith.quantizers import formats
from weightsmith.quantizers.calibration import Texts
from weightsmith.stages.quantize import QuantizeOptions, nominal, quantize_memory
from weightsmith.steps.sizes import calibration_memory, estimated_bytes, fewest_mixed_bits

from tests.fakes.configs import LLAMA_8B, LLAMA_8B_BYTES

MIB = 1 << 20
SMALL = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2}
WIDE = SMALL | {"hidden_size": 512, "intermediate_size": 6144, "vocab_size": 512}
LONG = SMALL | {"hidden_size": 1024, "intermediate_size": 1024, "vocab_size": 512}
SMOL = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "num_hidden_layers": 3, "vocab_size": 49152,
}  # fmt: skip
SEVENTY = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
    "num_key_value_heads": 8, "num_hidden_layers": 80, "vocab_size": 128256,
}  # fmt: skip


def facts(config: dict[str, Any]) -> ModelFacts:
    own = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return ModelFacts.of({**own, **config, "dtype": "bfloat16"})


def texts(tokens: int) -> Texts:
    """Texts of about so many tokens."""
    return Texts(source="t", calibration=({"text": "a" * 3 * tokens},), held_out=())


def planned(config: dict[str, Any], size: int, tokens: int, kind: str) -> int:
    model = facts(config)
    if kind == "scales":
        return calibration_memory(model, size, texts(tokens), compensated=False)
    options = QuantizeOptions(name="m", format=formats()[kind], texts=texts(tokens))
    return quantize_memory(model, size, options)


@pytest.mark.parametrize(
    ("config", "size", "tokens", "kind", "measured"),
    [
        (WIDE, 42_000_000, 5_296, "awq", 1996),
        (WIDE, 42_000_000, 5_296, "gptq", 1951),
        (WIDE, 42_000_000, 5_296, "scales", 574),
        (LONG, 27_000_000, 63_907, "awq", 1033),
        (LONG, 27_000_000, 63_907, "gptq", 1003),
        (LONG, 27_000_000, 63_907, "scales", 675),
        (SMOL, 134_000_000, 5_296, "awq", 452),
        (SMOL, 134_000_000, 5_296, "scales", 372),
    ],
)
def test_a_plan_covers_what_was_measured(
    config: dict[str, Any], size: int, tokens: int, kind: str, measured: int
) -> None:
    """Anonymous memory in MiB, by `RssAnon` each 5 ms, of one process on two cores."""
    assert measured * MIB < planned(config, size, tokens, kind) < 1.7 * measured * MIB


@pytest.mark.parametrize("kind", ["awq", "gptq", "nvfp4", "scales"])
def test_more_text_takes_more_memory(kind: str) -> None:
    few, many = (planned(SEVENTY, 141 * 10**9, tokens, kind) for tokens in (10_000, 110_000))

    states = (2 if kind in ("awq", "gptq") else 1) * 4 * 100_000 * 8192
    assert states < many - few < 1.3 * states


def test_experts_keep_their_inputs_until_the_layer_has_run() -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
    moe = facts(LONG | experts | {"architectures": ["Qwen3MoeForCausalLM"]})
    assert moe.matrices.expert_width == 512

    more = planned(LONG | experts, 27_000_000, 60_000, "awq") - planned(
        LONG, 27_000_000, 60_000, "awq"
    )
    assert more > 4 * 60_000 * 2 * 1024


SMOL_135M = SMOL | {"num_hidden_layers": 30, "tie_word_embeddings": True}
"""Rows of 576 are not whole blocks of 256 weights, those of its down_proj are."""


@pytest.mark.parametrize(
    ("format_", "size"),
    [("q4_k_m", 105_454_560), ("q4_1", 98_362_432)],  # files of llama.cpp
)
def test_rows_that_are_no_whole_blocks_are_planned_with_the_types_that_they_get(format_, size):
    found = estimated_bytes(2 * 134_515_008, formats()[format_], facts(SMOL_135M))

    assert found == pytest.approx(size, rel=0.03)  # its tokenizer is a part of the file


def test_rows_of_no_block_at_all_stay_in_16_bits():
    odd = facts(SMOL | {"hidden_size": 90, "intermediate_size": 100, "tie_word_embeddings": True})

    for name in ("q4_0", "q8_0", "mxfp4_moe"):
        assert estimated_bytes(1000, formats()[name], odd) == 1000


ODD = {
    "hidden_size": 192, "intermediate_size": 416, "num_attention_heads": 3, "head_dim": 128,
    "num_key_value_heads": 1, "num_hidden_layers": 1, "vocab_size": 517,
}  # fmt: skip
"""A Qwen 3 of 635,584 weights, which llama.cpp packed to these bits per weight."""


@pytest.mark.parametrize(
    ("format_", "bits"),
    [("mxfp4_moe", 8.531), ("q3_k_l", 5.581), ("q3_k_m", 5.46), ("iq3_m", 5.315), ("tq1_0", 5.317)],
)
def test_small_types_are_planned_with_the_bits_that_odd_rows_get(format_, bits):
    found = estimated_bytes(2 * 635_584, formats()[format_], facts(ODD))

    assert found == pytest.approx(635_584 * bits / 8, rel=0.04)


@pytest.mark.parametrize(
    ("hidden", "inner", "least"), [(90, 100, 16), (96, 160, 4.25), (512, 1024, 2.625)]
)
def test_the_smallest_mix_has_the_smallest_types_that_rows_can_have(hidden, inner, least):
    model = facts(SMOL | {"hidden_size": hidden, "intermediate_size": inner, "head_dim": hidden})

    assert fewest_mixed_bits(model, low=True) == least
    odd = facts(SMOL | {"hidden_size": 512, "intermediate_size": 100, "head_dim": 512})
    assert 2.625 < fewest_mixed_bits(odd, low=True) < 16
    bits = {"bits": least - 0.25, "low": True}
    options = QuantizeOptions(name="m", format=formats()["mix"], options=bits)
    with pytest.raises(InputRefused, match="no mix of this model"):
        nominal(options, 10**9, model)
    enough = replace(options, options=bits | {"bits": least})
    assert nominal(enough, 10**9, model).bits_per_weight == least


@pytest.mark.parametrize("name", ["q4_k_m", "q5_k_s", "q3_k_l", "iq3_m", "iq2_xxs", "q2_k", "q8_0"])
def test_llama_3_has_the_bits_of_llama_cpp_s_table(name):
    """tools/quantize/README.md of llama.cpp."""
    format_ = formats()[name]

    found = estimated_bytes(LLAMA_8B_BYTES, format_, ModelFacts.of(LLAMA_8B))

    assert found == pytest.approx(LLAMA_8B_BYTES * format_.bits_per_weight / 16, rel=0.01)
