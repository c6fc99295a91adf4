"""Products in place of torch's own: the same values, in every shape that models use."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional
from weightsmith.forward.reproducible import reproducible

SHAPES = [
    ((5, 7), (7, 3)),
    ((2, 5, 7), (2, 7, 3)),
    ((2, 4, 5, 7), (2, 4, 7, 3)),
    ((2, 4, 5, 7), (7, 3)),
    ((1, 4, 5, 7), (2, 1, 7, 3)),
    ((7,), (7, 3)),
    ((2, 5, 7), (7,)),
]


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class Counted:
    """Multiplies in float64, and counts how often."""

    calls = 0

    def __call__(self, rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.einsum("ni,mi->nm", rows.double(), matrix.double()).float()


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("way", [torch.matmul, torch.Tensor.matmul, lambda a, b: a @ b])
def test_matrices_are_multiplied_as_torch_does(shapes, way) -> None:
    left, right = (numbers(*shape) for shape in shapes)
    product = Counted()
    with reproducible(product):
        found = way(left, right)
    assert product.calls
    torch.testing.assert_close(found, torch.matmul(left, right))


@pytest.mark.parametrize("bias", [None, numbers(3)])
def test_a_linear_layer_is_torchs(bias) -> None:
    rows, matrix, product = numbers(2, 5, 7), numbers(3, 7), Counted()
    with reproducible(product):
        found = functional.linear(rows, matrix, bias)
    assert product.calls == 1
    torch.testing.assert_close(found, functional.linear(rows, matrix, bias))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": numbers(2, 1, 6, 6)},
        {"attn_mask": torch.ones(6, 6, dtype=torch.bool).tril(1)},
    ],
    ids=lambda how: ",".join(how),
)
@pytest.mark.parametrize("heads", [4, 2])
def test_attention_is_torchs(how, heads) -> None:
    query, key, value = numbers(2, 4, 6, 8), numbers(2, heads, 6, 8), numbers(2, heads, 6, 5)
    product = Counted()
    with reproducible(product):
        found = functional.scaled_dot_product_attention(
            query, key, value, **how, enable_gqa=heads < 4
        )
    assert product.calls == 2 * 2 * heads
    right = functional.scaled_dot_product_attention(query, key, value, **how, enable_gqa=heads < 4)
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("tokens", [300, 512, 700])
def test_keys_that_no_query_sees_are_not_multiplied_if_they_change_no_bit(tokens) -> None:
    """In torch's softmax, and up to 512 keys in ours: then all are one part of the sum."""
    query, key, value = (numbers(1, 2, tokens, 8) for _ in range(3))
    sizes: list[tuple[int, int]] = []

    def product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        sizes.append((len(rows), len(matrix)))
        # One chain of sums per element, as in our kernel.
        steps = (rows[:, None, k] * matrix[None, :, k] for k in range(rows.shape[1]))
        return sum(steps, torch.zeros(len(rows), len(matrix)))

    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    with reproducible(product):
        found = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        several = len(sizes)
        whole = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert torch.equal(found, whole)
    assert len(sizes) - several == 4
    assert several == (4 if tokens > 512 else 4 * -(-tokens // 128))


def test_groups_of_rows_have_matrices_of_their_own() -> None:
    rows, matrices, product = numbers(6, 8), numbers(3, 5, 8).transpose(1, 2), Counted()
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    with reproducible(product):
        found = functional.grouped_mm(rows, matrices, offs=ends)
    assert product.calls == 3
    torch.testing.assert_close(found, torch.cat([rows[:2] @ matrices[0], rows[2:] @ matrices[2]]))


def test_threads_and_libraries_are_as_before() -> None:
    before = torch.get_num_threads(), torch.backends.mkldnn.enabled
    with reproducible(Counted()):
        assert (torch.get_num_threads(), torch.backends.mkldnn.enabled) == (1, False)
    assert (torch.get_num_threads(), torch.backends.mkldnn.enabled) == before


ACTIVATIONS = """
import torch
from transformers.activations import ACT2FN
from weightsmith.forward.reproducible import reproducible
with torch.inference_mode(), reproducible(None):
    for name in ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "tanh"):
        print(name, ACT2FN[name](torch.ones(64, 512)).shape)
"""


@pytest.mark.slow
def test_onednn_computes_no_activation() -> None:
    """Its loops are made for the CPU that they run on; it tells what it does."""
    done = subprocess.run(
        [sys.executable, "-c", ACTIVATIONS],
        check=True, capture_output=True, text=True, env={**os.environ, "ONEDNN_VERBOSE": "1"},
    )  # fmt: skip
    assert "silu torch.Size" in done.stdout
    assert "eltwise" not in done.stdout
