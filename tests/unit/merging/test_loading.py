"""Tensors that transformers renames when it loads them: adapters have the new names."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import weightsmith.merging.names as module
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig, conversion_mapping
from transformers.core_model_loading import Chunk, GroupWeightRename, Split, WeightRenaming
from transformers.models.auto import modeling_auto
from weightsmith.core.errors import InputRefused
from weightsmith.merging.names import loaded_names

from tests.unit.merging.oracle import Case, MakeBase, case, check

MODELS = [
    table
    for name, table in vars(modeling_auto).items()
    if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")
]
"""For each task: model type -> its classes."""


def told_by_transformers(rules_of: Callable[[str], list[Any]]) -> dict[str, list[Any]]:
    """Return class or model type -> rules, of all models and of their parts.

    A type, also of a part, without rules has those of its class without a head.
    """
    classes: dict[str, set[str]] = {}
    for table in MODELS:
        for kind, names in table.items():
            classes.setdefault(kind, set()).update(listed(names))
    parts: set[str] = set()
    for kind in classes:
        with suppress(StrictDataclassError):  # a part that has no model without its whole
            parts |= set(parts_of(CONFIG_MAPPING[kind]()))
    found: dict[str, list[Any]] = {}
    for kind in sorted(classes.keys() | parts):  # a class may be of two types
        plain = listed(modeling_auto.MODEL_MAPPING_NAMES.get(kind, ()))
        below = next((rules for name in [*plain, kind] if (rules := rules_of(name))), [])
        found[kind] = rules_of(kind) or below
        for name in sorted(classes.get(kind, set()) - {*plain}):
            # The model without the head has its own rules, of names behind a prefix.
            if own := rules_of(name):
                found[name] = own + [r for r in below if r not in own and r[0][0] != "^"]
        found |= {name: rules_of(name) for name in plain}
    for kind, name in modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES.items():
        found[f"{kind} backbone"] = found.get(name, [])
    return {kind: found[kind] for kind in sorted(found) if found[kind]}


def listed(names: str | Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def parts_of(config: Any) -> Iterator[str]:
    """Yield the types of the models that a configuration has configurations of."""
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield value.model_type
            yield from parts_of(value)


def splits(kind: str) -> list[Any]:
    """Return the tensors whose rows become parameters as they are: pattern, names, equal sizes."""
    rules: list[Any] = []
    for rule in conversion_mapping.get_checkpoint_conversion_mapping(kind) or []:
        steps = getattr(rule, "operations", [])
        if (
            len(steps) == 1
            and isinstance(steps[0], Chunk | Split)
            and len(rule.target_patterns) > 1
        ):
            assert steps[0].dim == 0
            pattern = rule.compiled_sources.pattern[6:-1].removeprefix(">")
            rules.append([pattern, rule.target_patterns, isinstance(steps[0], Chunk)])
    return rules


def renamings(kind: str) -> list[list[str]]:
    mapping = conversion_mapping.get_checkpoint_conversion_mapping(kind) or []
    rules = []
    for rule in mapping:
        if type(rule) is GroupWeightRename:
            # `fc0` and `fc1` become `fc1` and `fc2`: the last one first, so that none is taken.
            pairs = zip(rule.source_patterns, rule.target_patterns, strict=True)
            rules += [[old, new] for old, new in reversed([*pairs])]
        elif type(rule) is WeightRenaming:
            # Without the name of the group around the only pattern.
            assert rule.compiled_sources.pattern.startswith("(?P<g0>")
            old = rule.compiled_sources.pattern[6:-1].removeprefix(">")
            rules.append([old, rule.target_patterns[0]])
    return rules


@pytest.mark.full  # only another transformers changes them
@pytest.mark.parametrize(
    ("file", "rules_of"),
    [("renamed_tensors.json", renamings), ("split_tensors.json", splits)],
    ids=["renamed", "split"],
)
def test_the_tables_are_those_of_transformers(
    file: str, rules_of: Callable[[str], list[Any]]
) -> None:
    path = Path(module.__file__).with_name(file)
    told = told_by_transformers(rules_of)
    if os.environ.get("UPDATE_GOLDEN"):
        rows = [f"{json.dumps(kind)}: {json.dumps(rules)}" for kind, rules in told.items()]
        path.write_text("{\n" + ",\n".join(rows) + "\n}\n", "utf-8")
    assert json.loads(path.read_text("utf-8")) == told, "UPDATE_GOLDEN=1 writes it"


def test_tensors_that_become_one_have_no_name_of_their_own() -> None:
    names = ["backbone.layers.0.mixer.in_proj.weight", "backbone.a.weight", "model.a.weight"]

    found = loaded_names({"model_type": "nemotron_h"}, names)

    assert found == {"model.layers.0.mixer.in_proj.weight": names[0]}
    assert loaded_names({"model_type": "llama"}, names) == {}


def test_a_parts_names_are_renamed_below_it_alone() -> None:
    config = {"model_type": "lfm3_vl", "vision_config": {"model_type": "lfm3_vl_vision"}}
    names = ["model.vision_tower.patchifier.weight", "model.language_model.patchifier.weight"]

    assert loaded_names(config, names) == {"model.vision_tower.patch_embed.weight": names[0]}


def test_a_decoder_within_a_model_is_renamed_below_it() -> None:
    config = {"model_type": "maskformer", "decoder_config": {"model_type": "detr"}}
    place = "model.transformer_module.decoder.layers.0.encoder_attn"

    found = loaded_names(config, [f"{place}.out_proj.weight"])

    assert found == {f"{place}.o_proj.weight": f"{place}.out_proj.weight"}


def test_names_that_move_by_one() -> None:
    first, second = (f"vision_tower.encoder.blocks.3.mlp.fc{n}.weight" for n in (0, 1))
    moved = (f"model.vision_tower.layers.3.mlp.fc{n}.weight" for n in (1, 2))

    found = loaded_names({"model_type": "kimi_k25"}, [second, first])

    assert found == dict(zip(moved, (first, second), strict=True))


STACKED = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
ALL = {"target_modules": "all-linear"}
CASES: dict[str, Case] = {
    "nemotron": case("nemotron_h", "in_proj", "up_proj", "down_proj", "k_proj"),
    "nemotron-embedding": case("nemotron_h", "embeddings", "q_proj"),
    "nemotron-saved": case("nemotron_h", "q_proj", modules_to_save=["norm_f", "embeddings"]),
    "nemotron-experts": case(
        "nemotron_h", target_parameters=["experts.up_proj", "experts.down_proj"]
    ),
    "granite-experts": case("granitemoe", "q_proj", **STACKED),
    "aria-experts": case("aria", "q_proj", **STACKED),
    "shared-experts": case("hy_v3", **ALL, use_dora=True),
    "split": case("hrm_text", **ALL, use_rslora=True, rank_pattern={"up_proj": 2}),
    "one-of-four": case("hrm_text", "v_proj"),
    "split-by-size": case("sarvam_moe", "q_proj", "k_proj", "v_proj"),
    "image": case("swin", **ALL),
    "stages": case("segformer", **ALL),
    "regions": case("regions", **ALL, modules_to_save=["classifier"]),
    "backbone": case("queries", **ALL),
    "backbone-below": case("depth", **ALL, use_dora=True),
    "first-and-last": case("sarvam_moe", "q_proj", "v_proj", "o_proj"),
}


@pytest.mark.parametrize("name", CASES)
def test_merged_as_unmerged(name: str, bases: MakeBase, tmp_path: Path) -> None:
    kind, _, lora = CASES[name]

    check(bases(kind), kind, tmp_path, lora)


@pytest.mark.parametrize(
    ("kind", "lora", "said"),
    [
        ("sarvam_moe", {"target_modules": ["k_proj"]}, "begin is unknown"),
        ("hrm_text", {"target_modules": ["k_proj"], "use_dora": True}, "lora_magnitude_vector on"),
    ],
    ids=["place", "dora"],
)
def test_pieces_that_cannot_be_merged_are_refused(
    kind: str, lora: dict[str, Any], said: str, bases: MakeBase, tmp_path: Path
) -> None:
    with pytest.raises(InputRefused, match=said):
        check(bases(kind), kind, tmp_path, lora)
