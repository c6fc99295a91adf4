"""Products on all CPUs, and threads that work beside each other, with a share of the CPUs each."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager

import torch

from weightsmith.forward.products import Matrix, Products

CPUS = len(os.sched_getaffinity(0))
_ALL = Products(CPUS)
_own = threading.local()


def product(rows: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """Return rows [n, inputs] times the matrix [m, inputs] transposed, by the fastest way.

    Float32 [n, m]. It runs on all CPUs, and for a thread of such a pool on its share of them.
    """
    products: Products = getattr(_own, "products", _ALL)
    with unwatched():
        return products.multiply(rows, matrix)


def unwatched() -> AbstractContextManager[None]:
    """Keep modes that replace torch's functions from looking at each one in the block.

    Their looks at the steps of a walk's products took 0.2 of the support bot's CPU seconds.
    """
    disabled: AbstractContextManager[None] = torch._C.DisableTorchFunction()  # noqa: SLF001
    return disabled


@contextmanager
def thread_pool(count: int, begin: Callable[[], object]) -> Iterator[ThreadPoolExecutor]:
    """Yield so many threads that share the CPUs; each calls `begin` first.

    What they have not begun at the end of the block is dropped.
    """
    teams: list[Products] = []

    def start() -> None:
        torch.set_num_threads(1)
        _own.products = Products(max(1, CPUS // count))
        teams.append(_own.products)
        begin()

    with ThreadPoolExecutor(count, "products", start) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
            for products in teams:
                products.close()
