"""Every variant of LoRA on tiny real architectures, against PEFT's unmerged forward pass."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from weightsmith.core.errors import InputRefused
from weightsmith.merging.families import families, tuners

from tests.unit.merging import test_layouts, test_loading, test_odd_adapters
from tests.unit.merging.oracle import Case, MakeBase, case, check, run, save_adapter

Q = {"target_modules": ["q_proj", "v_proj"]}
TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True, "mlp_bias": True}


def nested(kind: str, **options: Any) -> Any:
    from peft.tuners.lora import config

    return getattr(config, kind)(**options)


def blocks(where: str) -> dict[str, Any]:
    return {
        "use_bdlora": ("BdLoraConfig", {"nblocks": 2, "match_strict": False, where: ["q_proj"]})
    }


EMBEDDING = {"target_modules": ["embed_tokens", "q_proj"]}
HEAD = {"target_modules": ["lm_head"]}
ONCE = {"ensure_weight_tying": True}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rslora": ({}, Q | {"use_rslora": True}),
    "patterns": ({}, Q | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}),
    "dora": ({}, Q | {"use_dora": True}),
    "dora-embedding": ({}, EMBEDDING | {"use_dora": True}),
    "dora-head": ({}, HEAD | {"use_dora": True}),
    "lora-bias": (BIASED, Q | {"lora_bias": True}),
    "bias-all": (BIASED, Q | {"bias": "all"}),
    "bias-lora-only": (BIASED, Q | {"bias": "lora_only"}),
    "modules-to-save": ({}, Q | {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}),
    "embedding": ({}, EMBEDDING),
    "head": ({}, HEAD),
    "tokens": ({}, Q | {"trainable_token_indices": [1, 5, 17]}),
    "tokens-both": ({}, Q | {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [3]}}),
    "kasa": ({}, Q | {"kasa_config": ("KasaConfig", {})}),
    "bdlora-a": ({}, Q | blocks("target_modules_bd_a")),
    "bdlora-b": ({}, Q | blocks("target_modules_bd_b")),
    "mica": ({}, Q | {"init_lora_weights": "mica"}),
    "velora": ({}, Q | {"velora_config": ("VeloraConfig", {})}),
    "monteclora": ({}, Q | {"monteclora_config": ("MontecloraConfig", {})}),
    "orthogonal": ({}, Q | {"init_lora_weights": "orthogonal"}),
    "replication": ({}, Q | {"layer_replication": [[0, 2], [1, 2], [0, 1]]}),
    "tied-embedding": (TIED, EMBEDDING),
    "tied-embedding-once": (TIED, EMBEDDING | ONCE),
    "tied-head": (TIED, {"target_modules": ["lm_head", "q_proj"]}),
    "tied-head-once": (TIED, HEAD | ONCE),
    "tied-both": (TIED, {"target_modules": ["lm_head", "embed_tokens"]}),
    "tied-dora": (TIED, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "tied-saved": (TIED, Q | {"modules_to_save": ["embed_tokens"]}),
    "tied-saved-head": (TIED, Q | {"modules_to_save": ["lm_head"]}),
    "tied-saved-once": (TIED, Q | {"modules_to_save": ["embed_tokens"]} | ONCE),
    "tied-tokens": (TIED, Q | {"trainable_token_indices": [1, 5, 17]}),
}
UNTIED = {"tied-embedding", "tied-head", "tied-both", "tied-dora", "tied-saved", "tied-saved-head"}


@pytest.mark.grid(6)
@pytest.mark.parametrize("name", VARIANTS)
def test_llama(name: str, bases: MakeBase, tmp_path: Path) -> None:
    model, lora = VARIANTS[name]
    lora = {
        key: nested(value[0], **value[1]) if isinstance(value, tuple) else value
        for key, value in lora.items()
    }

    # PEFT truncates KaSA's base in float32.
    room = 1e-4 if name == "kasa" else 2e-6
    check(bases("llama", **model), "llama", tmp_path, lora, room=room)

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert config["tie_word_embeddings"] == (model == TIED and name not in UNTIED)
    assert ("lm_head.weight" in names) != config["tie_word_embeddings"]


def test_an_embedding_that_is_resized_alone_is_refused(bases: MakeBase, tmp_path: Path) -> None:
    """PEFT saves the embedding alone, and the head's new rows are lost."""
    lora = {"target_modules": ["embed_tokens", "q_proj"]}
    with pytest.raises(InputRefused, match="the adapter resizes only"):
        check(bases("llama"), "llama", tmp_path, lora, resize=101)


STACKED = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
ATTENTION = ["q_proj", "v_proj", "o_proj"]
ARCHITECTURES: dict[str, Case] = {
    "qwen2": case("qwen2", base=TIED, target_modules="all-linear"),
    "qwen3": case("qwen3", target_modules="all-linear", use_dora=True),
    "gemma2": case("gemma2", "embed_tokens", *ATTENTION),
    "gemma3": case("gemma3", *ATTENTION, "gate_proj"),
    "phi3": case("phi3", "qkv_proj", "gate_up_proj", "o_proj"),
    "gpt2": case("gpt2", "c_attn", "c_fc", use_dora=True),
    "gpt2-wte": case("gpt2", "wte", "c_proj"),
    "gpt2-bias": case("gpt2", "c_attn", lora_bias=True, bias="all"),
    "falcon": case("falcon", "query_key_value", "dense_h_to_4h"),
    "t5": case("t5", "q", "v", "wo"),
    "bert": case("bert", "query", "value", bias="lora_only"),
    "bert-words": case("bert", "word_embeddings", "query"),
    "vit": case("vit", "q_proj", "fc1", "projection"),
    "vit-head": case("vit", "q_proj", modules_to_save=["classifier"]),
    "cnn": case("cnn", "convolution"),
    "cnn-dora": case("cnn", "convolution", use_dora=True),
    "qwen3-moe": case("qwen3_moe", *ATTENTION, **STACKED),
    "qwen3-moe-router": case("qwen3_moe", target_parameters=["mlp.gate.weight"]),
    "mixtral": case("mixtral", *ATTENTION, use_rslora=True, **STACKED),
    "gpt-oss": case("gpt_oss", *ATTENTION, **STACKED),
    "stacks-called-weight": case("jetmoe", target_parameters=["mlp.input_linear.weight"]),
}


@pytest.mark.grid(6)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str, bases: MakeBase, tmp_path: Path) -> None:
    kind, model, lora = ARCHITECTURES[name]

    check(bases(kind, **model), kind, tmp_path, lora)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_heads_of_another_task(kind: str, bases: MakeBase, tmp_path: Path) -> None:
    """A classifier trained on a causal base becomes a classifier's checkpoint."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForSequenceClassification

    def load(folder: Path) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=3, pad_token_id=0, dtype=torch.float32
        )

    base, ids = bases(kind), torch.arange(1, 21).view(2, 10)
    config = LoraConfig(r=4, target_modules=["q_proj", "c_attn"], task_type="SEQ_CLS")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(load(base), config)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        save_adapter(tuned, tmp_path / "adapter")
        oracle = PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval()
        result = run(base, tmp_path / "adapter", tmp_path / "out")
        merged_model = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "out", pad_token_id=0, dtype=torch.float32
        ).eval()

    with torch.no_grad():
        wanted, got = oracle(input_ids=ids).logits, merged_model(input_ids=ids).logits
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["architectures"][0].endswith("ForSequenceClassification")
    assert result["tensors"]["replaced"] == 1
    assert got.shape == (2, 3)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


ROWS = {
    "LoRA on linear layers": "gemma3",
    "LoRA on transposed layers (Conv1D, `fan_in_fan_out`)": "gpt2",
    "LoRA on Conv1d, Conv2d, Conv3d": test_layouts.test_convolutions,
    "LoRA on embeddings and heads": "tied-both",
    "LoRA on MultiheadAttention": test_layouts.test_multihead_attention,
    "`rank_pattern`, `alpha_pattern`, `use_rslora`": "patterns",
    "`lora_bias`": "lora-bias",
    "MiCA, VeLoRA, MonteCLoRA, EVA, orthogonal": "velora",
    "BD-LoRA": "bdlora-a",
    "DoRA": "dora",
    "KaSA": "kasa",
    "`modules_to_save`": "modules-to-save",
    "`bias` all or lora_only": "bias-all",
    "heads of another task (`task_type` SEQ_CLS, TOKEN_CLS, QUESTION_ANS)": (
        test_heads_of_another_task
    ),
    "resized vocabularies": test_odd_adapters.test_resized_vocabularies,
    "`trainable_token_indices`, trainable tokens": "tokens-both",
    "`target_parameters`: matrices and stacked experts": "qwen3-moe",
    "`layer_replication`": "replication",
    "LoRA on layers that the base stores in one tensor": test_loading.test_merged_as_unmerged,
}
"""Row of the reference's table -> what tries it: a case of these tables, or a test."""


def test_every_row_of_the_table_is_tried() -> None:
    told = {name for family in families() for name in family.variants}
    others = {*tuners.FAMILY.variants, "FRoD"}

    assert told - others == set(ROWS)
    assert all(callable(case) or case in VARIANTS | ARCHITECTURES for case in ROWS.values())
