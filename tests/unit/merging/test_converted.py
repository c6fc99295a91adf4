"""Initialisations that change the base: converted, or on the base that they left."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from weightsmith.core.errors import InputRefused

from tests.unit.merging.models import model_class
from tests.unit.merging.oracle import MakeBase, answers, merged, run


@pytest.fixture
def train(tmp_path: Path, bases: MakeBase) -> Any:
    """Start from an initialisation, save it, train; return base, model and the saved start."""

    def make(init: str) -> tuple[Path, Any, Path]:
        from peft import LoraConfig, get_peft_model

        base = bases("llama")
        torch.manual_seed(1)
        model = model_class("llama").from_pretrained(base, dtype=torch.float32)
        # Another scaling than 1, which conversion has to keep.
        config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=init)
        tuned = get_peft_model(model, config)
        tuned.peft_config["default"].init_lora_weights = True
        tuned.save_pretrained(tmp_path / "start")
        tuned.peft_config["default"].init_lora_weights = init
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.data += torch.randn_like(parameter) * 0.1
        return base, tuned, tmp_path / "start"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield make


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_converted_or_on_the_residual_base_it_is_plain_lora(
    init: str, train: Any, tmp_path: Path
) -> None:
    """The residual base is saved as PEFT's guide for PiSSA says: init_lora_weights is true."""
    base, tuned, start = train(init)
    wanted, converted = answers(tuned, "llama"), tmp_path / "converted"
    tuned.float().save_pretrained(tmp_path / "original")
    tuned.save_pretrained(converted, path_initial_model_for_weight_conversion=str(start))
    tuned.peft_config["default"].init_lora_weights = True
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.unload().save_pretrained(tmp_path / "residual")

    with pytest.raises(InputRefused, match="init_lora_weights") as refused:
        run(base, tmp_path / "original", tmp_path / "out")

    assert "path_initial_model_for_weight_conversion" in refused.value.hint
    assert "residual base" in refused.value.hint
    for onto, adapter in ((base, converted), (tmp_path / "residual", tmp_path / "adapter")):
        out = tmp_path / f"out-{adapter.name}"
        run(onto, adapter, out)
        # Conversion adds and subtracts the start, in the adapter's float32.
        torch.testing.assert_close(merged(out, "llama"), wanted, rtol=1e-4, atol=1e-4)
