"""Runs several views of a model in step, so that each weight is read once for all of them.

The last view to arrive at a matrix multiplies for all, so each weight of the base is read once for
base and adapters. Loading each model takes 280 GB for 70 billion weights in float32; hooks on
decoder layers differ between architectures.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from weightsmith.forward.libraries import ModelFails
from weightsmith.forward.products import DeviceCopier, Matrix, Products

T = TypeVar("T")
Key = tuple[int, ...]
"""The weight's position in the order in which the model uses it, the checkpoint's number, and what
else tells matrices apart, such as an expert's number."""


@dataclass(slots=True)
class _Request:
    inputs: torch.Tensor
    matrix: Matrix
    output: torch.Tensor | None = None
    failed: BaseException | None = None


class _StoppedError(Exception):
    """Another view failed, or the caller was interrupted."""


class Lockstep:
    """Runs each view in its own thread; when all of them wait, one multiplies for all.

    It takes the first requested matrix in the model's order, for all views that need it, so that it
    is read once. On another device, `products` multiplies; the views themselves stay on the CPU.
    """

    def __init__(
        self, cpus: int = 0, products: DeviceCopier | None = None, *, tiles: bool = False
    ) -> None:
        self._products = products
        self._cpus = Products(cpus or len(os.sched_getaffinity(0)), tiles=tiles)
        self._changed = threading.Condition()
        self._waiting: dict[Key, list[_Request]] = {}
        self._running = 0
        self._busy = False
        self._stopped = False

    def run(self, views: Mapping[str, Callable[[], T]]) -> dict[str, T]:
        """Return each view's result; raises the first view's error after all have ended."""
        self._running, self._stopped = len(views), False
        found: dict[str, Any] = {}
        errors: list[BaseException] = []

        def live(name: str, view: Callable[[], T]) -> None:
            torch.set_num_threads(1)
            try:
                found[name] = view()
            except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
                errors.append(error)
                self._stop()
            finally:
                with self._changed:
                    self._running -= 1
                    self._changed.notify_all()

        threads = [
            threading.Thread(target=live, args=(name, view), daemon=True)
            for name, view in views.items()
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:  # an interrupt: no view may continue after it
            self._stop()
            for thread in threads:
                thread.join()
            raise
        self._cpus.close()
        if errors:
            raise errors[0]
        return found

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._waiting.clear()
            self._changed.notify_all()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Let the other views go on while this one works without any matrix."""
        with self._changed:
            self._running -= 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._running += 1

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait for the work of another view; ModelFails if no other view is left to do it."""
        with self.away(), self._changed:
            while not ready():
                if self._stopped:
                    raise _StoppedError
                if self._running <= 0:
                    raise ModelFails("the view that this one waits for has ended")
                self._changed.wait()

    def multiply(self, key: Key, inputs: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """Return inputs [..., columns] times the matrix [rows, columns] transposed, in float32."""
        request = _Request(inputs.reshape(-1, inputs.shape[-1]), matrix)
        with self._changed:
            self._waiting.setdefault(key, []).append(request)
            while request.output is None and request.failed is None:
                if self._stopped:
                    raise _StoppedError
                if self._busy or sum(map(len, self._waiting.values())) < self._running:
                    self._changed.wait()
                else:
                    self._serve(self._waiting.pop(min(self._waiting)))
        if request.output is None:
            raise request.failed or AssertionError("the product was not computed")
        return request.output.view(*inputs.shape[:-1], matrix.shape[0])

    def _serve(self, requests: Sequence[_Request]) -> None:
        self._busy = True
        self._changed.release()
        try:
            self._multiply(requests)
        except BaseException as error:  # noqa: BLE001 - the views end with it
            for request in requests:
                request.failed = error
        finally:
            self._changed.acquire()
            self._busy = False
            self._changed.notify_all()

    def _multiply(self, requests: Sequence[_Request]) -> None:
        matrix, rows = requests[0].matrix, requests[0].inputs
        if any(request.matrix.shape != matrix.shape for request in requests):
            raise AssertionError("views asked for different matrices by one key")
        if requests[1:]:
            rows = torch.cat([request.inputs for request in requests])
        product = None
        if self._products is not None:
            try:
                product = self._products.multiply(rows, matrix)
            except RuntimeError:  # most often another program has taken the device's memory
                self._products = None  # and it is not asked again
        if product is None:
            product = self._cpus.multiply(rows, matrix)
        start = 0
        for request in requests:
            end = start + request.inputs.shape[0]
            request.output, start = product[start:end], end
