"""Whatever is merged exactly passes, on every architecture and adapter that PEFT computes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from weightsmith.models.tensors import CheckpointTensors

from tests.unit.validating.conftest import (
    edit_tensors,
    held,
    make_adapter,
    make_model,
    make_tuned,
    merged,
    merged_by_peft,
    passed,
    tell,
)

EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
CASES = [
    ("llama", {}, {}),
    ("llama", {"dtype": torch.float16}, {"use_rslora": True}),
    ("llama", {"dtype": torch.float32}, {}),
    ("llama", {"tie_word_embeddings": True}, {"target_modules": ["q_proj", "down_proj"]}),
    ("llama", {"tie_word_embeddings": True}, {"target_modules": ["embed_tokens", "q_proj"]}),
    ("llama", {"attention_bias": True}, {"rank_pattern": {"q_proj": 2}}),
    ("llama", {}, {"use_dora": True}),
    ("llama", {}, {"target_modules": ["lm_head", "q_proj"]}),
    ("llama", {}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("llama", {}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    ("llama", {}, {"target_modules": ["q_proj"], "modules_to_save": ["norm", "k_proj"]}),
    ("llama", {}, {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]}),
    ("llama", {}, {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 3]]}),
    ("qwen2", {}, {"alpha_pattern": {"up_proj": 32}}),
    ("qwen2", {}, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    ("qwen2", {}, {"target_modules": ["q_proj"], "lora_bias": True}),
    ("gpt2", {}, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    ("gpt2", {}, {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    ("gemma3", {}, {}),
    ("qwen3_moe", {}, {"target_modules": ["q_proj", "v_proj"]}),
    ("qwen3_moe", {}, EXPERTS),
]


@pytest.mark.grid(12)
@pytest.mark.parametrize(
    ("kind", "model", "adapter"),
    CASES,
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_exact_merge_passes(tmp_path: Path, kind: str, model: dict, adapter: dict) -> None:
    base = make_model(tmp_path / "base", kind, **model)
    lora = make_adapter(tmp_path / "lora", base, **adapter)
    out = merged(tmp_path / "out", base, lora)

    result = passed(base, out, lora)

    assert result.comparison.streamed, tell(result)
    assert result.comparison.elements.wrong == 0
    assert result.top1_agreement > 0.9
    assert result.comparison.first_difference is None
    assert result.max_abs_logit_diff < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_copy_of_the_base_in_16_bits_beside_the_factors(
    tmp_path: Path, target: str, dtype: torch.dtype
) -> None:
    """As PEFT saves it after training in 16 bits; it then rounds the factors when it loads them."""
    base = make_model(tmp_path / "base", "llama", dtype=dtype)
    lora = make_adapter(tmp_path / "lora", base, target_modules=[target, "q_proj"])
    path = lora / "adapter_model.safetensors"
    weights = CheckpointTensors(base)
    name = next(name for name in weights.names if target in name)
    copy = torch.from_numpy(weights.tensor(name)).to(dtype)
    key = f"base_model.model.{name.removesuffix('.weight')}.base_layer.weight"
    save_file(load_file(path) | {key: copy}, path, {"format": "pt"})
    out = merged(tmp_path / "out", base, lora)

    passed(base, out, lora)


@pytest.mark.grid(12)
@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        ("llama", {"use_dora": True}),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("llama", {"target_modules": ["lm_head", "q_proj"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]}),
        ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
        ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
        ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_what_peft_merges_exactly_passes(tmp_path: Path, kind: str, adapter: dict) -> None:
    base = make_model(tmp_path / "base", kind)
    lora = make_adapter(tmp_path / "lora", base, **adapter)
    out = merged_by_peft(tmp_path / "out", base, lora)

    result = passed(base, out, lora)

    assert result.comparison.streamed, tell(result)
    assert result.comparison.elements.wrong == 0


WAYS: dict[str, tuple[tuple[dict, ...], tuple[float, ...], dict]] = {
    "two": (({}, {"r": 2}), (1.0, 1.0), {}),
    "weighted": (({}, {"r": 2}), (0.7, -0.3), {}),
    "two-dora": (({"use_dora": True}, {"use_dora": True}), (1.0, 1.0), {}),
    "half-dora": (({"use_dora": True}, {}), (0.5, 0.7), {}),
    "half-saved": (({"modules_to_save": ["lm_head", "norm"]}, {"r": 2}), (0.5, 1.0), {}),
    "half-tokens": (({"trainable_token_indices": [5, 9]},), (0.5,), {}),
    "to-float32": (({},), (1.0,), {"dtype": "float32"}),
    "to-float16": (({},), (1.0,), {"dtype": "float16"}),
}


@pytest.mark.grid(12)
@pytest.mark.parametrize("name", WAYS)
def test_ways_to_merge_pass(tmp_path: Path, name: str) -> None:
    adapters, weights, options = WAYS[name]
    base = make_model(tmp_path / "base")
    loras = [
        make_adapter(tmp_path / f"lora{i}", base, seed=i, **told) for i, told in enumerate(adapters)
    ]
    out = merged(tmp_path / "out", base, *loras, weights=weights, **options)

    result = passed(base, out, *loras, weights=weights)

    assert result.comparison.streamed, tell(result)
    assert result.comparison.elements.wrong == 0


CAST: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "few-layers": ("llama", {}, {"target_modules": ["q_proj"]}),
    "tied": ("llama", {"tie_word_embeddings": True}, {"target_modules": ["q_proj"]}),
    "biases": ("qwen2", {}, {"target_modules": ["v_proj"]}),
    "trained-biases": ("qwen2", {}, {"target_modules": ["v_proj"], "bias": "all"}),
    "saved": ("llama", {}, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "transposed": ("gpt2", {}, {"target_modules": ["c_attn"]}),
    "experts": ("qwen3_moe", {}, {"target_modules": ["v_proj"]}),
}


@pytest.mark.grid(3)
@pytest.mark.parametrize("name", CAST)
def test_a_merge_that_casts_the_base_passes(name: str, tmp_path: Path) -> None:
    """The rounding of tensors that no adapter changes is no fault of the merge either."""
    kind, model, adapter = CAST[name]
    base = make_model(tmp_path / "base", kind, dtype=torch.float32, **model)
    lora = make_adapter(tmp_path / "lora", base, **adapter)
    out = merged(tmp_path / "out", base, lora, dtype="bfloat16")

    result = passed(base, out, lora)

    assert result.comparison.streamed, tell(result)
    # Not only within wide limits; of GPT-2, the twins do not round the positions.
    assert result.comparison.from_exact.rms < 0.25 * result.comparison.rounding.rms
    wrong = merged(tmp_path / "wrong", base, lora, dtype="bfloat16", weights=(0.5,))
    assert not held(base, wrong, lora).passed


@pytest.mark.grid(6)
@pytest.mark.parametrize("kind", ["loha", "ia3", "bias"])
def test_a_part_of_what_is_no_factor_passes(tmp_path: Path, kind: str) -> None:
    from peft import IA3Config, LoHaConfig, LoraConfig

    base = make_model(tmp_path / "base", "qwen2")
    config = {
        "loha": LoHaConfig(r=3, alpha=5, target_modules=["q_proj", "up_proj"]),
        "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "bias": LoraConfig(r=3, target_modules=["q_proj"], bias="lora_only"),
    }[kind]
    tuned = make_tuned(tmp_path / "tuned", base, config)
    out = merged(tmp_path / "out", base, tuned, weights=(0.5,))

    result = passed(base, out, tuned, weights=(0.5,))

    assert result.comparison.elements.wrong == 0
    assert not held(base, out, tuned).passed


def test_kinds_that_peft_cannot_hold_side_by_side_are_told(tmp_path: Path) -> None:
    from peft import IA3Config

    base = make_model(tmp_path / "base")
    rest = {"target_modules": ["k_proj"], "feedforward_modules": []}
    two = (
        make_adapter(tmp_path / "lora", base),
        make_tuned(tmp_path / "tuned", base, IA3Config(**rest)),
    )
    out = merged(tmp_path / "out", base, *two)

    result = passed(base, out, *two)

    assert "warning logits PEFT cannot load these adapters together" in tell(result)


@pytest.mark.slow
def test_a_layer_that_is_read_and_not_called_keeps_the_bases_weight(tmp_path: Path) -> None:
    """Mamba's `dt_proj`: its LoRA has no effect in PEFT's forward, so it must have none merged."""
    base = make_model(tmp_path / "base", "jamba")
    lora = make_adapter(tmp_path / "lora", base, init_lora_weights=False)
    out = merged(tmp_path / "out", base, lora)

    result = passed(base, out, lora)

    assert "reads model.layers.0.mamba.dt_proj.weight" in tell(result)
    wrong = held(base, merged_by_peft(tmp_path / "wrong", base, lora), lora)
    assert not wrong.passed
    assert "mamba.dt_proj.weight" in next(f.tensor for f in wrong.findings if f.severity == "error")


def test_what_is_not_the_merge_is_reported(tmp_path: Path, plain: tuple[Path, Path, Path]) -> None:
    base, lora, out = plain
    half = merged(tmp_path / "half", base, lora, weights=(0.5,))
    another = make_model(tmp_path / "other", "gpt2")

    for before, after, says in (
        (base, half, "added 0.5 times"),
        (out, base, "subtracted"),
        (base, another, "model_type is 'gpt2', but 'llama'"),
    ):
        result = held(before, after, lora)
        assert not result.passed
        assert says in tell(result)
    assert result.max_abs_logit_diff is None

    # Of a rounded base, by its files.
    result = passed(base, half, lora, scope="files")
    assert result.max_abs_logit_diff is None
    assert "only files" in tell(result)


def test_a_small_adapter_passes_and_its_loss_is_reported(tmp_path: Path) -> None:
    """Where all of it is below half a step of bfloat16, the exact merge is the base."""
    base = make_model(tmp_path / "base")
    lora = make_adapter(tmp_path / "lora", base, lora_alpha=0.02)
    out = merged(tmp_path / "out", base, lora)

    result = passed(base, out, lora)

    assert "merge with dtype float32" in tell(result)
    assert result.comparison.lost_to_rounding > 0.5


@pytest.mark.slow
def test_a_model_without_a_tokenizer_is_probed_too(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    for path in base.iterdir():
        if "token" in path.name or "template" in path.name:
            path.unlink()
    lora = make_adapter(tmp_path / "lora", base)
    out = merged(tmp_path / "out", base, lora)

    assert passed(base, out, lora).comparison.probes == 6
    assert not held(base, out, lora, weights=(2.0,)).passed


def with_token(folder: Path, text: str, number: int = 512) -> None:
    path = folder / "tokenizer.json"
    told = json.loads(path.read_text("utf-8"))
    told["added_tokens"].append({**told["added_tokens"][0], "id": number, "content": text})
    path.write_text(json.dumps(told), "utf-8")


def test_a_token_that_the_base_does_not_embed_either_is_a_note(tmp_path: Path) -> None:
    """As Gemma 3's text models have one for images: nobody has trained with it."""
    base = make_model(tmp_path / "base")
    with_token(base, "<image>")
    lora = make_adapter(tmp_path / "lora", base)

    result = held(base, merged(tmp_path / "out", base, lora), lora)

    assert result.passed, tell(result)
    (found,) = [f for f in result.findings if f.severity == "warning"]
    assert all(fact in found.message for fact in ("513", "512", "<image>"))


def test_a_token_of_the_adapter_that_is_not_embedded_is_a_fault(tmp_path: Path) -> None:
    """It was trained with, and its embedding was not saved with the adapter."""
    base = make_model(tmp_path / "base")
    lora = make_adapter(tmp_path / "lora", base)
    for path in base.iterdir():
        if "token" in path.name:
            shutil.copy(path, lora)
    with_token(lora, "<tool>")

    result = held(base, merged(tmp_path / "out", base, lora), lora)

    assert not result.passed
    assert "error tokenizer the tokenizer has 513 tokens" in tell(result)


@pytest.mark.slow
def test_of_other_methods_the_rest_is_judged(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    loras = [
        make_adapter(tmp_path / f"lora{i}", base, seed=i, target_modules=["q_proj"]) for i in (1, 2)
    ]
    out = merged(tmp_path / "out", base, *loras, method="ties", density=0.5)

    result = passed(base, out, *loras, scope="rest")

    assert result.max_abs_logit_diff > 0
    assert "not judged" in tell(result)

    edit_tensors(out, lambda t: t["model.layers.2.mlp.up_proj.weight"][3].zero_())
    wrong = held(base, out, *loras, scope="rest")

    assert not wrong.passed
    assert "model.layers.2.mlp.up_proj.weight" in tell(wrong)
