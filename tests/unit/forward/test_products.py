"""Products on the CPUs: the numbers, whichever library multiplies, and errors of a share."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from weightsmith.forward import products as module
from weightsmith.forward.libraries import ModelFails
from weightsmith.forward.products import Products


@pytest.mark.parametrize("cpus", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "rows", "columns"), [(1, 1, 3), (5, 256, 8), (200, 700, 33)])
def test_products_are_those_of_float64(
    cpus: int, dtype: torch.dtype, n: int, rows: int, columns: int
) -> None:
    torch.manual_seed(0)
    inputs, matrix = torch.randn(n, columns), torch.randn(rows, columns).to(dtype)
    products = Products(cpus)

    found = products.multiply(inputs, matrix)

    products.close()
    assert found.dtype == torch.float32
    right = inputs.double() @ matrix.double().T
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-5)


def test_both_libraries_multiply_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    rows, tile, first, second = torch.randn(33, 64), torch.randn(256, 64), *torch.empty(2, 33, 256)
    module.by_library()(rows, tile, first)

    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())

    module.by_library()(rows, tile, second)
    torch.testing.assert_close(second, first)


def test_an_error_of_any_share_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, products = threading.current_thread(), Products(2)
    other = threading.Event()

    def fail(rows: torch.Tensor, tile: torch.Tensor, out: torch.Tensor) -> None:
        if threading.current_thread() is not mine:
            other.set()
            raise MemoryError("another thread's")
        other.wait(60)  # so that a tile is left for the other thread

    monkeypatch.setattr(module, "_multiply", fail)
    with pytest.raises(MemoryError, match="another"):
        products.multiply(torch.ones(100, 64), torch.ones(1000, 64))
    products.close()


@pytest.mark.parametrize(
    "rows", [torch.ones(3, 65), torch.ones(3, 63), torch.ones(3, 64).half(), torch.ones(3, 0)]
)
def test_rows_that_do_not_fit_are_an_error_and_never_read(rows: torch.Tensor) -> None:
    with pytest.raises(ModelFails, match="cannot multiply"):
        Products(1).multiply(rows, torch.ones(300, 64))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_products_of_nothing_are_zero(shape: tuple[int, int]) -> None:
    found = Products(1).multiply(torch.empty(shape), torch.empty(300, shape[1]))

    assert torch.equal(found, torch.zeros(shape[0], 300))


def test_threads_end_with_their_products() -> None:
    before, products = set(threading.enumerate()), Products(3)
    products.multiply(torch.ones(200, 64), torch.ones(1000, 64))
    started = [t for t in set(threading.enumerate()) - before if t.name.startswith("product-")]

    products.close()
    for thread in started:
        thread.join(60)

    assert len(started) == 2
    assert not any(thread.is_alive() for thread in started)
