"""A rule for tensors that no file has is refused, where it can be before any work."""

import re
from dataclasses import replace

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.models.facts import read_facts
from weightsmith.quantizers import of_format
from weightsmith.quantizers.gguf_rules import require_matches

from tests.paths import TINY

MODEL = read_facts(TINY / "base")


def check(pattern, model=MODEL):
    of_format("q4_k_m").check_options(model, {"imatrix": "off", "tensor_types": {pattern: "q8_0"}})


@pytest.mark.parametrize(
    "pattern",
    ["attn_v", r"blk\.0\.", "ATTN_V", "output", "token_embd", r"^blk\.\d+\.ffn_(up|down)\.weight$"],
)
def test_a_pattern_of_some_tensor(pattern):
    check(pattern)


@pytest.mark.parametrize(
    ("pattern", "guess"),
    [
        ("nonesuch", ""),
        ("q_proj", ""),
        ("atn_v", "did you mean attn_v?"),
        ("ffn_dwn", "did you mean ffn_down?"),
        (rf"blk\.{MODEL.layers}\.attn_v", ""),
        ("attn_v.bias$", ""),
    ],
)
def test_a_pattern_of_none(pattern, guess):
    said = (
        f"no tensor of the GGUF file matches {pattern!r}, and the model has {MODEL.layers} layers"
    )
    with pytest.raises(InputRefused, match=re.escape(said)) as caught:
        check(pattern)
    assert caught.value.hint.startswith(guess or "names are like")


def test_of_an_architecture_whose_names_are_not_known_the_converter_says_it():
    check("indexer", replace(MODEL, architecture="DeepseekV32ForCausalLM"))
    require_matches(["attn_v"], ["blk.0.attn_v.weight"])
    with pytest.raises(InputRefused, match="no tensor of the GGUF file matches 'ffn_gate_exps'"):
        require_matches(["attn_v", "ffn_gate_exps"], ["blk.0.attn_v.weight"])
