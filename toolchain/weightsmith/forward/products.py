"""Products of inputs with a matrix in a file, on all CPUs or on a GPU.

Tiles go to plain threads with one OpenMP thread each: OpenMP's barriers wait for a thread that was
preempted. On AMD's CPUs, MKL behind `torch.mm` leaves AVX-512 unused (60 to 90 against 65 to 100
billion operations per second on one core). Keeping weights in float32 between passes took no less
CPU time than converting them again, and three times the memory.

Only the products move to a GPU: the next piece of a matrix is copied while one is multiplied, in
float32 without TF32, so answers differ from the CPU's only at near ties. Moving whole views would
need a second way to fill layers that PEFT computes from whole weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol, TypeAlias

import torch

from weightsmith.forward import native
from weightsmith.forward.libraries import ModelFails
from weightsmith.forward.weights import LazyRows

Matrix: TypeAlias = torch.Tensor | LazyRows


class Rows(Protocol):
    """Gives the rows that it is asked for."""

    def __getitem__(self, rows: torch.Tensor, /) -> torch.Tensor:
        """Return these rows."""


Multiply: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
"""Multiplies rows [n, columns] with a tile [m, columns] into the third tensor, [n, m]."""

_TILE = 256
"""Rows of a matrix that are converted and multiplied at a time, so that they fit a CPU's cache."""
_PANEL = 32
"""Rows that our kernel multiplies together; tiles are of whole panels."""
_SHARE = 1 << 22
"""Multiplications that are worth waking another thread for."""
_ROWS = 4096
"""Rows of a matrix that are copied at a time: few gigabytes, and copies long enough to be fast."""


class Products:
    """Spreads the tiles of a matrix over the CPUs by plain threads.

    OpenMP's barriers wait for a thread that was preempted, which on a busy machine makes products
    many times slower. A pool of concurrent.futures takes longer to start than a small product.
    """

    def __init__(self, cpus: int, *, tiles: bool = False) -> None:
        """Use AMX where there is one, if `tiles`: the bits of products then depend on the CPU."""
        self._cpus, self._tiles = cpus, tiles
        self._helpers: list[_Helper] = []

    def multiply(self, rows: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        """Return rows [n, columns] times the matrix [m, columns] transposed, in float32.

        Raises ModelFails for rows of another length or type.
        """
        if rows.dtype != torch.float32 or rows.shape[1] != matrix.shape[1]:
            # Our kernel would read memory behind them.
            shapes = f"{[*rows.shape]} and {[*matrix.shape]}"
            raise ModelFails(f"cannot multiply {shapes}, of {rows.dtype}, by rows in float32")
        rows, output = rows.contiguous(), torch.empty((rows.shape[0], matrix.shape[0]))
        if not rows.numel():
            return output.zero_()
        starts = range(0, matrix.shape[0], _height(matrix, self._cpus))
        shares = min(self._cpus, len(starts), 1 + rows.numel() * matrix.shape[0] // _SHARE)
        left = iter(starts)
        by_tiles = self._tiles and matrix.dtype == torch.bfloat16 and native.has_tiles()
        multiply = _by_tiles(rows) if by_tiles else partial(_multiply, rows)

        def work(_: int) -> None:
            with torch.inference_mode():
                for start in left:
                    tile = matrix[start : start + starts.step]
                    multiply(tile, output[:, start : start + starts.step])

        self._helpers += [_Helper() for _ in range(len(self._helpers), shares - 1)]
        others = self._helpers[: shares - 1]
        for share, helper in enumerate(others, 1):
            helper.begin(work, share)
        try:
            work(0)
        finally:
            errors = [helper.ended() for helper in others]
        for error in filter(None, errors):
            raise error
        return output

    def close(self) -> None:
        """End the threads."""
        while self._helpers:
            self._helpers.pop().close()


class _Helper:
    def __init__(self) -> None:
        self._work = SimpleQueue[tuple[Callable[[int], None], int] | None]()
        self._done = SimpleQueue[BaseException | None]()
        self._thread = threading.Thread(target=self._live, daemon=True, name=f"product-{id(self)}")
        self._thread.start()

    def begin(self, work: Callable[[int], None], share: int) -> None:
        self._work.put((work, share))

    def ended(self) -> BaseException | None:
        """Wait for the work; return its error."""
        return self._done.get()

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()

    def _live(self) -> None:
        torch.set_num_threads(1)
        while (given := self._work.get()) is not None:
            work, share = given
            try:
                work(share)
                self._done.put(None)
            except BaseException as error:  # noqa: BLE001 - raised by whoever waits for the work
                self._done.put(error)


def _height(matrix: Matrix, cpus: int) -> int:
    """Return the rows of a tile: equally many for each CPU, where rows can be read in any order."""
    if not isinstance(matrix, torch.Tensor):
        return _TILE
    height = matrix.shape[0]
    tiles = cpus * -(-height // (cpus * _TILE))
    return min(_TILE, _PANEL * -(-height // max(1, tiles * _PANEL))) or _TILE


def by_library() -> Multiply:
    """Return the fastest way to multiply rows with a tile of a matrix by a library of torch's.

    MKL, behind `torch.mm`, leaves AVX-512 unused on AMD's CPUs; oneDNN does not, and is as fast on
    others.
    """
    onednn: Any = torch.backends.mkldnn
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if linear is None or not onednn.is_available():
        return lambda rows, tile, out: out.copy_(torch.mm(rows, tile.float().T))
    linear = linear.default
    return lambda rows, tile, out: out.copy_(linear(rows, tile.float(), None, "none", [], ""))


def _multiply(rows: torch.Tensor, tile: torch.Tensor, out: torch.Tensor) -> object:
    return (native.multiply if native.is_fast() else _LIBRARY)(rows, tile, out)


def _by_tiles(rows: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], object]:
    """Return what multiplies rows with a tile in bfloat16; they are split once for all tiles."""
    return partial(native.multiply_split, native.split(rows), len(rows))


_LIBRARY = by_library()


class DeviceCopier:
    """Copies a matrix to a device piece by piece; the next is copied while one is multiplied."""

    def __init__(self, device: torch.device, rows: int = _ROWS) -> None:
        # In full float32: TF32 would round inputs to ten bits, and answers would differ.
        torch.set_float32_matmul_precision("highest")
        self._device = device
        self._rows = rows
        stream: Any = torch.cuda.Stream
        self._copies = stream(device) if device.type == "cuda" else None

    @torch.no_grad()  # in inference mode, the model's code could not change the product in place
    def multiply(self, inputs: torch.Tensor, matrix: torch.Tensor | LazyRows) -> torch.Tensor:
        """Return inputs [n, columns] times the matrix [rows, columns] transposed; on the CPU."""
        here, start = inputs.to(self._device), 0
        output = torch.empty((len(inputs), len(matrix)))
        for piece in self._pieces(matrix):
            # Back at once: a whole product can be large, the device holds a few pieces.
            output[:, start : start + len(piece)] = torch.mm(here, piece.float().T)
            start += len(piece)
        return output

    def _pieces(self, matrix: torch.Tensor | LazyRows) -> Iterator[torch.Tensor]:
        waiting: tuple[torch.Tensor, Any] | None = None
        for part in matrix.split(self._rows):
            following = self._copied(part)
            if waiting is not None:
                yield self._wait_for_copy(*waiting)
            waiting = following
        if waiting is not None:
            yield self._wait_for_copy(*waiting)

    def _copied(self, part: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        if self._copies is None:
            return part.to(self._device), None
        with torch.cuda.stream(self._copies):
            piece = part.pin_memory().to(self._device, non_blocking=True)
            return piece, self._copies.record_event()

    def _wait_for_copy(self, piece: torch.Tensor, event: torch.cuda.Event) -> torch.Tensor:
        """Return a piece that the products may use: they wait for its copy, and it for them."""
        if event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(event)
            piece.record_stream(current)
        return piece


def on_gpu() -> DeviceCopier | None:
    """Return the products of the first GPU that this torch can use, None if there is none."""
    if not torch.cuda.is_available():
        return None
    try:
        products = DeviceCopier(torch.device("cuda"))
        products.multiply(torch.ones(1, 1), torch.ones(1, 1))
    except (RuntimeError, AssertionError):  # torch was built for other drivers or cards
        return None
    return products
