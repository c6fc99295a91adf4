"""The combined adapter, loaded by PEFT, against the merge; and what the merge says of conflicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from weightsmith.core.errors import InputRefused, UsageError

from tests.unit.merging.conftest import MakeAdapter, MakeModel
from tests.unit.merging.oracle import merged, unmerged
from tests.unit.merging.oracle import run as merge_pairs

WEIGHTS = (0.7, -0.4)


@pytest.fixture
def pair(make_model: MakeModel, make_adapter: MakeAdapter) -> tuple[Path, list[Path]]:
    base = make_model()
    return base, [
        make_adapter(base, "one", 1, r=4, lora_alpha=6),
        make_adapter(base, "two", 2, r=6, use_rslora=True, target_modules=["q_proj", "up_proj"]),
    ]


def run(base: Path, adapters: list[Path], out: Path, **options: Any) -> dict[str, Any]:
    return merge_pairs(base, list(zip(adapters, WEIGHTS, strict=False)), out, **options)


@pytest.mark.grid(5)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {"method": "linear"},
        {"method": "cat"},
        {"method": "svd", "rank": 3},
        {"method": "svd"},
        {"method": "ties_svd", "density": 0.5, "rank": 5},
        {"method": "cat", "space": "factors"},
    ],
    ids=str,
)
def test_peft_loads_what_is_kept(
    kind: str,
    options: dict[str, Any],
    make_model: MakeModel,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    base = make_model(kind)
    narrow = ["q_proj", "up_proj"] if kind == "llama" else ["c_attn"]
    wide = "all-linear" if kind == "llama" else ["c_attn", "c_proj"]
    adapters = [
        make_adapter(base, "one", 1, r=4, lora_alpha=6, target_modules=wide),
        make_adapter(base, "two", 2, r=6, lora_alpha=8, target_modules=narrow),
    ]
    result = run(base, adapters, tmp_path / "kept", keep_adapter=True, **options)
    run(base, adapters, tmp_path / "merged", **options)
    assert {entry["path"] for entry in result["files"]} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    wanted, before = merged(tmp_path / "merged", kind), merged(base, kind)
    found = unmerged(base, kind, tmp_path / "kept")
    signal = (wanted - before).abs().max()
    assert signal > 1e-3
    assert (found - wanted).abs().max() < 1e-4 * signal
    # And the kept adapter, merged, is the merge.
    merge_pairs(base, tmp_path / "kept", tmp_path / "again")
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("merged", "again"))
    assert all(torch.allclose(tensor, two[name], atol=1e-6) for name, tensor in one.items())


def test_tokenizer_and_template_go_with_the_adapter(
    pair: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """As in a merge the last one's win, a tokenizer as a whole set."""
    base, (one, two) = pair
    own = {"tokenizer.json": "{}", "tokenizer_config.json": '{"eos_token": "</s>"}'}
    for name, text in (own | {"vocab.json": "{}", "chat_template.jinja": "one"}).items():
        (one / name).write_text(text)
    for name, text in (own | {"generation_config.json": '{"eos_token_id": 3}'}).items():
        (two / name).write_text(text)

    result = run(base, [one, two], tmp_path / "kept", keep_adapter=True, method="cat")

    names = {file.name for file in (tmp_path / "kept").iterdir()}
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    assert names == weights | set(own) | {"generation_config.json", "chat_template.jinja"}
    assert names == {file["path"] for file in result["files"]}
    assert (tmp_path / "kept" / "chat_template.jinja").read_text() == "one"
    assert any("taken from the adapter two" in finding for finding in result["findings"])


def test_a_module_has_no_more_than_the_ranks_of_its_adapters(
    pair: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """Together they may have less than the rank that is asked for."""
    base, adapters = pair
    result = run(base, adapters, tmp_path / "kept", keep_adapter=True, method="svd", rank=8)
    run(base, adapters, tmp_path / "merged", method="svd", rank=8)
    assert result["ranks"] == [4, 8]
    found = unmerged(base, "llama", tmp_path / "kept")
    assert (found - merged(tmp_path / "merged", "llama")).abs().max() < 1e-5
    result = run(base, adapters, tmp_path / "three", keep_adapter=True, method="svd", rank=3)
    tensors = load_file(tmp_path / "three" / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in tensors.values()} == {*result["ranks"]} == {3}


def test_what_is_no_adapter_is_not_kept(
    pair: tuple[Path, list[Path]], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    base, adapters = pair
    with pytest.raises(UsageError, match="full rank"):
        run(base, adapters, tmp_path / "k", keep_adapter=True, method="ties", density=0.5)
    dora = make_adapter(base, "dora", 3, use_dora=True)
    with pytest.raises(InputRefused, match="more than pairs"):
        run(base, [adapters[0], dora], tmp_path / "k2", keep_adapter=True)
    assert not list(tmp_path.glob("k*/*.safetensors"))


def test_conflicts_are_measured_and_reported(pair: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, adapters = pair
    against = tmp_path / "against"
    against.mkdir()
    tensors = load_file(adapters[0] / "adapter_model.safetensors")
    turned = {n: -2 * t if "lora_B" in n else t for n, t in tensors.items()}
    save_file(turned, against / "adapter_model.safetensors")
    (against / "adapter_config.json").write_bytes(
        (adapters[0] / "adapter_config.json").read_bytes()
    )
    # The second weight is negative, so that the turned adapter pulls the same way.
    for method in ("sequential", "svd"):
        result = run(base, [adapters[0], against], tmp_path / f"same-{method}", method=method)
        (numbers,) = result["conflicts"]
        assert numbers["adapters"] == ["one", "against"]
        assert numbers["cosine"] == pytest.approx(1.0)
        assert numbers["opposing_signs"] == 0.0
        assert numbers["norm_ratio"] == pytest.approx(0.8 / 0.7, rel=1e-3)
        assert not [f for f in result["findings"] if "conflict" in f]
    result = merge_pairs(base, [(adapters[0], 1.0), (against, 1.0)], tmp_path / "opposed")
    (numbers,) = result["conflicts"]
    assert numbers["cosine"] == pytest.approx(-1.0)
    assert numbers["opposing_signs"] == 1.0
    assert len(numbers["cosine_per_tensor"]) == 14
    (warning,) = [f for f in result["findings"] if "conflict" in f]
    assert "-1.000" in warning
    assert "100%" in warning
