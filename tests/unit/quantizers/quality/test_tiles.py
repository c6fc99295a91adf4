"""A matrix that is dequantized a few rows at a time."""

import threading

import pytest
import torch
from weightsmith.quantizers.quality.runs import TILE, LazyMatrix, Squares

ROWS = 3 * TILE + 7
VALUES = torch.arange(ROWS * 2, dtype=torch.float32).reshape(ROWS, 2)


class Counting:
    def __init__(self, room=1 << 20):
        self.read: list[int] = []
        self.compared: dict[int, Squares] = {}
        self.tiles = LazyMatrix(VALUES.shape, self.rows, self.compared, self.squares, _room=room)

    def rows(self, first, last):
        self.read.append(first)
        return VALUES[first:last].clone()

    def squares(self, first, tile):
        return Squares(float(first), float(len(tile)))


@pytest.mark.parametrize("room", [0, 1 << 20])
@pytest.mark.parametrize(
    "where", [slice(0, 1), slice(TILE - 3, 2 * TILE + 3), slice(0, ROWS), slice(9, 9)]
)
def test_any_rows_are_those_of_the_whole(where, room):
    assert torch.equal(Counting(room).tiles[where], VALUES[where])


def test_an_embedding_gets_its_rows_and_every_tile_is_compared():
    made = Counting()
    rows = torch.tensor([ROWS - 1, 0, TILE, 0])

    assert torch.equal(made.tiles[rows], VALUES[rows])
    assert list(made.compared) == [0, TILE, 2 * TILE, 3 * TILE]
    assert sum(one.size for one in made.compared.values()) == ROWS


def test_what_fits_stays_and_the_rest_is_read_again_but_compared_once():
    made = Counting(room=TILE * 2 * 4)

    for _ in range(2):
        assert torch.equal(made.tiles[0:ROWS], VALUES)

    assert made.read.count(0) == 1
    assert made.read.count(2 * TILE) == 2
    assert len(made.compared) == 4


def test_several_threads_may_read_it():
    made, wrong = Counting(room=TILE * 8), list[int]()

    def read(first):
        for at in range(first, ROWS, 5):
            if not torch.equal(made.tiles[at : at + 9], VALUES[at : at + 9]):
                wrong.append(at)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not wrong
    assert sum(one.size for one in made.compared.values()) == ROWS
