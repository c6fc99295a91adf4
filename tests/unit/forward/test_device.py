"""Products on another device; here it is the CPU, by the same code but for streams."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from weightsmith.forward.greedy import Questions, greedy
from weightsmith.forward.lockstep import Lockstep
from weightsmith.forward.products import DeviceCopier, on_gpu
from weightsmith.forward.views import view
from weightsmith.merging.reference import load_network

from tests.unit.validating.conftest import make_model

PROMPTS = [[1, 7, 9, 200, 31], [1, 50, 60], [1, 300, 301]]


@pytest.mark.parametrize("rows", [1, 5, 300, 1000])
def test_products_in_pieces_are_those_of_torch(rows: int) -> None:
    matrix, inputs = torch.randn(300, 64).bfloat16(), torch.randn(7, 64)

    found = DeviceCopier(torch.device("cpu"), rows).multiply(inputs, matrix)

    torch.testing.assert_close(found, inputs @ matrix.float().T, rtol=1e-5, atol=1e-5)
    found += 1  # as the models' own code may, outside inference mode


def test_each_piece_is_copied_before_the_one_before_it_is_multiplied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, seen = DeviceCopier(torch.device("cpu"), 2), []
    copied, arrived = DeviceCopier._copied, DeviceCopier._wait_for_copy
    monkeypatch.setattr(
        DeviceCopier, "_copied", lambda d, p: (seen.append(f"copy {p[0, 0]:g}"), copied(d, p))[1]
    )
    monkeypatch.setattr(
        DeviceCopier,
        "_wait_for_copy",
        lambda d, p, e: (seen.append(f"use {p[0, 0]:g}"), arrived(d, p, e))[1],
    )

    device.multiply(torch.ones(1, 1), torch.arange(5.0)[:, None])

    assert seen == ["copy 0", "copy 2", "use 0", "copy 4", "use 2", "use 4"]


def test_answers_on_a_device_are_those_of_the_whole_model(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    asked = Questions(prompts=PROMPTS, ends=[2], most=6)
    lockstep = Lockstep(2, DeviceCopier(torch.device("cpu"), 50))
    model = view(base, [], lockstep, 0)

    found = lockstep.run({"": lambda: greedy(model, asked, lambda _: None)})[""]

    assert found.tokens == greedy(load_network(base, []), asked, lambda _: None).tokens


def test_a_device_that_fails_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def full(*_: object) -> torch.Tensor:
        asked.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DeviceCopier, "multiply", full)
    lockstep = Lockstep(2, DeviceCopier(torch.device("cpu"), 50))
    matrix, inputs = torch.randn(300, 64), torch.randn(7, 64)

    def twice() -> torch.Tensor:
        lockstep.multiply((0, 0), inputs, matrix)
        return lockstep.multiply((0, 0), inputs, matrix)

    found = lockstep.run({"": twice})[""]

    torch.testing.assert_close(found, inputs @ matrix.T)
    assert len(asked) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU here can be used")
def test_a_gpu_that_cannot_be_used_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    assert on_gpu() is None
