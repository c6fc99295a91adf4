"""Layers in threads: order, at most so many loaded at a time, and the first error."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from weightsmith.forward.threads import Pipeline, product, thread_pool


class Layers:
    """Counts what is loaded, and refuses a batch that has not left the layer before."""

    def __init__(self, fails: tuple[int, int] | None = None) -> None:
        self.fails, self.loaded, self.most = fails, set[int](), 0
        self.reached: dict[int, int] = {}
        self.lock = threading.Lock()

    @contextmanager
    def load(self, layer: int) -> Iterator[None]:
        with self.lock:
            self.loaded.add(layer)
            self.most = max(self.most, len(self.loaded))
        try:
            yield
        finally:
            with self.lock:
                self.loaded.remove(layer)

    def work(self, layer: int, batch: int) -> tuple[int, int]:
        if self.fails and (layer, batch) >= self.fails:
            raise ValueError(f"layer {layer}, batch {batch}")
        with self.lock:
            assert layer in self.loaded
            assert self.reached.get(batch, 0) == layer
            self.reached[batch] = layer + 1
        return layer, batch


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("most", [1, 2])
def test_each_batch_runs_through_all_layers_in_order(workers, batches, most) -> None:
    layers = Layers()
    with thread_pool(workers, lambda: None) as pool:
        made = list(Pipeline(pool, layers.load, layers.work).run(20, batches, most))
    assert made == [[(layer, batch) for batch in range(batches)] for layer in range(20)]
    assert not layers.loaded
    assert layers.most <= most


@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_error_is_raised_and_all_threads_end(workers) -> None:
    layers, before = Layers(fails=(3, 1)), set(threading.enumerate())
    with (
        thread_pool(workers, lambda: None) as pool,
        pytest.raises(ValueError, match="layer 3, batch 1"),
    ):
        list(Pipeline(pool, layers.load, layers.work).run(20, 4, 2))
    assert not set(threading.enumerate()) - before
    assert not layers.loaded


def test_an_error_of_loading_is_raised() -> None:
    def load(layer: int) -> Layers:
        raise MemoryError(f"layer {layer}")

    with thread_pool(2, lambda: None) as pool, pytest.raises(MemoryError, match="layer 0"):
        list(Pipeline(pool, load, Layers().work).run(3, 2, 2))


def test_threads_of_a_crew_multiply_at_once() -> None:
    torch.manual_seed(0)
    rows, matrix = torch.randn(300, 64), torch.randn(1000, 64)
    right = product(rows, matrix)
    with thread_pool(3, lambda: None) as pool:
        for found in pool.map(lambda _: product(rows, matrix), range(12)):
            torch.testing.assert_close(found, right)
