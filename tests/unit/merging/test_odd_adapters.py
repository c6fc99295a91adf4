"""Adapters in odd configurations, as PEFT's own interface writes them, against its own forward."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from weightsmith.core.errors import InputRefused
from weightsmith.merging.claims import require_all_targeted
from weightsmith.models.peft_patterns import check_peft_keys
from weightsmith.validating.validate import ValidationRequest, validate

from tests.unit.merging.oracle import (
    Case,
    MakeBase,
    answers,
    case,
    check,
    merged,
    model_class,
    run,
    train,
    unmerged,
)
from tests.unit.merging.tensors import close, delta, lora, random
from tests.unit.merging.tensors import run as run_tensors

TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True, "mlp_bias": True}
Q = {"target_modules": ["q_proj", "v_proj"]}
SAVED = {"modules_to_save": ["embed_tokens", "lm_head"]}

WHERE: dict[str, Case] = {
    "patterns-by-path": case(
        "llama",
        *("q_proj", "up_proj"),
        use_rslora=True,
        rank_pattern={r"^model\.layers\.0\.self_attn\.q_proj": 2, r"layers\.1.*up_proj": 7},
        alpha_pattern={r"model.layers.1.self_attn.q_proj": 11},
    ),
    "layers-of-a-pattern": case("gpt2", "c_attn", layers_to_transform=[0], layers_pattern="h"),
    "excluded-by-regex": case(
        "llama", target_modules="all-linear", exclude_modules=r".*layers\.0.*(q|k)_proj"
    ),
    "fan-in-fan-out": case("gpt2", "c_attn", "c_proj", "c_fc", fan_in_fan_out=True),
    "fan-in-fan-out-of-linear": case("llama", "q_proj", "v_proj", fan_in_fan_out=True),
    "positions": case("gpt2", "wpe", "c_attn"),
    "relative-positions": case("t5", "relative_attention_bias", "q"),
    "token-types": case("bert", "token_type_embeddings", "query"),
    "all-of-bert": case("bert", target_modules="all-linear", bias="all"),
    "all-of-t5": case("t5", target_modules="all-linear"),
    "all-of-vit-dora": case("vit", target_modules="all-linear", use_dora=True),
    "head-and-its-bias": case("bert", "query", "decoder", bias="lora_only"),
    "head-and-lora-bias": case("bert", "decoder", lora_bias=True),
    "dora-rslora": case("llama", base=BIASED, **Q, use_rslora=True, use_dora=True),
    "dora-biases": case("llama", base=BIASED, **Q, use_dora=True, bias="all"),
    "lora-bias-rslora": case(
        "llama", base=BIASED, **Q, lora_bias=True, use_rslora=True, alpha_pattern={"v_proj": 9}
    ),
    "parameters-have-names-of-their-own": case(
        "llama",
        target_parameters=["q_proj.weight", "down_proj.weight"],
        rank_pattern={"q_proj": 2, "down_proj.weight": 3},
    ),
    "experts-and-patterns": case(
        "qwen3_moe",
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        rank_pattern={"experts.gate_up_proj": 2},
        alpha_pattern={"experts.down_proj": 3},
    ),
    "router-and-one-stack": case(
        "mixtral", "q_proj", target_parameters=["mlp.gate.weight", "experts.down_proj"]
    ),
    "one-transposed-stack": case("gpt_oss", target_parameters=["experts.down_proj"]),
    "saved-norms": case("llama", **Q, modules_to_save=["norm", "input_layernorm"]),
    "saved-head-norms": case("qwen3", **Q, modules_to_save=["q_norm", "k_norm"]),
    "saved-block": case("llama", "up_proj", base=BIASED, modules_to_save=["0.self_attn"]),
    "tokens-that-differ": case(
        "llama", base=TIED, **Q, trainable_token_indices={"embed_tokens": [1, 5], "lm_head": [3]}
    ),
    "head-tokens-and-embedding": case(
        "llama", "embed_tokens", base=TIED, trainable_token_indices={"lm_head": [2]}
    ),
    "two-stacks-tokens": case("t5", "q", trainable_token_indices={"shared": [1, 4]}),
    "replicated-dora": case(
        "llama", base=TIED, **Q, layer_replication=[[0, 1], [0, 2]], use_dora=True
    ),
    "head-of-another-name": case("biogpt", "embed_tokens", "q_proj"),
    "tied-head-of-another-name": case("biogpt", "q_proj", modules_to_save=["output_projection"]),
    "head-of-a-class-of-another-name": case("bert_generation", "word_embeddings"),
    "embedding-of-another-name": case("openai", "tokens_embed", "lm_head"),
    "embedding-called-w": case("ctrl", "w", "Wq"),
    "saved-embedding-called-w": case("ctrl", "Wq", modules_to_save=["w"]),
    "biases-that-peft-does-not-train": case("gpt_oss", "q_proj", bias="all"),
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

    result = run(base, adapter, tmp_path / "out")

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
    "gpt2-embedding": case("gpt2", "c_attn", "wte"),
    "t5": case("t5", "q"),
    "plain": case("llama", **Q),
    "both-tied": case("llama", base=TIED, **BOTH),
    "untied-tokens": case("llama", **Q, trainable_token_indices=[1, 93, 97]),
    "embedding-once": case("llama", "embed_tokens", "q_proj", base=TIED, **ONCE),
    "head-dora": case("llama", "lm_head", base=TIED, use_dora=True),
    "saved-both-tied": case("llama", base=TIED, **Q, **SAVED),
    "saved-both-once": case("llama", base=TIED, **Q, **SAVED, **ONCE),
    "saved-embedding": case("llama", base=TIED, **Q, modules_to_save=["embed_tokens"]),
    "saved-head": case("llama", base=TIED, **Q, modules_to_save=["lm_head"]),
    "tokens": case("llama", base=TIED, **Q, trainable_token_indices={"embed_tokens": [1, 99]}),
}


@pytest.mark.grid(6)
@pytest.mark.parametrize("name", RESIZED)
def test_resized_vocabularies(name: str, bases: MakeBase, tmp_path: Path) -> None:
    architecture, model, lora = RESIZED[name]

    check(bases(architecture, **model), architecture, tmp_path, lora, resize=101)

    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 101


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
    config = LoraConfig if kind == "LORA" else LoHaConfig
    base = bases("llama")
    adapter = train(base, "llama", tmp_path / "adapter", config(r=4, **Q))
    wanted = unmerged(base, "llama", adapter)
    file = adapter / "adapter_model.safetensors"
    save_file({key.replace(old, new): t for key, t in load_file(file).items()}, file)

    run(base, adapter, tmp_path / "out")

    torch.testing.assert_close(merged(tmp_path / "out", "llama"), wanted, rtol=1e-5, atol=1e-5)


def test_biases_that_older_versions_of_peft_trained(bases: MakeBase, tmp_path: Path) -> None:
    """They trained every parameter with `bias` in its name; PEFT still loads them."""
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

    run(base, adapter, tmp_path / "out")

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
    base = bases("llama", **model)
    adapters = [
        train(base, "llama", tmp_path / name, LoraConfig(r=4, target_modules=[name]), resize=101)
        for name in ("q_proj", "v_proj")
    ]
    run(base, adapters[0], tmp_path / "first")
    run(base, [(adapter, 0.5) for adapter in adapters], tmp_path / "out", workers=1)

    first, out = (load_file(tmp_path / n / "model.safetensors") for n in ("first", "out"))
    name = "model.embed_tokens.weight"
    assert first.keys() == out.keys()
    assert out[name].shape == (101, 32)
    assert torch.equal(first[name], out[name])


def test_vocabularies_that_cannot_be_weighed_are_refused(bases: MakeBase, tmp_path: Path) -> None:
    base = bases("llama", **TIED)
    adapters = [
        train(base, "llama", tmp_path / name, LoraConfig(r=4, target_modules=[name]), resize=size)
        for name, size in (("q_proj", 101), ("v_proj", 102))
    ]

    with pytest.raises(InputRefused, match="an adapter resizes") as refused:
        run(base, [(adapter, 1.0) for adapter in adapters], tmp_path / "out")

    assert "merge it alone and at weight 1" in refused.value.hint

    saved = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    adapter = train(base, "llama", tmp_path / "a", saved, resize=101)
    with pytest.raises(InputRefused, match=r"it has weight 0\.5") as refused:
        run(base, [(adapter, 0.5)], tmp_path / "out")

    assert "other adapters" not in str(refused.value)
    assert "at weight 1" in refused.value.hint


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.filterwarnings("ignore")
def test_converted_or_on_the_residual_base_it_is_plain_lora(
    init: str, bases: MakeBase, tmp_path: Path
) -> None:
    """The residual base is saved as PEFT's guide for PiSSA says: init_lora_weights is true."""
    base, start, converted = bases("llama"), tmp_path / "start", tmp_path / "converted"
    torch.manual_seed(1)
    model = model_class("llama").from_pretrained(base, dtype=torch.float32)
    # Another scaling than 1, which conversion has to keep.
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=init)
    tuned = get_peft_model(model, config)
    tuned.peft_config["default"].init_lora_weights = True
    tuned.save_pretrained(start)
    tuned.peft_config["default"].init_lora_weights = init
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn_like(parameter) * 0.1
    tuned.save_pretrained(tmp_path / "original")
    tuned.save_pretrained(converted, path_initial_model_for_weight_conversion=str(start))
    wanted = answers(tuned, "llama")
    tuned.float().peft_config["default"].init_lora_weights = True
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


def test_modules_to_save_that_the_base_has_not_are_a_finding(
    bases: MakeBase, tmp_path: Path
) -> None:
    """GPT-2 has no `embed_tokens`; PEFT trains without a word, as if it were not listed."""
    tuner = LoraConfig(r=4, target_modules=["c_attn"], modules_to_save=["embed_tokens", "ln_f"])
    base = bases("gpt2")
    adapter = train(base, "gpt2", tmp_path / "adapter", tuner)

    result = run(base, adapter, tmp_path / "out")

    assert "saves modules that the base does not have: embed_tokens" in result["findings"][0]
    wanted = unmerged(base, "gpt2", adapter)
    torch.testing.assert_close(merged(tmp_path / "out", "gpt2"), wanted, rtol=1e-5, atol=1e-5)


def test_targets_by_a_regex_of_a_base_whose_names_end_like_the_models(tmp_path: Path) -> None:
    """Qwen2.5-VL's `model.layers` is the model's `model.language_model.layers`."""
    text, eyes = "layers.0.mlp.up_proj", "visual.blocks.0.mlp.up_proj"
    weight, a, b = random(6, 4), random(2, 4), random(6, 2)
    base = {f"model.{text}.weight": weight, f"{eyes}.weight": weight.clone()}
    unsloth = {"target_modules": r"(?:.*?(?:language|text).*?mlp.*?(?:up_proj).*?)"}
    kind = {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"]}

    found = run_tensors(tmp_path, base, lora(f"model.language_model.{text}", a, b), unsloth, **kind)

    close(found[f"model.{text}.weight"], weight.double() + delta(a, b))
    assert torch.equal(found[f"{eyes}.weight"], weight)


def test_targets_of_which_another_part_s_older_names_end_alike(tmp_path: Path) -> None:
    """A ViT's `attention.value` is its `v_proj`; the BERT behind it has a `value` of its own."""
    eyes, text = "encoder.encoder.layer.0.attention.attention", "decoder.bert.encoder.layer.0.x"
    weight, a, b = random(6, 4), random(2, 4), random(6, 2)
    base = {f"{eyes}.{name}.weight": weight.clone() for name in ("query", "value")}
    base[f"{text}.value.weight"] = weight
    kind = {"model_type": "vision-encoder-decoder", "encoder": {"model_type": "vit"}}
    kind |= {"decoder": {"model_type": "bert"}, "architectures": ["VisionEncoderDecoderModel"]}
    factors = lora("encoder.layers.0.attention.q_proj", a, b)
    factors |= lora(f"{text}.value", a.clone(), b.clone())

    targets = {"target_modules": ["q_proj", "value"]}
    found = run_tensors(tmp_path, base, factors, targets, **kind)

    close(found[f"{eyes}.query.weight"], weight.double() + delta(a, b))
    assert torch.equal(found[f"{eyes}.value.weight"], weight)


@pytest.mark.parametrize(
    ("stored", "module"),
    [
        ("vlm.model.language_model.model.layers.0.up", "vlm.language_model.layers.0.up"),  # ColPali
        ("model.encoder.layers.0.up", "model.encoder.text_model.layers.0.up"),  # T5Gemma 2
    ],
)
def test_parts_that_files_name_otherwise(stored: str, module: str, tmp_path: Path) -> None:
    weight, a, b = random(6, 4), random(2, 4), random(6, 2)

    found = run_tensors(
        tmp_path, {f"{stored}.weight": weight}, lora(module, a, b), {"target_modules": ["up"]}
    )

    close(found[f"{stored}.weight"], weight.double() + delta(a, b))


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
