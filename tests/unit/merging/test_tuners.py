"""Each of PEFT's other tuners, merged, against its own unmerged forward pass."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from weightsmith.core.errors import InputRefused
from weightsmith.merging import blocks, peft_layers
from weightsmith.merging.adapter_config import REFUSED
from weightsmith.merging.families import families
from weightsmith.merging.families.tuners import _BY_ROWS

from tests.unit.merging.oracle import (
    Case,
    MakeBase,
    answers,
    case,
    merged,
    model_class,
    run,
    save_adapter,
)

TARGETS = ["q_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "ADALORA": {"r": 4, "init_r": 6, "target_r": 4, "lora_alpha": 6, "total_step": 10}
    | {"tinit": 1, "tfinal": 2, "deltaT": 1},
    "BEFT": {"target_modules": ["q_proj"]},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "DEFT": {"r": 4},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 20},
    "GLORA": {"r": 4},
    "GRALORA": {"r": 4},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "LOHA": {"r": 4, "alpha": 6, "rank_pattern": {"down_proj": 2}},
    "LOKR": {"r": 4, "alpha": 6},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 8, "r": 0},
    "OSF": {},
    "PEANUT": {"r": 4},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 8},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "SUPERTUNING": {},
    "TINYLORA": {},
    "UNILORA": {"r": 4, "theta_d_length": 64},
    "VBLORA": {"r": 4, "num_vectors": 16, "vector_length": 16},
    "VERA": {"r": 8},
    "WAVEFT": {"n_frequency": 20},
}
BIAS = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}
ODD: dict[str, tuple[str, Case]] = {
    "convolutions": ("LOHA", case("cnn", "convolution", r=4)),
    "convolutions-effective": (
        "LOKR",
        case("cnn", "convolution", r=4, use_effective_conv2d=True),
    ),
    "kronecker": (
        "LOKR",
        case("llama", *TARGETS, r=4, decompose_both=True, decompose_factor=4),
    ),
    "patterns": ("LOHA", case("llama", target_modules=r".*1\..*q_proj", r=4, alpha=3)),
    "vision": ("BOFT", case("vit", "q_proj", "fc1", boft_block_size=4)),
    "two-stacks": ("UNILORA", case("t5", "q", "wo", r=4, theta_d_length=64)),
    "embedding": ("HIRA", case("llama", "embed_tokens", base=TIED, r=4)),
    "positions": ("HIRA", case("gpt2", "wpe", r=4)),
    "transposed": ("IA3", case("gpt2", "c_attn", "c_proj", feedforward_modules=["c_proj"])),
    "embedding-and-head": (
        "OFT",
        case("llama", "embed_tokens", "lm_head", base=TIED, oft_block_size=8, r=0),
    ),
    "tied-head": ("LOHA", case("llama", "lm_head", base=TIED, r=4)),
    "untied-head": ("LOHA", case("llama", "lm_head", r=4)),
    "tied-head-shared": ("VERA", case("llama", "lm_head", "q_proj", base=TIED, r=8)),
    "tied-head-without-tensors": (
        "UNILORA",
        case("llama", "q_proj", "lm_head", base=TIED, r=4, theta_d_length=64),
    ),
    "beside-experts": ("LOHA", case("qwen3_moe", *TARGETS, r=4)),
    "saved": ("VERA", case("llama", *TARGETS, base=TIED, r=8, modules_to_save=["lm_head", "norm"])),
    "its-biases": (
        "BOFT",
        case("llama", *TARGETS, base=BIAS, boft_block_size=4, bias="boft_only"),
    ),
    "shared-and-biases": ("VERA", case("llama", *TARGETS, base=BIAS, r=8, bias="vera_only")),
    "all-biases": ("GLORA", case("llama", *TARGETS, base=BIAS, r=4, bias="all")),
    "cancelling-sums": ("RANDLORA", case("llama", *TARGETS, base=BIAS, r=4, bias="all")),
    "shared-out": (
        "WAVEFT",
        case("llama", *TARGETS, n_frequency=20, proportional_parameters=True),
    ),
    "batch-norms": (
        "LORA",
        case("cnn", "convolution", modules_to_save=["normalization", "classifier"]),
    ),
    "frod": ("FROD", case("llama", *TARGETS)),
    "frod-transposed": ("FROD", case("gpt2", "c_attn", "c_proj")),
    "tokens-of-a-head": (
        "TRAINABLE_TOKENS",
        case("llama", "lm_head", base=TIED, token_indices=[1, 4]),
    ),
}
"""Tuners where they are seldom put."""
MORE = [
    ("VERA", {"r": 8, "save_projection": False}),
    ("LOHA", {"r": 4, "layers_to_transform": [1]}),
    ("IA3", {"feedforward_modules": ["down_proj"], "modules_to_save": ["lm_head"]}),
    ("VBLORA", {"r": 4, "num_vectors": 16, "vector_length": 16, "save_only_topk_weights": True}),
    ("OFT", {"oft_block_size": 8, "r": 0, "block_share": True}),
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def base(bases: MakeBase) -> Path:
    return bases("llama", attention_bias=True)


def trained(
    base: Path, folder: Path, kind: str, options: dict[str, Any], architecture: str = "llama"
) -> torch.Tensor:
    """Save an adapter whose parameters are moved from where they start; return what it answers."""
    from peft import PeftModel, get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    def load() -> Any:
        return model_class(architecture).from_pretrained(base, dtype=torch.float32)

    torch.manual_seed(1)
    # A copy: PEFT adds to the list that it gets.
    options = deepcopy({"target_modules": TARGETS} | options)
    model = get_peft_model(load(), PEFT_TYPE_TO_CONFIG_MAPPING[kind](**options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    save_adapter(model.eval(), folder)
    # What is saved may not be all that was trained: the judge is the adapter as it loads.
    return answers(PeftModel.from_pretrained(load(), folder), architecture)


@pytest.mark.grid(12)
@pytest.mark.parametrize(
    ("kind", "options"), [*CASES.items(), *MORE], ids=[*CASES, *(f"{k}-more" for k, _ in MORE)]
)
def test_merged_as_unmerged(kind: str, options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    wanted = trained(base, tmp_path / "adapter", kind, options)
    result = run(base, tmp_path / "adapter", tmp_path / "out")
    found, before = merged(tmp_path / "out", "llama"), merged(base, "llama")
    signal = (wanted - before).abs().max()
    assert signal > 1e-4
    assert (found - wanted).abs().max() < 2e-3 * signal
    assert result["tensors"]["merged"] + result["tensors"]["replaced"] > 0


@pytest.mark.grid(12)
@pytest.mark.parametrize("name", ODD)
def test_odd_places(name: str, bases: MakeBase, tmp_path: Path) -> None:
    kind, (architecture, model, options) = ODD[name]
    folder, adapter = bases(architecture, **model), tmp_path / "adapter"
    wanted = trained(folder, adapter, kind, options, architecture)

    run(folder, adapter, tmp_path / "out")

    scale = float(wanted.abs().max())
    assert (merged(folder, architecture) - wanted).abs().max() > 1e-4 * scale
    found = merged(tmp_path / "out", architecture)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * max(1.0, scale))


def test_a_basis_that_the_adapter_does_not_hold_is_refused(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "adapter", "FROD", {"save_projection": False})
    with pytest.raises(InputRefused, match="has no frod_V"):
        run(base, tmp_path / "adapter", tmp_path / "out")


def test_every_method_of_peft_is_merged_or_refused() -> None:
    """A release of PEFT with a new one fails here: it needs a row and a case, or a reason."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    methods = {str(getattr(kind, "value", kind)) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    merges = {kind for family in families() for kind in family.kinds}
    tested = {*CASES, *(kind for kind, _ in ODD.values())}

    assert merges | set(REFUSED) == methods
    assert not merges & set(REFUSED)
    assert merges <= tested


@pytest.mark.grid(6)
@pytest.mark.parametrize("kind", sorted(_BY_ROWS))
def test_some_rows_at_a_time(
    kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of a few rows, as large tensors are merged, against the unmerged model."""
    options = CASES[kind]
    if kind == "IA3":
        # Scales of rows too, not of columns alone.
        options = {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    wanted = trained(base, tmp_path / "adapter", kind, options)
    monkeypatch.setattr(blocks, "BLOCK", 100)
    built: list[int] = []
    merge_layer = peft_layers.merge_layer

    def count(one: Any, *rest: Any) -> Any:
        built.append(one.shape[0])
        return merge_layer(one, *rest)

    monkeypatch.setattr(peft_layers, "merge_layer", count)
    run(base, tmp_path / "adapter", tmp_path / "out")

    assert max(n for n in built) < 32 or kind == "IA3"
    signal = (wanted - merged(base, "llama")).abs().max()
    assert (merged(tmp_path / "out", "llama") - wanted).abs().max() < 2e-3 * signal


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "VERA", "FROD"])
def test_bytes_do_not_depend_on_workers(kind: str, base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "adapter", kind, CASES.get(kind, {}))
    one, three = (
        run(base, tmp_path / "adapter", tmp_path / str(n), workers=n)["shards"] for n in (1, 3)
    )
    assert one == three


def test_sixteen_bits_are_rounded_once(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "adapter", "LOKR", CASES["LOKR"])
    found = {}
    tensors = {n: t.to(torch.bfloat16) for n, t in load_file(base / "model.safetensors").items()}
    for name, dtype in (("low", torch.bfloat16), ("high", torch.float32)):
        shutil.copytree(base, tmp_path / name)
        cast = {n: tensor.to(dtype) for n, tensor in tensors.items()}
        save_file(cast, tmp_path / name / "model.safetensors", {"format": "pt"})
        run(tmp_path / name, tmp_path / "adapter", tmp_path / f"out-{name}")
        found[name] = load_file(tmp_path / f"out-{name}" / "model.safetensors")
    assert all(torch.equal(t, found["high"][n].to(torch.bfloat16)) for n, t in found["low"].items())


def test_missing_tensors_and_another_rank_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    trained(base, adapter, "LOHA", {"r": 4})
    path, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    config, tensors = json.loads(path.read_text()), load_file(weights)
    path.write_text(json.dumps(config | {"r": 3}))
    with pytest.raises(InputRefused, match="do not fit"):
        run(base, adapter, tmp_path / "out")
    path.write_text(json.dumps(config))
    del tensors[next(name for name in tensors if name.endswith("hada_w2_b"))]
    save_file(tensors, weights)
    with pytest.raises(InputRefused, match=r"missing or unknown .*hada_w2_b"):
        run(base, adapter, tmp_path / "other")
