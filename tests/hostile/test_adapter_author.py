"""The attacker wrote an adapter: its weights, its configuration, and the names in them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from toolchain import time_limits
from toolchain.errors import InputRefused
from toolchain.merging.plan import make_plan

TINY = Path(__file__).parents[2] / "examples" / "tiny"
BASE, ADAPTER = TINY / "base", TINY / "adapters" / "a"
WEIGHTS = "adapter_model.safetensors"

# Patterns that never end.

NEVER_ENDS = r"(\w+\.?)+!"
PATTERNS = {
    "target_modules": NEVER_ENDS,
    "exclude_modules": NEVER_ENDS,
    "rank_pattern": {NEVER_ENDS: 4},
    "alpha_pattern": {NEVER_ENDS: 4},
    "modules_to_save": [NEVER_ENDS],
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limits, "FOREIGN_SECONDS", 0.5)


def adapter_with(folder: Path, **settings: object) -> Path:
    adapter = Path(shutil.copytree(ADAPTER, folder / "adapter"))
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | settings), "utf-8")
    return adapter


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_that_never_ends_is_refused_in_the_plan(
    name: str, tmp_path: Path, impatient: None
) -> None:
    """One of the configuration's regular expressions takes for ever on the base's names: refused
    from the process that the user started, with the field that holds it."""
    adapter = adapter_with(tmp_path, **{name: PATTERNS[name]})

    with pytest.raises(InputRefused, match=name):
        make_plan(BASE, [(adapter, 1.0)])


def test_a_pattern_that_never_ends_on_one_layer_is_refused_in_the_plan(
    tmp_path: Path, impatient: None
) -> None:
    """layers_pattern is slow only where layers_to_transform asks for it: refused."""
    adapter = adapter_with(tmp_path, layers_pattern=NEVER_ENDS, layers_to_transform=[0])

    with pytest.raises(InputRefused, match="layers_pattern"):
        make_plan(BASE, [(adapter, 1.0)])


@pytest.mark.parametrize("name", ["target_modules", "modules_to_save"])
def test_a_pattern_that_never_ends_does_not_reach_peft(
    name: str, tmp_path: Path, impatient: None
) -> None:
    """PEFT would match it against every module of the model: the jobs that ask PEFT refuse it."""
    from toolchain.merging.reference import load_network
    from toolchain.validating.network import skeleton, with_adapters

    adapter = adapter_with(tmp_path, **{name: PATTERNS[name]})

    with pytest.raises(InputRefused, match=name):
        load_network(BASE, [(adapter, 1.0)])
    with pytest.raises(InputRefused, match=name):
        with_adapters(skeleton(BASE), [(adapter, 1.0)])


def test_a_pattern_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    """Python cannot even read the expression: refused, and no trace of it."""
    adapter = adapter_with(tmp_path, target_modules="(" * 5000 + ")" * 5000)

    with pytest.raises(InputRefused, match="adapter_config"):
        make_plan(BASE, [(adapter, 1.0)])


def test_names_of_tensors_that_are_searched_for_ever_are_refused(
    tmp_path: Path, impatient: None
) -> None:
    """Each name of hundreds could be read in hundreds of ways, and none of them is right."""
    adapter = adapter_with(tmp_path)
    names = [f"base_model.model.{n}{'.lora_A' * 570}.." for n in range(300)]
    save_file({name: np.zeros(1, np.float32) for name in names}, adapter / WEIGHTS)

    with pytest.raises(InputRefused, match="names of its 300 tensors"):
        make_plan(BASE, [(adapter, 1.0)])
