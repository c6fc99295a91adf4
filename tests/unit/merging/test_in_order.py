"""All data are passed on once and in order, however they are read."""

import itertools
import random
import threading

import numpy as np
import pytest
from weightsmith.merging import virtual
from weightsmith.merging.virtual import InOrder

FIRST, SIZE = 100, 1000
DATA = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)


def passing(taken: list[bytes], read: list[int]) -> InOrder:
    def some(start: int) -> np.ndarray:
        read.append(start)
        return DATA[start - FIRST :][:70]

    return InOrder(FIRST, FIRST + SIZE, some, lambda data: taken.append(bytes(data)))


def see(order: InOrder, spans: list[tuple[int, int]]) -> None:
    for start, end in spans:
        order.see(FIRST + start, DATA[start:end])


@pytest.mark.parametrize("seed", range(20))
def test_pieces_in_any_order_that_overlap_and_leave_gaps(seed):
    chosen = random.Random(seed)
    spans = [(start, start + chosen.randint(1, 60)) for start in range(0, SIZE, 40)]
    chosen.shuffle(spans)
    taken, read = [], []

    order = passing(taken, read)
    see(order, spans)
    order.finish()

    assert b"".join(taken) == DATA.tobytes()


def test_what_is_read_in_order_is_not_read_again():
    taken, read = [], []
    order = passing(taken, read)
    see(order, list(itertools.pairwise(range(0, SIZE + 1, 50))))
    order.finish()

    assert (b"".join(taken), read) == (DATA.tobytes(), [])


def test_nothing_waits_for_long(monkeypatch):
    monkeypatch.setattr(virtual, "_EARLY", 100)
    taken, read = [], []
    order = passing(taken, read)
    see(order, [(900, 1000), (700, 800)])
    order.finish()

    assert b"".join(taken) == DATA.tobytes()
    assert len(taken) > 2
    assert order._held == 0


def test_readers_of_several_threads(monkeypatch):
    monkeypatch.setattr(virtual, "_WAITING", 1)
    taken, read = [], []
    order = passing(taken, read)
    halves = [[(at, at + 10) for at in range(start, SIZE, 20)] for start in (0, 10)]
    threads = [threading.Thread(target=see, args=(order, spans)) for spans in halves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    order.finish()

    assert b"".join(taken) == DATA.tobytes()


def test_an_error_is_raised_at_the_end_and_blocks_nobody():
    def broken(_data: memoryview) -> None:
        raise OSError("full")

    order = InOrder(FIRST, FIRST + SIZE, lambda start: DATA[start - FIRST :], broken)
    see(order, [(0, 10)] * 50)
    with pytest.raises(OSError, match="full"):
        order.finish()


def test_an_empty_file():
    order = InOrder(0, 0, lambda _: DATA, lambda _: None)
    order.finish()
