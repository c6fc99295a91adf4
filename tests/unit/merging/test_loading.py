"""Tensors that transformers renames when it loads them: adapters have the new names."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import weightsmith.merging.loading as module
from transformers import conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto import modeling_auto
from weightsmith.merging.loading import loaded_names

from tests.unit.merging.oracle import MakeBase, check

FILE = Path(module.__file__).with_name("renamed_tensors.json")
TASKS = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT")


def told_by_transformers() -> dict[str, list[list[str]]]:
    """Return class or model type -> the plain renamings of models that make text."""
    kinds: set[str] = set()
    for task in TASKS:
        for kind, names in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            kinds |= {kind, *([names] if isinstance(names, str) else names)}
    found = {}
    for kind in sorted(kinds):
        mapping = conversion_mapping.get_checkpoint_conversion_mapping(kind) or []
        plain = [rule for rule in mapping if type(rule) is WeightRenaming]
        # Without the name of the group around the only pattern.
        rules = [[r.compiled_sources.pattern[6:-1], r.target_patterns[0]] for r in plain]
        if rules:
            assert all(r.compiled_sources.pattern.startswith("(?P<g0>") for r in plain)
            found[kind] = [[old.removeprefix(">"), new] for old, new in rules]
    return found


def test_the_renamings_are_those_of_transformers() -> None:
    told = told_by_transformers()
    if os.environ.get("UPDATE_GOLDEN"):
        rows = [f"{json.dumps(kind)}: {json.dumps(rules)}" for kind, rules in told.items()]
        FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n", "utf-8")
    assert json.loads(FILE.read_text("utf-8")) == told, "UPDATE_GOLDEN=1 writes it"


def test_tensors_that_become_one_have_no_name_of_their_own() -> None:
    names = ["backbone.layers.0.mixer.in_proj.weight", "backbone.a.weight", "model.a.weight"]

    found = loaded_names({"model_type": "nemotron_h"}, names)

    assert found == {"model.layers.0.mixer.in_proj.weight": names[0]}
    assert loaded_names({"model_type": "llama"}, names) == {}


STACKED = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
ALL = {"target_modules": "all-linear"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "nemotron": ("nemotron_h", {"target_modules": ["in_proj", "up_proj", "down_proj", "k_proj"]}),
    "nemotron-embedding": ("nemotron_h", {"target_modules": ["embeddings", "q_proj"]}),
    "nemotron-saved": (
        "nemotron_h",
        {"target_modules": ["q_proj"], "modules_to_save": ["norm_f", "embeddings"]},
    ),
    "nemotron-experts": (
        "nemotron_h",
        {"target_modules": []} | {"target_parameters": ["experts.up_proj", "experts.down_proj"]},
    ),
    "granite-experts": ("granitemoe", {"target_modules": ["q_proj"]} | STACKED),
    "aria-experts": ("aria", {"target_modules": ["q_proj"]} | STACKED),
    "shared-experts": ("hy_v3", ALL | {"use_dora": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_merged_as_unmerged(name: str, bases: MakeBase, tmp_path: Path) -> None:
    kind, lora = CASES[name]

    check(bases(kind), kind, tmp_path, lora)
