"""Adapters in odd configurations, as PEFT's own interface writes them, against its own forward."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from weightsmith.core.errors import InputRefused
from weightsmith.merging.engine import MergeRequest, merge
from weightsmith.models.peft_patterns import check_peft_keys

from tests.unit.merging.oracle import MakeBase, check, merged, train, unmerged

TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True, "mlp_bias": True}
Q = {"target_modules": ["q_proj", "v_proj"]}
SAVED = {"modules_to_save": ["embed_tokens", "lm_head"]}
Case = tuple[str, dict[str, Any], dict[str, Any]]

WHERE: dict[str, Case] = {
    "patterns-by-path": (
        "llama",
        {},
        {"target_modules": ["q_proj", "up_proj"], "use_rslora": True}
        | {"rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 2, r"layers\.1.*up_proj": 7}}
        | {"alpha_pattern": {r"model.layers.1.self_attn.q_proj": 11}},
    ),
    "one-layer": ("llama", {}, Q | {"layers_to_transform": 1}),
    "layers-of-a-pattern": (
        "gpt2",
        {},
        {"target_modules": ["c_attn"], "layers_to_transform": [0], "layers_pattern": "h"},
    ),
    "excluded-by-regex": (
        "llama",
        {},
        {"target_modules": "all-linear", "exclude_modules": r".*layers\.0.*(q|k)_proj"},
    ),
    "excluded-by-name": (
        "llama",
        {},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    ),
    "targets-by-regex": (
        "llama",
        {},
        {"target_modules": r".*(1\.self_attn\.q|0\.mlp\.gate)_proj"},
    ),
    "fan-in-fan-out-of-linear": ("llama", {}, Q | {"fan_in_fan_out": True}),
    "fan-in-fan-out": (
        "gpt2",
        {},
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "fan-in-fan-out-dora": (
        "gpt2",
        {},
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "positions": ("gpt2", {}, {"target_modules": ["wpe", "c_attn"]}),
    "relative-positions": ("t5", {}, {"target_modules": ["relative_attention_bias", "q"]}),
    "token-types": ("bert", {}, {"target_modules": ["token_type_embeddings", "query"]}),
    "all-of-bert": ("bert", {}, {"target_modules": "all-linear", "bias": "all"}),
    "all-of-t5": ("t5", {}, {"target_modules": "all-linear"}),
    "all-of-vit-dora": ("vit", {}, {"target_modules": "all-linear", "use_dora": True}),
    "head-and-its-bias": (
        "bert",
        {},
        {"target_modules": ["query", "decoder"], "bias": "lora_only"},
    ),
    "head-and-lora-bias": ("bert", {}, {"target_modules": ["decoder"], "lora_bias": True}),
    "dora-rslora": ("llama", BIASED, Q | {"use_rslora": True, "use_dora": True}),
    "dora-biases": ("llama", BIASED, Q | {"use_dora": True, "bias": "all"}),
    "lora-bias-rslora": (
        "llama",
        BIASED,
        Q | {"lora_bias": True, "use_rslora": True, "alpha_pattern": {"v_proj": 9}},
    ),
    "parameters": (
        "llama",
        {},
        {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight", "down_proj.weight"]},
    ),
    "parameters-have-names-of-their-own": (
        "llama",
        {},
        {"target_modules": [], "target_parameters": ["q_proj.weight", "down_proj.weight"]}
        | {"rank_pattern": {"q_proj": 2, "down_proj.weight": 3}},
    ),
    "experts-and-patterns": (
        "qwen3_moe",
        {},
        {"target_modules": []}
        | {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
        | {"rank_pattern": {"experts.gate_up_proj": 2}}
        | {"alpha_pattern": {"experts.down_proj": 3}},
    ),
    "router-and-one-stack": (
        "mixtral",
        {},
        {"target_modules": ["q_proj"]}
        | {"target_parameters": ["mlp.gate.weight", "experts.down_proj"]},
    ),
    "one-transposed-stack": (
        "gpt_oss",
        {},
        {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    ),
    "saved-norms": ("llama", {}, Q | {"modules_to_save": ["norm", "input_layernorm"]}),
    "saved-head-norms": ("qwen3", {}, Q | {"modules_to_save": ["q_norm", "k_norm"]}),
    "saved-block": (
        "llama",
        BIASED,
        {"target_modules": ["up_proj"], "modules_to_save": ["0.self_attn"]},
    ),
    "saved-head-of-bert": (
        "bert",
        {},
        {"target_modules": ["query"], "modules_to_save": ["predictions"]},
    ),
    "saved-both-once": ("llama", TIED, Q | SAVED | {"ensure_weight_tying": True}),
    "tokens-that-differ": (
        "llama",
        TIED,
        Q | {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [3]}},
    ),
    "head-tokens-and-embedding": (
        "llama",
        TIED,
        {"target_modules": ["embed_tokens"], "trainable_token_indices": {"lm_head": [2]}},
    ),
    "two-stacks-tokens": (
        "t5",
        {},
        {"target_modules": ["q"], "trainable_token_indices": {"shared": [1, 4]}},
    ),
    "replicated-dora": (
        "llama",
        TIED,
        Q | {"layer_replication": [[0, 1], [0, 2]], "use_dora": True},
    ),
    "head-of-another-name": ("biogpt", {}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied-head-of-another-name": (
        "biogpt",
        {},
        {"target_modules": ["q_proj"], "modules_to_save": ["output_projection"]},
    ),
    "head-of-a-class-of-another-name": (
        "bert_generation",
        {},
        {"target_modules": ["word_embeddings"]},
    ),
    "embedding-of-another-name": ("openai", {}, {"target_modules": ["tokens_embed", "lm_head"]}),
    "embedding-called-w": ("ctrl", {}, {"target_modules": ["w", "Wq"]}),
    "saved-embedding-called-w": (
        "ctrl",
        {},
        {"target_modules": ["Wq"], "modules_to_save": ["w"]},
    ),
    "biases-that-peft-does-not-train": (
        "gpt_oss",
        {},
        {"target_modules": ["q_proj"], "bias": "all"},
    ),
    "untrained-start": ("llama", {}, Q | {"init_lora_weights": False}),
}


@pytest.mark.grid(12)
@pytest.mark.parametrize("name", WHERE)
def test_merged_as_unmerged(name: str, bases: MakeBase, tmp_path: Path) -> None:
    architecture, model, lora = WHERE[name]

    check(bases(architecture, **model), architecture, tmp_path, lora)


def test_another_tensor_with_a_heads_name_unties_nothing(bases: MakeBase, tmp_path: Path) -> None:
    base = shutil.copytree(bases("llama", **TIED), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    other = {"vision.proj_out.weight": torch.ones(3, 4)}
    save_file(weights | other, base / "model.safetensors", {"format": "pt"})
    adapter = train(bases("llama", **TIED), "llama", tmp_path / "adapter", LoraConfig(**Q))

    result = merge(MergeRequest(base=base, adapters=((adapter, 1.0),), out=tmp_path / "out"))

    assert result["findings"] == []
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


BOTH = {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}
APART: dict[str, dict[str, Any]] = {
    "neither": Q,
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding-dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "embedding-once": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "head": {"target_modules": ["lm_head"]},
    "both": BOTH,
    "saved-embedding": Q | {"modules_to_save": ["embed_tokens"]},
    "saved-head": Q | {"modules_to_save": ["lm_head"]},
    "tokens": Q | {"trainable_token_indices": [1, 5]},
    "tokens-of-the-head": Q | {"trainable_token_indices": {"lm_head": [3]}},
    "tokens-that-differ": Q | {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [3]}},
}


@pytest.mark.parametrize("name", APART)
def test_a_head_of_its_own_that_config_json_ties(
    name: str, bases: MakeBase, tmp_path: Path
) -> None:
    base = shutil.copytree(bases("llama"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | TIED))

    result = check(base, "llama", tmp_path, APART[name])

    assert "tie_word_embeddings is set to false" in result["findings"][0]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["tie_word_embeddings"] is False


ONCE = {"ensure_weight_tying": True}
RESIZED: dict[str, Case] = {
    "gpt2": ("gpt2", {}, {"target_modules": ["c_attn"]}),
    "gpt2-embedding": ("gpt2", {}, {"target_modules": ["c_attn", "wte"]}),
    "bert": ("bert", {}, {"target_modules": ["query"]}),
    "t5": ("t5", {}, {"target_modules": ["q"]}),
    "both": ("llama", {}, BOTH),
    "both-tied": ("llama", TIED, BOTH),
    "embedding-once": ("llama", TIED, {"target_modules": ["embed_tokens", "q_proj"]} | ONCE),
    "head-dora": ("llama", TIED, {"target_modules": ["lm_head"], "use_dora": True}),
    "saved-both": ("llama", {}, Q | SAVED),
    "saved-both-tied": ("llama", TIED, Q | SAVED),
    "saved-both-once": ("llama", TIED, Q | SAVED | ONCE),
    "saved-embedding": ("llama", TIED, Q | {"modules_to_save": ["embed_tokens"]}),
    "saved-embedding-once": ("llama", TIED, Q | {"modules_to_save": ["embed_tokens"]} | ONCE),
    "saved-head": ("llama", TIED, Q | {"modules_to_save": ["lm_head"]}),
    "tokens": ("llama", TIED, Q | {"trainable_token_indices": {"embed_tokens": [1, 99]}}),
}


@pytest.mark.grid(6)
@pytest.mark.parametrize("name", RESIZED)
def test_resized_vocabularies(name: str, bases: MakeBase, tmp_path: Path) -> None:
    architecture, model, lora = RESIZED[name]

    check(bases(architecture, **model), architecture, tmp_path, lora, resize=101)


def test_a_table_that_no_stack_reads_by_its_name_is_refused(
    bases: MakeBase, tmp_path: Path
) -> None:
    """Unmerged, it has no effect: merged into the table that all share it would have one."""
    lora = {"target_modules": ["q"], "modules_to_save": ["shared"]}

    with pytest.raises(InputRefused, match="it had no effect in training"):
        check(bases("t5"), "t5", tmp_path, lora)


RENAMED = [
    (".layers.", "._orig_mod.layers."),
    (".self_attn.", "._fsdp_wrapped_module.self_attn."),
    (".self_attn.", "._checkpoint_wrapped_module.self_attn."),
    ("base_model.", "module.base_model."),
    ("base_model.model.", ""),
    (".lora_A.weight", ".lora_A.my-adapter.weight"),
    ("model.layers", "model.language_model.layers"),
    ("model.model.", "model.language_model.model."),
]
"""The first three come of wrappers between modules, which other tuners' keys may have too."""


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [*(("LORA", *names) for names in RENAMED), *(("LOHA", *names) for names in RENAMED[:3])],
)
def test_names_that_trainers_put_into_keys(
    kind: str, old: str, new: str, bases: MakeBase, tmp_path: Path
) -> None:
    from peft import LoHaConfig, LoraConfig

    config = LoraConfig if kind == "LORA" else LoHaConfig
    base = bases("llama")
    adapter = train(base, "llama", tmp_path / "adapter", config(r=4, **Q))
    wanted = unmerged(base, "llama", adapter)
    file = adapter / "adapter_model.safetensors"
    save_file({key.replace(old, new): t for key, t in load_file(file).items()}, file)

    merge(MergeRequest(base=base, adapters=((adapter, 1.0),), out=tmp_path / "out"))

    torch.testing.assert_close(merged(tmp_path / "out", "llama"), wanted, rtol=1e-5, atol=1e-5)


def test_biases_that_older_versions_of_peft_trained(bases: MakeBase, tmp_path: Path) -> None:
    """They trained every parameter with `bias` in its name; PEFT still loads them."""
    from peft import LoraConfig

    base, kind = bases("gpt_oss"), "gpt_oss"
    adapter = train(base, kind, tmp_path / "adapter", LoraConfig(r=4, **Q, bias="all"))
    file = adapter / "adapter_model.safetensors"
    biases = {
        f"base_model.model.{name}": tensor + 0.1
        for name, tensor in load_file(base / "model.safetensors").items()
        if name.endswith("proj_bias")
    }
    assert biases
    save_file(load_file(file) | biases, file)
    wanted = unmerged(base, kind, adapter)

    merge(MergeRequest(base=base, adapters=((adapter, 1.0),), out=tmp_path / "out"))

    torch.testing.assert_close(merged(tmp_path / "out", kind), wanted, rtol=1e-5, atol=1e-5)


def test_keys_that_peft_would_leave_out_are_reported(tmp_path: Path) -> None:
    save_file({"model.q.lora_A.weight": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")

    with pytest.raises(InputRefused, match="no unmerged model to compare with"):
        check_peft_keys(tmp_path)


@pytest.mark.parametrize("model", [TIED, {}], ids=["tied", "untied"])
def test_adapters_of_the_same_larger_vocabulary(
    model: dict[str, Any], bases: MakeBase, tmp_path: Path
) -> None:
    """Both bring the rows that were added before training: there is nothing to weigh."""
    from peft import LoraConfig

    base = bases("llama", **model)
    adapters = [
        train(base, "llama", tmp_path / name, LoraConfig(r=4, target_modules=[name]), resize=101)
        for name in ("q_proj", "v_proj")
    ]
    merge(MergeRequest(base=base, adapters=((adapters[0], 1.0),), out=tmp_path / "first"))
    merge(
        MergeRequest(
            base=base, adapters=tuple((a, 0.5) for a in adapters), out=tmp_path / "out", workers=1
        )
    )

    first, out = (load_file(tmp_path / n / "model.safetensors") for n in ("first", "out"))
    name = "model.embed_tokens.weight"
    assert first.keys() == out.keys()
    assert out[name].shape == (101, 32)
    assert torch.equal(first[name], out[name])


def test_vocabularies_that_grew_apart_are_refused(bases: MakeBase, tmp_path: Path) -> None:
    from peft import LoraConfig

    base = bases("llama", **TIED)
    adapters = [
        train(base, "llama", tmp_path / name, LoraConfig(r=4, target_modules=[name]), resize=size)
        for name, size in (("q_proj", 101), ("v_proj", 102))
    ]

    with pytest.raises(InputRefused, match="an adapter resizes") as refused:
        merge(
            MergeRequest(
                base=base, adapters=tuple((a, 1.0) for a in adapters), out=tmp_path / "out"
            )
        )

    assert "merge it alone and at weight 1" in refused.value.hint


def test_half_of_a_grown_vocabulary_is_refused_for_what_it_is(
    bases: MakeBase, tmp_path: Path
) -> None:
    from peft import LoraConfig

    base = bases("llama", **TIED)
    saved = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    adapter = train(base, "llama", tmp_path / "a", saved, resize=101)

    with pytest.raises(InputRefused, match=r"it has weight 0\.5") as refused:
        merge(MergeRequest(base=base, adapters=((adapter, 0.5),), out=tmp_path / "out"))

    assert "other adapters" not in str(refused.value)
    assert "at weight 1" in refused.value.hint
