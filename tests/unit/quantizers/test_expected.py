"""The check has a rule of its own: a wrong one of the writer's does not pass."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from weightsmith.core.errors import CheckFailed
from weightsmith.quantizers import matrices
from weightsmith.quantizers.packed import PackedLayout
from weightsmith.quantizers.packed_check import check_checkpoint
from weightsmith.quantizers.rounded import quantize
from weightsmith.quantizers.schemes import SCHEMES

from tests.fakes.decoders import make_sparse

SCHEME = SCHEMES["fp8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sparse(tmp_path_factory.mktemp("models"), "Qwen2MoeForCausalLM")


@pytest.mark.parametrize(
    ("names", "odd"),
    [
        (r"[qkv]_proj|\w+_proj(?<!o_proj)", r"0\.self_attn\.o_proj\.weight stays in 16 bits"),
        (r"\w+_proj|gate", r"1\.mlp\.gate\.weight is quantized"),
        (r"\w+_proj|shared_expert_gate", r"1\.mlp\.shared_expert_gate\.weight is quantized"),
    ],
)
def test_a_wrong_rule_of_the_writer_is_found(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str, odd: str
) -> None:
    quantize(SCHEME, model, tmp_path, [])
    check_checkpoint(tmp_path, model, PackedLayout.of_scheme(SCHEME))

    rule = re.compile(rf"(?P<parent>.+)\.(?P<name>{names})\.weight")
    monkeypatch.setattr(matrices, "_PLAIN", rule)
    quantize(SCHEME, model, tmp_path, [])

    with pytest.raises(CheckFailed, match=rf"model\.layers\.{odd}, against what is known"):
        check_checkpoint(tmp_path, model, PackedLayout.of_scheme(SCHEME))


def test_a_wrong_rule_for_stacks_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = make_sparse(tmp_path / "model", "GraniteMoeForCausalLM"), tmp_path / "out"
    out.mkdir()
    rule = matrices._STACKED.pattern.replace(r"|output_linear\.weight", "")
    assert rule != matrices._STACKED.pattern
    monkeypatch.setattr(matrices, "_STACKED", re.compile(rule))
    quantize(SCHEME, model, out, [])

    with pytest.raises(CheckFailed, match=r"output_linear\.weight stays in 16 bits"):
        check_checkpoint(out, model, PackedLayout.of_scheme(SCHEME))
