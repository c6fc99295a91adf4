"""Views that meet at each matrix: products, whom they wait for, how a failure ends them."""

from __future__ import annotations

import threading

import pytest
import torch
from weightsmith.forward.libraries import ModelFails
from weightsmith.forward.lockstep import Lockstep


@pytest.mark.parametrize("error", [ValueError, ModelFails])
def test_a_view_that_fails_stops_the_others(error: type[Exception]) -> None:
    lockstep = Lockstep(2)
    matrix = torch.ones((4, 4))

    def endless() -> None:
        while True:
            lockstep.multiply((0, 1), torch.ones(2, 4), matrix)

    def bad() -> None:
        lockstep.multiply((0, 1), torch.ones(2, 4), matrix)
        if error is ValueError:
            raise ValueError("mine")
        lockstep.multiply((0, 0), torch.ones(2, 5), matrix)

    with pytest.raises(error, match=r"mine|cannot multiply"):
        lockstep.run({"endless": endless, "bad": bad})


def test_a_view_waits_for_another_ones_work_while_that_goes_on() -> None:
    lockstep, done = Lockstep(2), list[int]()
    matrix = torch.ones((4, 4))

    def works() -> None:
        for number in range(3):
            lockstep.multiply((0, 0), torch.ones(2, 4), matrix)
            done.append(number)

    def waits() -> int:
        lockstep.wait_until(lambda: len(done) > 1)
        seen = len(done)
        lockstep.multiply((0, 1), torch.ones(2, 4), matrix)
        return seen

    assert lockstep.run({"works": works, "waits": waits})["waits"] in {2, 3}


def test_a_view_does_not_wait_for_one_that_has_ended() -> None:
    lockstep = Lockstep(2)

    with pytest.raises(ModelFails, match="has ended"):
        lockstep.run({"ends": lambda: None, "waits": lambda: lockstep.wait_until(lambda: False)})


def test_a_view_without_matrices_lets_the_others_go_on() -> None:
    lockstep, done = Lockstep(2), threading.Event()

    def works() -> None:
        lockstep.multiply((0, 0), torch.ones(2, 4), torch.ones((4, 4)))
        done.set()

    def examines() -> bool:
        with lockstep.away():
            return done.wait(60)

    assert lockstep.run({"works": works, "examines": examines})["examines"]
