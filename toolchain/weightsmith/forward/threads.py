"""Products on all CPUs, and threads that work beside each other, with a share of the CPUs each.

Batches run through layers in threads, each batch as soon as it has left the layer before. What is
no product, such as norms and softmax, keeps one CPU busy; with batches of 512 tokens in threads, an
odd number of them keeps two busy. Bits are those of all batches at once: batches fill the vectors
of torch's loops, and sums are added in the order of the text. Splitting each function of torch
would let shares end within a vector.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Generic, TypeVar

import torch

from weightsmith.forward.products import Matrix, Products

CPUS = len(os.sched_getaffinity(0))
_ALL = Products(CPUS)
_own = threading.local()
Made = TypeVar("Made")


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


class Pipeline(Generic[Made]):
    """What is done with each layer, and with each batch in it.

    Threads take work in the order in which it is given, and wait for earlier work alone: so there
    is always one that does not wait.
    """

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        loaded: Callable[[int], AbstractContextManager[object]],
        work: Callable[[int, int], Made],
    ) -> None:
        """Take `loaded` (layer) and `work` (layer, batch).

        The first is entered in one thread and left in another.
        """
        self._pool, self._loaded, self._work = pool, loaded, work

    def run(self, layers: int, batches: int, most: int) -> Iterator[Sequence[Made]]:
        """Yield what each layer's batches made, with at most so many layers loaded at a time.

        Raises what the work raised, for the first layer and batch where it did.
        """
        pending: deque[tuple[ExitStack, Sequence[Future[Any]]]] = deque()
        before: Sequence[Future[Made]] = ()
        with ExitStack() as stack:
            try:
                for layer in range(layers):
                    for new in range(layer + len(pending), min(layer + most, layers)):
                        own = stack.enter_context(ExitStack())
                        loading, before = self._begin(new, batches, own, before)
                        pending.append((own, (loading, *before)))
                    made = [one.result() for one in pending[0][1]][1:]
                    pending.popleft()[0].close()
                    yield made
            finally:  # nobody may still use a layer that is left
                for _, futures in pending:
                    for one in futures:
                        one.cancel()
                    wait(futures)

    def _begin(
        self, layer: int, batches: int, own: ExitStack, before: Sequence[Future[Made]]
    ) -> tuple[Future[object], Sequence[Future[Made]]]:
        # What it needs is left with the stack `own`.
        loading = self._pool.submit(lambda: own.enter_context(self._loaded(layer)))

        def work(batch: int) -> Made:
            if before:
                before[batch].result()
            loading.result()
            return self._work(layer, batch)

        return loading, [self._pool.submit(work, batch) for batch in range(batches)]
