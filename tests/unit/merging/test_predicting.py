"""Layers that predict further tokens: transformers drops them, a merge passes them on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from weightsmith.core.errors import InputRefused
from weightsmith.merging.base import BaseTensors, replicate
from weightsmith.merging.engine import MergeRequest, merge
from weightsmith.models.facts import ModelFacts
from weightsmith.models.predicting import predicting
from weightsmith.validating.structure import compare_files

from tests.fakes.decoders import make_sparse
from tests.fakes.predicting import add_predicting, names, tensors
from tests.unit.merging.oracle import save_adapter
from tests.unit.merging.tensors import close, delta, lora, random, run

STYLES = ("numbered", "mtp.", "model.mtp_layers.0.")
PUBLISHED = [
    # Names from the index files of deepseek-ai/DeepSeek-V3, zai-org/GLM-4.5, Qwen/Qwen3-Next-80B,
    # XiaomiMiMo/MiMo-7B-RL and baidu/ERNIE-4.5-21B-A3B.
    ({"num_hidden_layers": 61, "num_nextn_predict_layers": 1}, "model.layers.61.eh_proj.weight", 1),
    ({"num_hidden_layers": 61, "num_nextn_predict_layers": 1}, "model.layers.60.mlp.x.weight", 0),
    ({"num_hidden_layers": 61}, "model.layers.61.eh_proj.weight", 0),  # not said: kept, but unknown
    ({"num_hidden_layers": 48}, "mtp.layers.0.mlp.experts.3.up_proj.weight", 1),
    ({"num_hidden_layers": 36}, "model.mtp_layers.0.input_proj.weight", 1),
    ({"num_hidden_layers": 28}, "model.mtp_block.0.self_attn.q_proj.weight", 1),
    ({"num_hidden_layers": 28}, "model.mtp_linear_proj.0.weight", 1),
    ({"num_hidden_layers": 28}, "model.layers.0.mtproj.weight", 0),
    (
        {"text_config": {"num_hidden_layers": 2}, "num_nextn_predict_layers": 1},
        "model.visual.layers.7.attn.weight",
        0,
    ),
]


@pytest.mark.parametrize(("config", "name", "belongs"), PUBLISHED)
def test_names_of_published_checkpoints(config: dict[str, Any], name: str, belongs: int) -> None:
    assert predicting(config)(name) == bool(belongs)


def ignored_by_transformers() -> list[tuple[str, str]]:
    """Class and pattern, of classes that leave out tensors called `mtp`."""
    found = set()
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        kind = getattr(transformers, str(name), None)
        for pattern in getattr(kind, "_keys_to_ignore_on_load_unexpected", None) or ():
            if "mtp" in pattern:
                found.add((str(name), pattern))
    return sorted(found)


@pytest.mark.slow
def test_what_transformers_leaves_out_belongs() -> None:
    told = ignored_by_transformers()
    assert {"Qwen3NextForCausalLM", "NemotronHForCausalLM"} <= {name for name, _ in told}
    places = ("mtp.", "model.mtp.", "model.mtp_layers.0.", "mtp_dspark.")
    for kind, pattern in told:
        fitting = [f"{place}fc.weight" for place in places if re.search(pattern, f"{place}fc")]
        assert fitting, (kind, pattern)
        assert all(map(predicting({"num_hidden_layers": 2}), fitting)), kind


def test_a_count_is_read_by_any_of_its_keys() -> None:
    counted = lambda config: ModelFacts.of(config).predicting_layers  # noqa: E731
    assert counted({"num_nextn_predict_layers": 2}) == 2
    assert counted({"text_config": {"mtp_num_hidden_layers": 1}}) == 1
    assert counted({"num_nextn_predict_layers": "many"}) == counted({}) == 0


def small(style: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    own = {f"model.layers.{n}.self_attn.q_proj.weight": random(4, 4) + n for n in range(2)}
    own["model.embed_tokens.weight"] = random(8, 4)
    config: dict[str, Any] = {"num_hidden_layers": 2, "model_type": "made"}
    if style == "numbered":
        config["num_nextn_predict_layers"] = 1
    return {**own, **tensors(style, 2, 4, torch.float32)}, config


@pytest.mark.parametrize("style", STYLES)
def test_they_are_passed_on_byte_for_byte(style: str, tmp_path: Path) -> None:
    """Also where a pattern names modules of theirs, for which PEFT had nothing to train."""
    base, config = small(style)
    a, b, q = random(2, 4), random(4, 2), "model.layers.{}.self_attn.q_proj"
    adapter = lora(q.format(0), a, b) | lora(q.format(1), a.clone(), b.clone())

    found = run(tmp_path, base, adapter, {"target_modules": ["q_proj"]}, **config)

    assert found.keys() == base.keys()
    for name in names(style, 2):
        assert torch.equal(found[name], base[name]), name
    close(found[q.format(1) + ".weight"], base[q.format(1) + ".weight"].double() + delta(a, b))


@pytest.mark.parametrize("style", STYLES)
def test_an_adapter_may_change_them(style: str, tmp_path: Path) -> None:
    base, config = small(style)
    own = next(n for n in names(style, 2) if "q_proj" in n).removesuffix(".weight")
    a, b = random(2, 4), random(4, 2)
    modules = [own, *(f"model.layers.{n}.self_attn.q_proj" for n in range(2))]
    adapter = {key: t.clone() for module in modules for key, t in lora(module, a, b).items()}

    found = run(tmp_path, base, adapter, {"target_modules": ["q_proj"]}, **config)

    close(found[f"{own}.weight"], base[f"{own}.weight"].double() + delta(a, b))


def test_an_adapter_of_decoder_layers_is_still_held_to_them(tmp_path: Path) -> None:
    base, config = small("numbered")
    adapter = lora("model.layers.0.self_attn.q_proj", random(2, 4), random(4, 2))

    with pytest.raises(InputRefused, match=r"no weights for 1 of its .*layers\.1\.self_attn"):
        run(tmp_path, base, adapter, {"target_modules": ["q_proj"]}, **config)


def test_keys_without_a_prefix_mean_the_decoder(tmp_path: Path) -> None:
    """`layers.0` is the end of `mtp.layers.0`, too."""
    base, config = small("mtp.")
    adapter = {
        key: tensor
        for layer in range(2)
        for key, tensor in lora(
            f"layers.{layer}.self_attn.q_proj", random(2, 4), random(4, 2)
        ).items()
    }

    found = run(tmp_path, base, adapter, {"target_modules": ["q_proj"]}, **config)

    name = "mtp.layers.0.self_attn.q_proj.weight"
    assert torch.equal(found[name], base[name])


@pytest.mark.parametrize("style", STYLES)
def test_copied_layers_come_before_them(style: str) -> None:
    """`layer_replication` renumbers the decoder's layers, and theirs is the next number."""
    base, config = small(style)
    whole = BaseTensors(sources=dict.fromkeys(base), layout=(("a", tuple(base)),))  # type: ignore[arg-type]

    made, settings = replicate(whole, config, ((0, 2), (0, 2)))

    assert settings["num_hidden_layers"] == 4
    assert {n for n in made.sources if predicting(config | settings)(n)} == set(names(style, 4))
    assert len(made.sources) == 1 + 4 + len(names(style, 4))


@pytest.mark.slow
def test_a_real_class_does_not_load_them_and_the_merge_keeps_them(tmp_path: Path) -> None:
    """GLM-4.5 as transformers and PEFT have it: an adapter of all linear layers."""
    from peft import LoraConfig, get_peft_model

    base = make_sparse(tmp_path / "base", "Glm4MoeForCausalLM")
    added = add_predicting(base, "numbered")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert not any(".layers.2." in name for name, _ in model.named_parameters())
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(tuned, tmp_path / "adapter")
    out = tmp_path / "out"

    merge(MergeRequest(base=base, adapters=((tmp_path / "adapter", 1.0),), out=out))

    found = load_file(out / "model.safetensors")
    for name, tensor in added.items():
        assert torch.equal(found[name], tensor), name
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 1
    findings = compare_files(base, [tmp_path / "adapter"], out)
    assert not [one for one in findings if one.severity == "error"]
