"""TIES, DARE and pruning: each element held against every choice of the adapters' changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from weightsmith.core.jobs import CombinationRule
from weightsmith.stages.validate import mixture
from weightsmith.validating.elements import MaskCounts, TensorComparison, compare_kept

from tests.unit.validating.conftest import (
    edit_tensors,
    held,
    make_adapter,
    make_model,
    merged,
    tell,
)

METHODS = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
TARGETS = ["embed_tokens", "q_proj", "down_proj"]
Q1 = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def judge(base: Path, out: Path, loras: list[Path], method: str, density: float) -> dict[str, Any]:
    given = mixture(method, "delta", density, None)
    assert given is not None
    weights = (1.0, 0.7, 0.5)[: len(loras)]
    return held(base, out, *loras, scope="rest", mixture=given, weights=weights)


def adapted(folder: Path, count: int) -> tuple[Path, list[Path]]:
    base = make_model(folder / "base")
    numbers = range(count)
    return base, [
        make_adapter(folder / f"lora{i}", base, seed=i, target_modules=TARGETS) for i in numbers
    ]


def make(
    folder: Path, method: str, count: int = 2, **options: Any
) -> tuple[Path, Path, list[Path]]:
    base, loras = adapted(folder, count)
    weights = (1.0, 0.7, 0.5)[:count]
    out = merged(
        folder / "out", base, *loras, method=method, density=0.4, weights=weights, **options
    )
    return base, out, loras


@pytest.mark.grid(12)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_what_the_merge_makes_passes(tmp_path: Path, method: str, dtype: str) -> None:
    base, out, loras = make(tmp_path, method, dtype=dtype, **seeded(method))

    result = judge(base, out, loras, method, 0.4)

    assert result.passed, tell(result)
    assert "values that the method can produce" in tell(result)


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_one_adapter_given_twice_is_not_missing(tmp_path: Path, method: str) -> None:
    """The mean of both is each of them, so no element tells which of them is there."""
    base = make_model(tmp_path / "base")
    lora = make_adapter(tmp_path / "lora", base, target_modules=["q_proj"])
    out = merged(tmp_path / "out", base, lora, lora, method=method, density=0.4, **seeded(method))
    judged = mixture(method, "delta", 0.4, None) or CombinationRule()

    result = held(base, out, lora, lora, scope="rest", mixture=judged)

    assert result.passed, tell(result)
    assert not held(base, base, lora, lora, scope="rest", mixture=judged).passed


@pytest.mark.slow
@pytest.mark.grid(4)
@pytest.mark.parametrize("rank", [None, 3, 6])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_sum_of_bounded_rank(tmp_path: Path, rank: int | None, dtype: str) -> None:
    base, loras = adapted(tmp_path, 2)
    options = {"rank": rank} if rank else {}
    out = merged(tmp_path / "out", base, *loras, method="svd", dtype=dtype, **options)
    judged = CombinationRule(truncates=True, rank=rank)

    good = held(base, out, *loras, scope="rest", mixture=judged)
    other = held(base, out, *loras, scope="rest", mixture=CombinationRule(truncates=True, rank=5))
    edit_tensors(out, lambda t: t[Q1].__setitem__((5, 7), -t[Q1][5, 7]))
    bad = held(base, out, *loras, scope="rest", mixture=judged)

    assert good.passed, tell(good)
    assert not other.passed
    assert not bad.passed
    assert f"{Q1}: 1 element differs: [5, 7]" in tell(bad)


def seeded(method: str) -> dict[str, int]:
    return {"seed": 7} if method.startswith("dare") else {}


@pytest.mark.slow
def test_three_adapters_pass(tmp_path: Path) -> None:
    base, out, loras = make(tmp_path, "dare_ties", 3, seed=3)

    result = judge(base, out, loras, "dare_ties", 0.4)

    assert result.passed, tell(result)


def flip(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q1].view(torch.int16)[5, 7] ^= -0x8000


def transpose(tensors: dict[str, torch.Tensor]) -> None:
    tensors[Q1] = tensors[Q1].T.contiguous()


def empty(tensors: dict[str, torch.Tensor]) -> None:
    tensors[EMBEDDING][9] = 0


@pytest.mark.grid(12)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("change", "tensor"), [(flip, Q1), (transpose, Q1), (empty, EMBEDDING)],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_wrong_elements_fail(
    tmp_path: Path, method: str, change: Callable[[dict[str, torch.Tensor]], None], tensor: str
) -> None:
    base, out, loras = make(tmp_path, method, **seeded(method))
    edit_tensors(out, change)

    result = judge(base, out, loras, method, 0.4)

    assert not result.passed
    assert tensor in tell(result)


@pytest.mark.grid(12)
@pytest.mark.parametrize("method", METHODS)
def test_another_scaling_fails(tmp_path: Path, method: str) -> None:
    base, out, loras = make(tmp_path, method, **seeded(method))
    path = loras[0] / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))

    result = judge(base, out, loras, method, 0.4)

    assert not result.passed


@pytest.mark.grid(12)
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_is_left_out_is_named(tmp_path: Path, method: str) -> None:
    base, out, loras = make(tmp_path, method, 1, **seeded(method))
    other = make_adapter(tmp_path / "other", base, seed=5, target_modules=TARGETS)

    result = judge(base, out, [*loras, other], method, 0.4)

    assert not result.passed
    assert f"{Q1}: adapter 2 is missing" in tell(result)


def test_what_cannot_be_told_apart_is_no_absence() -> None:
    """Changes that rounding swallows fit with the adapter and without it."""
    base = torch.full((8, 32), 1.0)
    deltas = [torch.full((8, 32), 1e-6), torch.full((8, 32), 0.25)]
    tally, kept = TensorComparison(tensor="x"), MaskCounts()

    compare_kept(
        tally, kept, CombinationRule(), 0, base, deltas, torch.full((8, 32), 1.25).bfloat16()
    )

    assert tally.wrong == 0
    assert kept.inside == [0, 256]
    assert kept.missing() == []


def test_dare_needs_its_density() -> None:
    assert mixture("dare_linear", "delta", None, None) is None
    assert mixture("ties", "delta", None, None) == CombinationRule(mean=True)
    assert mixture("ties", "factors", 0.5, None) is None
    assert mixture("ties_svd", "delta", 0.5, 8) is None
