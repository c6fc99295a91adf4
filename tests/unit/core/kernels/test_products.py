"""Our kernel's products are those of float64, with every width of vectors that this CPU has."""

import pytest
import torch
from weightsmith.core.kernels import library
from weightsmith.forward import native
from weightsmith.forward.products import Products, by_library
from weightsmith.outside.toolset import tools_variable

pytestmark = [pytest.mark.builders, pytest.mark.usefixtures("compiled_kernels")]

TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [
    (1, 1, 1), (2, 33, 7), (12, 32, 32), (13, 257, 577), (25, 300, 1030), (7, 16, 512), (0, 5, 8),
]  # fmt: skip
"""Inputs, rows and columns: of whole and cut blocks, panels, tiles and parts."""


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_float64(dtype: torch.dtype, shape: tuple, lanes: int) -> None:
    torch.manual_seed(sum(shape))
    n, rows, columns = shape
    inputs, matrix = torch.randn(n, columns), torch.randn(rows, columns).to(dtype)
    whole = torch.full((n, rows + 40), 7.0)

    native.multiply(inputs, matrix, whole[:, 20 : 20 + rows])

    right = inputs.double() @ matrix.double().T
    torch.testing.assert_close(whole[:, 20 : 20 + rows].double(), right, rtol=1e-5, atol=1e-4)
    beside = torch.cat([whole[:, :20], whole[:, 20 + rows :]], 1)
    assert bool((beside == 7).all()), "columns beside the result were written"


def test_exact_sums_are_exact(lanes: int) -> None:
    """Small integers have no rounding, in any order of sums: every element must be right."""
    torch.manual_seed(0)
    inputs = torch.randint(-8, 9, (29, 700)).float()
    matrix = torch.randint(-8, 9, (519, 700)).to(torch.bfloat16)
    found = torch.empty(29, 519)
    native.multiply(inputs, matrix, found)
    assert torch.equal(found, inputs @ matrix.float().T)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("count", [1, 5, 13])
def test_bits_do_not_depend_on_the_width_of_vectors(dtype: torch.dtype, count: int) -> None:
    """What measures importance promises that for CPUs with AVX2; 4 lanes fuse nothing."""
    torch.manual_seed(count)
    inputs, matrix = torch.randn(count, 1030), torch.randn(301, 1030).to(dtype)
    found = {}
    for most in (8, 16):
        width = library.kernels().weightsmith_lanes(most)
        found[width] = torch.empty(count, 301)
        native.multiply(inputs, matrix, found[width])
    if found.keys() != {8, 16}:
        pytest.skip("this CPU has no AVX-512")
    assert torch.equal(found[8], found[16])


def test_a_transposed_matrix(lanes: int) -> None:
    inputs, matrix = torch.randn(3, 40), torch.randn(40, 50).T
    found = torch.empty(3, 50)
    native.multiply(inputs, matrix, found)
    torch.testing.assert_close(found, inputs @ matrix.T)


@pytest.mark.parametrize("cpus", [1, 2, 3])
def test_a_walk_multiplies_with_it(cpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "is_fast", lambda: True)
    inputs, matrix = torch.randn(40, 64)[::2], torch.randn(700, 64).half()
    products = Products(cpus)
    found = products.multiply(inputs, matrix)
    products.close()
    other = torch.empty_like(found)
    by_library()(inputs, matrix, other)
    torch.testing.assert_close(found, other)


def test_without_a_library_torch_multiplies(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tools_variable("kernels"), str(tmp_path))
    assert library.found() is None
    assert not native.is_fast.__wrapped__()
