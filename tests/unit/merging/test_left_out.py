"""Adapters with weights of modules that their configuration does not target: PEFT ignores these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig
from safetensors.torch import load_file, save_file
from weightsmith.core.errors import InputRefused
from weightsmith.merging.claims import require_all_targeted
from weightsmith.validating.validate import ValidationRequest, validate

from tests.unit.merging.oracle import MakeBase, merged, run, train, unmerged

TARGETS = ["q_proj", "v_proj", "up_proj"]
LORA = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS}
LINEAR = [*TARGETS, "k_proj", "o_proj", "gate_proj", "down_proj"]
HEAD = {"target_modules": [*LINEAR, "lm_head", "embed_tokens"]}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "excluded": (LoraConfig(**LORA), {"exclude_modules": ["v_proj"]}),
    "excluded-by-regex": (LoraConfig(**LORA), {"exclude_modules": r".*layers\.0.*(q|up)_proj"}),
    "excluded-with-biases": (
        LoraConfig(**LORA | {"bias": "lora_only"}),
        {"exclude_modules": ["v_proj"]},
    ),
    "excluded-dora": (LoraConfig(**LORA, use_dora=True), {"exclude_modules": ["0.mlp.up_proj"]}),
    "other-layers": (LoraConfig(**LORA), {"layers_to_transform": [1]}),
    "layers-of-a-pattern": (
        LoraConfig(**LORA),
        {"layers_to_transform": 0, "layers_pattern": ["layers"]},
    ),
    "one-by-name-beside-layers": (
        LoraConfig(**LORA),
        {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"]}
        | {"layers_to_transform": [1]},
    ),
    "other-targets": (LoraConfig(**LORA), {"target_modules": ["q_proj"]}),
    "other-targets-by-regex": (LoraConfig(**LORA), {"target_modules": r".*\.1\..*v_proj"}),
    "embedding-and-head": (LoraConfig(**LORA | HEAD), {"target_modules": ["q_proj"]}),
    "all-linear-and-a-head": (LoraConfig(**LORA | HEAD), {"target_modules": "all-linear"}),
    "parameters-alone": (
        LoraConfig(
            **LORA | {"target_modules": ["q_proj"], "target_parameters": ["up_proj.weight"]}
        ),
        {"target_modules": []},
    ),
    "loha": (
        LoHaConfig(r=4, target_modules=LORA["target_modules"]),
        {"exclude_modules": ["v_proj"]},
    ),
    "ia3": (
        IA3Config(target_modules=["v_proj", "k_proj"], feedforward_modules=[]),
        {"target_modules": ["k_proj"]},
    ),
}


@pytest.fixture
def base(bases: MakeBase) -> Path:
    return bases("llama", attention_bias=True)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return train(base, "llama", tmp_path / "adapter", LoraConfig(**LORA))


@pytest.mark.parametrize("name", CASES)
def test_merged_as_peft_loads_it(name: str, base: Path, tmp_path: Path) -> None:
    trained, edits = CASES[name]
    adapter = train(base, "llama", tmp_path / "adapter", trained)
    whole = unmerged(base, "llama", adapter)
    edit(adapter, **edits)
    wanted = unmerged(base, "llama", adapter)
    assert (whole - wanted).abs().max() > 1e-3

    adapters = ((adapter, 1.0),)
    result = run(base, adapters, tmp_path / "out")

    torch.testing.assert_close(merged(tmp_path / "out", "llama"), wanted, rtol=1e-5, atol=1e-5)
    assert any("left out, as PEFT leaves them out" in found for found in result["findings"])
    assert validate(ValidationRequest(base=base, adapters=adapters, merged=tmp_path / "out")).passed


def test_parameters_that_the_base_has_not_are_a_finding(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """PEFT's `all-linear` lists those of the architecture's experts, whether or not there are."""
    edit(adapter, target_parameters=["gate_up_proj", "gate.weight"])

    result = run(base, adapter, tmp_path / "out")

    assert "does not have: gate_up_proj, gate.weight" in result["findings"][0]
    wanted = unmerged(base, "llama", adapter)
    torch.testing.assert_close(merged(tmp_path / "out", "llama"), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        ({"target_modules": []}, "target_modules []"),
        ({"exclude_modules": ["proj"], "target_modules": "x"}, "target_modules x, exclude_modules"),
        ({"layers_to_transform": 0, "target_modules": ["up_proj"]}, "layers_to_transform 0"),
    ],
)
def test_the_finding_shows_the_settings(
    edits: dict[str, Any], said: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    edit(adapter, **edits)
    try:
        text = " ".join(run(base, adapter, tmp_path / "out")["findings"])
    except InputRefused as error:
        text = error.message

    assert said in text
    assert "()" not in text


def test_an_adapter_of_which_nothing_remains_is_refused(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    edit(adapter, exclude_modules=r".*layers.*")

    with pytest.raises(InputRefused, match="changes nothing: 12 tensors are left out"):
        run(base, adapter, tmp_path / "out")


PLAIN = [name for name, (trained, _) in CASES.items() if isinstance(trained, LoraConfig)]


@pytest.mark.parametrize("name", PLAIN)
def test_for_engines_that_would_use_them_such_adapters_are_refused(
    name: str, base: Path, tmp_path: Path
) -> None:
    trained, edits = CASES[name]
    adapter = train(base, "llama", tmp_path / "adapter", trained)
    require_all_targeted(base, adapter)
    edit(adapter, **edits)

    with pytest.raises(InputRefused, match="PEFT leaves them out, and this engine would use them"):
        require_all_targeted(base, adapter)


def test_a_target_may_have_the_name_that_transformers_gives_a_module(
    base: Path, adapter: Path
) -> None:
    """The adapter's file has the names of an older version, its configuration the newer ones."""
    path = adapter / "adapter_model.safetensors"
    save_file(
        {key.replace("model.model.", "model."): t for key, t in load_file(path).items()}, path
    )

    edit(adapter, target_modules=r"model\.layers\.\d+\..*(q_proj|v_proj|up_proj)")
    require_all_targeted(base, adapter)

    edit(adapter, target_modules=r"model\.layers\.\d+\..*(q_proj|v_proj)")
    with pytest.raises(InputRefused, match="up_proj"):
        require_all_targeted(base, adapter)


UNSET: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, {"use_dora": False}, "does not set use_dora"),
    "lora-bias": (
        {"target_modules": ["q_proj"], "lora_bias": True},
        {"lora_bias": False},
        "does not set lora_bias",
    ),
    "tokens": (
        {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [1, 3]}},
        {"trainable_token_indices": {"embed_tokens": [1, 2]}},
        "does not say which tokens lm_head trains",
    ),
}
"""What was trained, what adapter_config.json says then, and the refusal."""


@pytest.mark.parametrize("name", UNSET)
def test_weights_without_their_setting_are_refused(name: str, base: Path, tmp_path: Path) -> None:
    """PEFT ignores them, and the rest is not what was trained."""
    options, edits, said = UNSET[name]
    adapter = train(base, "llama", tmp_path / "adapter", LoraConfig(**LORA | options))
    edit(adapter, **edits)

    with pytest.raises(InputRefused, match=said):
        run(base, adapter, tmp_path / "out")


def edit(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
