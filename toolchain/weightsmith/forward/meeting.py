"""Several views of a model run side by side and meet at each weight, so that it is read once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Key = tuple[int, int]
"""Which checkpoint, and the weight's place in the order in which a model uses its weights."""

_TILE = 128
"""Rows of a matrix that are converted and multiplied at a time: they stay in a CPU's cache."""
_WIDE_TILE = 512
"""The same where many inputs share the tile, so that its conversion costs little beside them."""
_MANY = 160


@dataclass(slots=True)
class _Request:
    """One view's inputs to a matrix, and the product once it is there."""

    inputs: torch.Tensor
    matrix: torch.Tensor
    output: torch.Tensor | None = None
    failed: BaseException | None = None


class Meeting:
    """Runs views in threads of their own; a matrix is multiplied when all of them wait.

    Then the one that comes first in the model is read once for all views that ask for it. Tiles are
    spread over the CPUs by plain threads: OpenMP's barriers wait for a thread that was preempted,
    which on a busy machine makes products many times slower.
    """

    def __init__(self, cpus: int = 0) -> None:
        self._cpus = cpus or len(os.sched_getaffinity(0))
        self._changed = threading.Condition()
        self._waiting: dict[Key, list[_Request]] = {}
        self._running = 0

    def run(self, views: Mapping[str, Callable[[], T]]) -> dict[str, T]:
        """Return what each view returns; raises the first view's error when all have ended."""
        self._running = len(views)
        found: dict[str, Any] = {}
        errors: list[BaseException] = []

        def live(name: str, view: Callable[[], T]) -> None:
            torch.set_num_threads(1)
            try:
                found[name] = view()
            except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
                errors.append(error)
            finally:
                with self._changed:
                    self._running -= 1
                    self._changed.notify_all()

        with ThreadPoolExecutor(
            self._cpus, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            threads = [
                threading.Thread(target=live, args=(name, view), daemon=True)
                for name, view in views.items()
            ]
            for thread in threads:
                thread.start()
            self._serve(pool)
            for thread in threads:
                thread.join()
        if errors:
            raise errors[0]
        return found

    def multiply(self, key: Key, inputs: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Return inputs [..., columns] times the matrix [rows, columns] transposed, in float32."""
        request = _Request(inputs.reshape(-1, inputs.shape[-1]), matrix)
        with self._changed:
            self._waiting.setdefault(key, []).append(request)
            self._changed.notify_all()
            while request.output is None and request.failed is None:
                self._changed.wait()
        if request.output is None:
            raise request.failed or AssertionError("nobody multiplied")
        return request.output.view(*inputs.shape[:-1], matrix.shape[0])

    def _serve(self, pool: ThreadPoolExecutor) -> None:
        """Multiply for whoever waits, until no view runs any more."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._count() == self._running)
                if not self._running:
                    return
                requests = self._waiting.pop(min(self._waiting))
            try:
                _multiply(requests, pool, self._cpus)
            except BaseException as error:  # noqa: BLE001 - the views end with it
                for request in requests:
                    request.failed = error
            with self._changed:
                self._changed.notify_all()

    def _count(self) -> int:
        return sum(len(requests) for requests in self._waiting.values())


def _multiply(requests: Sequence[_Request], pool: ThreadPoolExecutor, cpus: int) -> None:
    matrix = requests[0].matrix
    rows = (
        torch.cat([request.inputs for request in requests]) if requests[1:] else requests[0].inputs
    )
    output = torch.empty((len(rows), len(matrix)))
    step = _WIDE_TILE if len(rows) > _MANY else _TILE
    starts = range(0, len(matrix), step)

    def work(first: int) -> None:
        with torch.inference_mode():
            for start in starts[first::cpus]:
                tile = matrix[start : start + step].float()
                output[:, start : start + step] = rows @ tile.T

    list(pool.map(work, range(min(cpus, len(starts)))))
    for request, part in zip(
        requests, torch.split(output, [len(r.inputs) for r in requests]), strict=True
    ):
        request.output = part
