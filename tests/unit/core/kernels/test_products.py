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


@pytest.fixture
def tiles(compiled_kernels: object) -> None:
    if not native.has_tiles():
        pytest.skip("this CPU has no AMX")


def by_tiles(inputs: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return the product, having checked that nothing beside it is written."""
    whole = torch.full((len(inputs), len(matrix) + 40), 7.0)
    out = whole[:, 20 : 20 + len(matrix)]
    native.multiply_split(native.split(inputs), len(inputs), matrix, out)
    beside = torch.cat([whole[:, :20], whole[:, 20 + len(matrix) :]], 1)
    assert bool((beside == 7).all()), "columns beside the result were written"
    return out


def error(found: torch.Tensor, inputs: torch.Tensor, matrix: torch.Tensor) -> float:
    """Return the largest error, relative to the sum of the products' sizes."""
    right = inputs.double() @ matrix.double().T
    sizes = inputs.double().abs() @ matrix.double().abs().T
    return float(((found - right).abs() / sizes).max()) if sizes.numel() else 0.0


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("shape", [*SHAPES, (300, 70, 300), (33, 96, 8200)], ids=str)
def test_tiles_err_less_than_float32_may(shape: tuple) -> None:
    """A sum of n float32 may err by n times 2**-24 of its products' sizes (Higham, section 4.2)."""
    torch.manual_seed(sum(shape))
    n, rows, columns = shape
    inputs = torch.randn(n, columns) * torch.randn(n, columns).exp()
    matrix = torch.randn(rows, columns).to(torch.bfloat16)
    found = by_tiles(inputs, matrix)
    assert error(found, inputs, matrix) < min(columns + 1, 64) * 2**-24
    if columns > 1000:
        other = torch.empty(n, rows)
        native.multiply(inputs, matrix, other)
        assert error(found, inputs, matrix) < error(other, inputs, matrix)


@pytest.mark.usefixtures("tiles")
def test_no_bit_of_an_input_is_lost_in_tiles() -> None:
    """Of one column there is no sum: what is not the product itself has lost a part."""
    inputs = torch.tensor([1.0 + 2**-23, -3.1415927, 1e-20, 2.0**100 - 2.0**77, 16777215.0, 0.0])
    weights = torch.tensor([1.0, 0.5, -2.0, 256.0]).to(torch.bfloat16)
    found = by_tiles(inputs[:, None], weights[:, None])
    assert torch.equal(found, inputs[:, None] * weights.float())


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so_in_tiles(wrong: float) -> None:
    inputs, matrix = torch.randn(20, 70), torch.randn(40, 70).to(torch.bfloat16)
    inputs[17, 69] = wrong
    found = by_tiles(inputs, matrix)
    assert not bool(torch.isfinite(found[17]).any())
    assert bool(torch.isfinite(found[:17]).all() and torch.isfinite(found[18:]).all())


@pytest.mark.usefixtures("tiles")
def test_bits_of_tiles_do_not_depend_on_what_else_is_multiplied() -> None:
    torch.manual_seed(5)
    inputs, matrix = torch.randn(300, 2050), torch.randn(100, 2050).to(torch.bfloat16)
    found = by_tiles(inputs, matrix)
    for first, last in ((0, 1), (270, 300), (16, 290)):
        assert torch.equal(by_tiles(inputs[first:last], matrix[7:53]), found[first:last, 7:53])


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_only_a_walk_that_decides_no_bytes_uses_tiles(dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    inputs, matrix = torch.randn(9, 3000), torch.randn(300, 3000).to(dtype)
    ours, theirs = Products(2), Products(2, tiles=True)
    found, other = ours.multiply(inputs, matrix), theirs.multiply(inputs, matrix)
    ours.close()
    theirs.close()
    plain = torch.empty(9, 300)
    native.multiply(inputs, matrix, plain)
    assert torch.equal(found, plain)
    assert torch.equal(other, by_tiles(inputs, matrix) if dtype == torch.bfloat16 else plain)


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
