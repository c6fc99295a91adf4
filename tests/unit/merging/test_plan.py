"""What a plan refuses before any work, and how it reads names, ranks and scalings."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.merge_options import Merge
from weightsmith.merging import plan as planning
from weightsmith.merging.adapter_config import REFUSED, SETTINGS, read_adapter_config
from weightsmith.merging.plan import MergePlan, estimate, make_plan

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def pair(make_model: Any, make_adapter: Any) -> tuple[Path, Path]:
    base = make_model()
    return base, make_adapter(base, target_modules=["q_proj", "v_proj"])


def plan(pair: tuple[Path, Path], weight: float = 1.0, **options: Any) -> MergePlan:
    return make_plan(pair[0], [(pair[1], weight)], Merge(**options))


def refusal(pair: tuple[Path, Path]) -> InputRefused:
    with pytest.raises(InputRefused) as caught:
        plan(pair)
    assert caught.value.exit_code == 3
    assert caught.value.hint
    return caught.value


def test_plan_says_what_is_added_where(pair: tuple[Path, Path]) -> None:
    made = plan(pair, weight=0.5)

    assert made.count("merged") == 4
    (term,) = made.outputs[f"{Q}.weight"].terms
    assert (term.adapter, term.rank, term.scaling, term.factor) == (0, 4, 1.5, 0.75)
    assert term.right.stored.info.name == f"base_model.model.{Q}.lora_A.weight"
    assert not term.right.transposed


def test_a_base_s_names_are_read_once_for_all_adapters(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, names = planning.loaded_names, list[int]()
    monkeypatch.setattr(planning, "loaded_names", lambda *a: names.append(1) or loaded(*a))

    make_plan(pair[0], [(pair[1], 0.2)] * 5)

    assert len(names) == 1


OTHER, FOUR_BITS = "model_type is llama", "simulate-nf4-double, which round this base"


@pytest.mark.parametrize(
    ("trained_on", "told"),
    [
        ("mistralai/Mistral-7B-v0.3", OTHER),
        ("/data/Qwen2-tiny/", OTHER),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", ""),
        ("/qwen/base", ""),
        (None, ""),
        ("unsloth/tinyllama-bnb-4bit", FOUR_BITS),
        ("/data/Llama-3.2-1B-unsloth-BNB-4bit/", FOUR_BITS),
        ("bnb-4bit/tinyllama", ""),
    ],
)
def test_what_unknown_fields_and_the_name_of_the_base_tell(
    pair: tuple[Path, Path], trained_on: str | None, told: str, edit: Callable[..., None]
) -> None:
    """Shapes and names may fit all the same, and PEFT says nothing: no refusal, but a word."""
    edit(pair[1] / "adapter_config.json", base_model_name_or_path=trained_on, use_magic=True)

    findings = plan(pair).findings

    assert "use_magic" in findings[0]
    for text in (OTHER, FOUR_BITS):
        assert any(text in said for said in findings) == (text == told)
    assert not any(FOUR_BITS in said for said in plan(pair, quantized_base="simulate-nf4").findings)


def test_planning_needs_what_the_command_line_has_alone() -> None:
    """A plan is made where only the light packages are installed: numpy is the workers'."""
    heavy = ("torch", "numpy", "ml_dtypes", "safetensors", "peft", "transformers")
    code = (
        "import sys; sys.modules.update(dict.fromkeys(sys.argv[1:]))\n"
        "import weightsmith.merging.plan\n"
        "from weightsmith.merging.families import families; families()\n"
    )
    subprocess.run([sys.executable, "-c", code, *heavy], check=True)


def test_estimate_counts_bytes_and_memory(pair: tuple[Path, Path]) -> None:
    found = estimate(plan(pair))
    cast = estimate(plan(pair, dtype="bfloat16"))

    size = (pair[0] / "model.safetensors").stat().st_size
    assert found["read_bytes"] > size
    assert 0 < found["write_bytes"] - size < 5000
    assert 1.8 < found["write_bytes"] / cast["write_bytes"] < 2.2
    assert found["peak_memory_bytes"] < 400 << 20


@pytest.mark.parametrize(
    ("values", "rank", "scaling"),
    [
        ({}, 4, 1.5),
        ({"use_rslora": True}, 4, 6 / math.sqrt(4)),
        ({"rank_pattern": {"q_proj": 2}}, 2, 3.0),
        ({"rank_pattern": {"proj": 2}}, 4, 1.5),
        ({"rank_pattern": {r"layers\.0\..*": 3, "q_proj": 2}}, 3, 2.0),
        ({"alpha_pattern": {"self_attn.q_proj": 1}, "use_rslora": True}, 4, 0.5),
    ],
)
def test_ranks_and_scalings_are_pefts(
    values: dict[str, Any], rank: int, scaling: float, tmp_path: Path
) -> None:
    raw = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]} | values
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))

    config = read_adapter_config(tmp_path)

    assert (config.rank(Q), config.scaling(Q)) == (rank, scaling)


TARGETS = [
    {"target_modules": ["q_proj", "mlp.up_proj"]},
    {"target_modules": r".*\.(0|1)\.mlp\..*"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1, 3]},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "model.layers.3.mlp.up_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["mlp.up_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.1.*"},
]


@pytest.mark.parametrize("values", TARGETS)
def test_targets_are_pefts(values: dict[str, Any], tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    theirs = LoraConfig(**values)
    theirs.save_pretrained(tmp_path)
    ours = read_adapter_config(tmp_path)

    for layer in range(4):
        for part in ("self_attn.q_proj", "mlp.up_proj", "xq_proj", "mlp.down_proj"):
            module = f"model.layers.{layer}.{part}"
            found = check_target_module_exists(theirs, module)
            wanted = bool(found) and not isinstance(found, _ExcludedModule)
            assert ours.targets(module) == wanted, module


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"use_dora": True}, "no lora_magnitude_vector"),
        ({"kasa_config": {"beta": 1}}, "no lora_diag"),
        ({"lora_bias": True}, "no lora_B.bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save lm_head"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "OLoRA"}, "OLoRA"),
        ({"layer_replication": [[0, 1], [4, 5]]}, "layers [4]"),
        ({"target_parameters": ["up_proj.weight"]}, "target_parameters up_proj.weight"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"r": 0}, "rank must be"),
        ({"r": "4"}, "rank must be"),
        ({"lora_alpha": None}, "alpha must be"),
        ({"rank_pattern": None}, "rank_pattern is null"),
        ({"bias": None}, "bias is null"),
        ({"rank_pattern": {"(": 3}}, "not a valid LoRA configuration"),
        ({"target_modules": "("}, "not a valid LoRA configuration"),
        ({"use_rslora": "yes"}, "use_rslora must be"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"r": 8}, "has rank 4 in lora_A and 4 in lora_B, but 8"),
        ({"fan_in_fan_out": True}, "is square"),
    ],
)
def test_configurations_that_cannot_be_merged_are_refused(
    values: dict[str, Any], said: str, pair: tuple[Path, Path], edit: Callable[..., None]
) -> None:
    edit(pair[1] / "adapter_config.json", **values)

    error = refusal(pair)

    assert said in error.message
    assert "adapter_config.json" in error.message + error.hint


@pytest.mark.parametrize(
    ("new", "said"),
    [
        (lambda n: None if "1.self_attn.q_proj.lora_B" in n else n, "only one of lora_A and"),
        (lambda n: None if "layers.1" in n else n, "no weights for 2 of its target modules"),
        (lambda n: n.replace("layers.1", "layers.7"), "changes model.layers.7"),
        (lambda n: n.replace("layers.1.self_attn.v", "blocks.1.v"), "changes model.blocks.1"),
        (lambda n: n.replace("v_proj", "q_xproj"), "no weights for 2 of its target modules"),
        (lambda n: n.replace(".lora_A.", ".lora_C."), "only one of lora_A and lora_B"),
        (lambda n: n.replace(".lora_", ".lora_x"), "an unknown LoRA tensor"),
    ],
)
def test_keys_that_do_not_fit_are_refused(
    new: Callable[[str], str | None],
    said: str,
    pair: tuple[Path, Path],
    rename: Callable[..., None],
) -> None:
    rename(pair[1] / "adapter_model.safetensors", new)

    assert said in refusal(pair).message


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("base_model.model.model.norm.weight", "(a full weight)"),
        (f"base_model.model.{Q}.lora_magnitude_vector.x.y", "(DoRA)"),
        (f"base_model.model.{Q}.base_layer.weight", "(a trained base weight)"),
        (f"base_model.model.{Q}.base_layer.bias", "(a trained base weight)"),
        (f"base_model.model.{Q}.lora_C.weight", "(an unknown LoRA tensor)"),
        (f"base_model.model.{Q}.lora_embedding_A", "only one of lora_A"),
        (f"base_model.model.{Q}.lora_B.bias", "does not set lora_bias"),
        ("base_model.model.lm_head.weight", "has shape [2]"),
    ],
)
def test_leftover_keys_are_named(
    key: str, said: str, pair: tuple[Path, Path], rename: Callable[..., None]
) -> None:
    rename(pair[1] / "adapter_model.safetensors", lambda name: name, **{key: torch.ones(2)})

    assert said in refusal(pair).message


def test_an_adapter_of_another_model_shows_both_shapes(
    pair: tuple[Path, Path], make_model: Any
) -> None:
    other = make_model(name="other", hidden_size=64)

    assert "base [64, 64], adapter [32, 32]" in refusal((other, pair[1])).message


@pytest.mark.parametrize("new", [lambda n: n.removeprefix("model."), "language_model.{}".format])
def test_bases_with_other_prefixes_match_by_their_endings(
    new: Callable[[str], str], pair: tuple[Path, Path], rename: Callable[..., None]
) -> None:
    rename(pair[0] / "model.safetensors", new)

    assert {o.name for o in plan(pair).outputs.values() if o.terms} == {
        new(f"model.layers.{layer}.self_attn.{part}_proj.weight")
        for layer in range(2)
        for part in "qv"
    }


def test_incomplete_adapters_are_seen_through_prefixes(
    pair: tuple[Path, Path], rename: Callable[..., None]
) -> None:
    rename(pair[0] / "model.safetensors", lambda name: name.removeprefix("model."))
    rename(pair[1] / "adapter_model.safetensors", lambda name: None if "layers.1" in name else name)

    assert "model.layers.1.self_attn.q_proj" in refusal(pair).message


def test_ambiguous_names_are_refused(pair: tuple[Path, Path], rename: Callable[..., None]) -> None:
    path = pair[0] / "model.safetensors"
    rename(path, lambda name: f"text.{name}", **{f"vision.{Q}.weight": torch.ones(32, 32)})

    assert "several base tensors" in refusal(pair).message


@pytest.mark.parametrize("by", ["config", "keys"])
def test_quantized_bases_are_refused(
    by: str, pair: tuple[Path, Path], edit: Callable[..., None], rename: Callable[..., None]
) -> None:
    if by == "config":
        edit(pair[0] / "config.json", quantization_config={"load_in_4bit": True})
    else:
        more = {f"{Q}.weight.absmax": torch.ones(3)}
        rename(pair[0] / "model.safetensors", lambda name: name, **more)

    error = refusal(pair)

    assert "is quantized" in error.message
    assert "16-bit" in error.hint


def test_weights_must_be_finite(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="weight"):
        plan(pair, weight=math.nan)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        *(("peft_type", kind, reason) for kind, reason in sorted(REFUSED.items())),
        *((setting, {"any": 1}, reason) for setting, reason in sorted(SETTINGS.items())),
    ],
)
def test_what_has_no_merge_says_why(
    name: str, value: Any, reason: str, pair: tuple[Path, Path], edit: Callable[..., None]
) -> None:
    edit(pair[1] / "adapter_config.json", **{name: value})

    error = refusal(pair)

    assert reason in error.message
    assert "unmerged" in error.hint


def test_a_tied_head_that_is_targeted_needs_its_factors(
    make_model: Any, make_adapter: Any, rename: Callable[..., None]
) -> None:
    base = make_model(tie_word_embeddings=True)
    adapter = make_adapter(base, target_modules=["q_proj", "lm_head"])
    rename(adapter / "adapter_model.safetensors", lambda name: None if "lm_head" in name else name)

    assert "target_modules lm_head" in refusal((base, adapter)).message
