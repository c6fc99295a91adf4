"""Several adapters of one tensor that are no low-rank sums: W + Σ weight · (changed - W)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from weightsmith.core.errors import InputRefused
from weightsmith.merging import engine

from tests.unit.merging.oracle import run as merge_all
from tests.unit.merging.tensors import close, delta, lora, random, save

Q = "model.layers.0.q_proj"
W = random(6, 4)
A, B, M = random(2, 4), random(6, 2), random(6).abs() + 0.5


def adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    told = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]} | config
    return save(folder, {f"base_model.model.{k}": t for k, t in tensors.items()}, **told)


def factors(scale: float = 1.0) -> dict[str, torch.Tensor]:
    return lora(Q, A * scale, B)


def plain(folder: Path) -> tuple[Path, torch.Tensor]:
    return adapter(folder, factors(0.5)), delta(A * 0.5, B)


def directed(folder: Path) -> tuple[Path, torch.Tensor]:
    """DoRA, and what it changes."""
    sums = W.double() + delta(A, B)
    lengths = sums.norm(dim=1, keepdim=True)
    changed = M.double()[:, None] * sums / lengths
    made = adapter(folder, factors() | {f"{Q}.lora_magnitude_vector": M}, use_dora=True)
    return made, changed - W.double()


def saved(folder: Path) -> tuple[Path, torch.Tensor]:
    whole = {f"{Q}.weight": W * 2 + 1}
    made = adapter(folder, whole, modules_to_save=["q_proj"], target_modules=[])
    return made, (W * 2 + 1 - W).double()


def run(
    tmp_path: Path,
    parts: list[tuple[Path, float]],
    base: dict[str, torch.Tensor] | None = None,
    **options: Any,
) -> torch.Tensor:
    """Merge, and return the first of the base's tensors."""
    tensors = base or {f"{Q}.weight": W}
    folder = save(tmp_path / "base", tensors, model_type="llama")
    merge_all(folder, parts, tmp_path / "out", **options)
    return load_file(tmp_path / "out" / "model.safetensors")[next(iter(tensors))]


@pytest.mark.parametrize(
    "kinds", [(directed,), (directed, plain), (plain, saved), (directed, saved)]
)
def test_changes_are_summed_with_their_weights(kinds: Any, tmp_path: Path) -> None:
    made = [kind(tmp_path / f"adapter{number}") for number, kind in enumerate(kinds)]
    weights = (0.7, -0.3)

    found = run(tmp_path, [(path, w) for (path, _), w in zip(made, weights, strict=False)])

    close(found, W.double() + sum(w * d for (_, d), w in zip(made, weights, strict=False)))


def test_bytes_of_computed_tensors_do_not_depend_on_workers_or_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = directed(tmp_path / "adapter")
    found = []
    for workers, block in ((2, engine.BLOCK), (1, engine.BLOCK), (3, 5)):
        monkeypatch.setattr(engine, "BLOCK", block)
        (tmp_path / str(workers)).mkdir()
        found.append(run(tmp_path / str(workers), [(path, 1.0)], workers=workers))

    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_tokens_of_two_adapters(tmp_path: Path) -> None:
    name = "model.embed_tokens"
    words = random(8, 4)
    base = {f"{name}.weight": words, "lm_head.weight": words * 1}
    parts = []
    for number, places in enumerate(([1, 5], [5, 7])):
        rows = random(2, 4) * (number + 2)
        made = adapter(
            tmp_path / f"adapter{number}",
            {f"{name}.token_adapter.trainable_tokens_delta": rows},
            trainable_token_indices=places,
            target_modules=[],
        )
        parts.append((made, places, rows))

    found = run(tmp_path, [(made, 1.0) for made, _, _ in parts], base)

    wanted = words.double()
    for _, places, rows in parts:
        wanted[places] += rows.double() - words[places].double()
    close(found, wanted)


def test_weighted_tokens_on_the_adapters_own_copy(tmp_path: Path) -> None:
    """Half of a resized embedding with trained rows is half of what each row became."""
    name = "model.embed_tokens"
    words, copy, rows = random(8, 4), random(8, 4) * 3, random(2, 4) * 5
    base = {f"{name}.weight": words, "lm_head.weight": words + 1}
    path = adapter(
        tmp_path / "adapter",
        {
            f"{name}.token_adapter.base_layer.weight": copy,
            f"{name}.token_adapter.trainable_tokens_delta": rows,
        },
        trainable_token_indices=[1, 5],
        target_modules=[],
    )

    found = run(tmp_path, [(path, 0.5)], base)

    changed = copy.double()
    changed[[1, 5]] = rows.double()
    close(found, (words.double() + changed) / 2)


def test_factors_of_a_module_that_is_saved_as_a_whole_are_left_out(tmp_path: Path) -> None:
    """PEFT never targets it."""
    whole = {f"{Q}.weight": W * 2, f"{Q}.lora_magnitude_vector": M}
    path = adapter(tmp_path / "adapter", factors() | whole, modules_to_save=["q_proj"])

    assert torch.equal(run(tmp_path, [(path, 1.0)]), W * 2)


def test_one_tensor_changed_twice_by_one_adapter_is_refused(tmp_path: Path) -> None:
    again = {name.replace("model.", ""): tensor.clone() for name, tensor in factors().items()}
    path = adapter(tmp_path / "adapter", factors() | again)

    with pytest.raises(InputRefused, match=r"changes model\.layers\.0\.q_proj\.weight twice"):
        run(tmp_path, [(path, 1.0)])


def test_a_whole_weight_beside_factors_is_refused(tmp_path: Path) -> None:
    """Only one of them is what was trained, unless the configuration says which."""
    both = factors() | {f"{Q}.weight": W * 2, f"{Q}.lora_magnitude_vector": M}
    path = adapter(tmp_path / "adapter", both, use_dora=True)

    with pytest.raises(InputRefused, match=r"q_proj\.weight \(a full weight\)"):
        run(tmp_path, [(path, 1.0)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["saved", "magnitude"])
def test_trained_tensors_that_diverged_are_refused(
    value: float, where: str, tmp_path: Path
) -> None:
    if where == "saved":
        tensors, config = {f"{Q}.weight": W * value}, {"modules_to_save": ["q_proj"]}
    else:
        tensors = factors() | {f"{Q}.lora_magnitude_vector": M * value}
        config = {"use_dora": True}
    path = adapter(tmp_path / "adapter", tensors, **config)

    with pytest.raises(InputRefused, match="NaN or infinite"):
        run(tmp_path, [(path, 1.0)])
