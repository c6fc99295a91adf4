"""Every architecture that is said to become a packed checkpoint becomes one, no layer left out."""

import json
import sys
from pathlib import Path

import pytest
from weightsmith.errors import InputRefused
from weightsmith.quality.measure import measure
from weightsmith.quantizers import formats, of_format, rounded
from weightsmith.quantizers.calibration import GENERAL
from weightsmith.quantizers.checkpoints import DENSE, LLAMAS
from weightsmith.quantizers.packed import Layout, PackedView
from weightsmith.quantizers.packed_check import check_checkpoint

from tests.fakes.configs import facts
from tests.fakes.dense import make_dense

ROWS = [json.loads(line) for line in GENERAL.read_text("utf-8").splitlines()[:2]]


@pytest.mark.parametrize("architecture", sorted(DENSE))
def test_its_matrices_are_rounded_and_it_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    model, out = make_dense(tmp_path / "model", architecture), tmp_path / "out"
    out.mkdir()
    settings = {"method": "w8a8", "model": str(model), "out": str(out), "keep": []}
    (tmp_path / "settings.json").write_text(json.dumps(settings), "utf-8")
    monkeypatch.setattr(sys, "argv", ["rounded", str(tmp_path / "settings.json")])

    rounded.main()

    layout = Layout(method="int-quantized", bits=8, group_size=0, symmetric=True)
    check_checkpoint(out, model, layout, ())
    view = PackedView(out)
    assert len(view.modules) == 2 * 7
    found = measure(model, view, ROWS, 300, lambda *_: None)
    assert 0 < found.kl_mean < 0.02


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("fp8", DENSE),
        ("w8a8", DENSE),
        ("gptq", DENSE),
        ("awq", DENSE - {"Gemma3ForCausalLM", "Cohere2ForCausalLM"}),
        ("awq-autoawq", LLAMAS),
        ("awq-compressed", LLAMAS),
        ("fp8-static", LLAMAS),
    ],
)
def test_what_an_engine_does_not_know_is_refused_with_what_it_knows(
    name: str, known: frozenset[str]
) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    shape |= {"num_hidden_layers": 2, "vocab_size": 100}
    for architecture in sorted(DENSE | {"Phi3ForCausalLM"}):
        model = facts({**shape, "architectures": [architecture]})
        check = of_format(name).check_input
        if architecture in known:
            check(formats()[name], model)
            continue
        with pytest.raises(InputRefused, match="unsupported architecture") as caught:
            check(formats()[name], model)
        assert "LlamaForCausalLM" in caught.value.message
