"""Matrices that stay in 16 bits: what may be named, and what engines are told."""

import re

import pytest
import torch
from safetensors.torch import save_file
from weightsmith.core.errors import UsageError
from weightsmith.quantizers.checkpoints import (
    MATRICES,
    is_kept,
    keep_option,
    kept_modules,
    negative_patterns,
)

ATTENTION = ("q_proj", "k_proj", "v_proj")


def test_names_are_sorted_and_lm_head_is_kept_anyhow():
    assert keep_option({"keep": ("o_proj", "down_proj", "lm_head")}) == ["down_proj", "o_proj"]
    assert keep_option({}) == []
    assert keep_option({"keep": ATTENTION}) == sorted(ATTENTION)


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        (("proj",), "'proj' is not the suffix"),
        (("mlp",), "not the suffix"),
        (("xdown_proj",), "not the suffix"),
        (("q_proj",), "q_proj is listed without k_proj, v_proj"),
        (("layers.1.mlp.up_proj", "gate_proj"), "without"),
        (MATRICES, "nothing would be quantized"),
    ],
)
def test_what_cannot_be_kept_is_refused(keep, says):
    with pytest.raises(UsageError, match=says):
        keep_option({"keep": keep})


def test_ends_match_at_dots_alone():
    assert is_kept("model.layers.1.mlp.down_proj", ["layers.1.mlp.down_proj"])
    assert not is_kept("model.layers.11.mlp.down_proj", ["1.mlp.down_proj"])
    assert not is_kept("model.layers.0.mlp.xdown_proj", ["down_proj"])
    assert not is_kept("model.layers.0.mlp.down_proj", [])


def test_kept_modules_are_those_of_the_checkpoint(tmp_path):
    names = [f"model.layers.{i}.{m}.weight" for i in (0, 1) for m in ("mlp.down_proj", "x.o_proj")]
    tensors = {n: torch.zeros(1) for n in (*names, "down_proj.weight")}
    save_file(tensors, tmp_path / "model.safetensors")

    kept = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert kept_modules(tmp_path, ["down_proj"]) == kept


def test_engines_are_configured_for_what_they_put_together():
    """As vLLM asks: `re.match` of each expression against the name of the fused matrix."""
    patterns = [p.removeprefix("-:") for p in negative_patterns(["down_proj", *sorted(ATTENTION)])]

    def left_out(module):
        return any(re.match(pattern, module) for pattern in patterns)

    assert left_out("model.layers.3.self_attn.qkv_proj")
    assert left_out("model.layers.3.self_attn.q_proj")
    assert left_out("model.layers.3.mlp.down_proj")
    assert not left_out("model.layers.3.mlp.gate_up_proj")
    assert not left_out("model.layers.3.mlp.down_proj.lora_A")
    one = negative_patterns(["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"])
    assert any(re.match(p[2:], "model.layers.0.mlp.gate_up_proj") for p in one)
    assert not any(re.match(p[2:], "model.layers.10.mlp.gate_up_proj") for p in one)
