"""How long one decoder layer of a model takes on this machine, without the model's weights.

It runs the middle layer, with random weights of its shapes in memory, for 8 and for 256 tokens; a
line through both gives the time for any number. Figures of earlier jobs would be of other models
and other loads. Disks are not in it: weights that fit into the page cache are read once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from weightsmith.core.errors import InputRefused
from weightsmith.core.values import JsonValue
from weightsmith.forward.lockstep import Lockstep
from weightsmith.forward.network import decoder_of, skeleton
from weightsmith.forward.products import on_gpu
from weightsmith.forward.views import stream

if TYPE_CHECKING:
    from weightsmith.forward.kinds import Model

_WIDTH = 32
"""Tokens of a row."""
_HEAD_ROWS = 16_384
"""Rows of the head that are multiplied; the others take as long in proportion."""
_BLOCK = 1 << 22


class _Random:
    """Stands for a checkpoint's weights; all matrices share one random buffer in bfloat16."""

    def __init__(self, model: Model) -> None:
        shapes = {name: tuple(part.shape) for name, part in model.named_parameters()}
        head = model.get_output_embeddings().weight.shape
        self._rows = min(_HEAD_ROWS, head[0])
        sizes = [math.prod(shape[-2:]) for n, shape in shapes.items() if ".layers." in f".{n}"]
        sizes.append(self._rows * head[1])
        block = (torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
        self._buffer = block.repeat(-(-max(sizes) // _BLOCK))
        self._shapes = shapes
        self.order = {name: place for place, name in enumerate(shapes)}

    def tensor_of(self, parameter: str) -> str:
        return parameter if len(self._shapes.get(parameter, ())) == 2 else ""

    def tensors_of(self, parameter: str) -> tuple[str, ...]:
        return (parameter,)

    def experts(self, parameter: str) -> Sequence[Sequence[Callable[[], torch.Tensor]]]:
        count, *shape = self._shapes[parameter]
        return [[partial(self.matrix, shape)]] * count

    def mapped(self, tensor: str) -> torch.Tensor:
        return self.matrix(self._shapes[tensor])

    def matrix(self, shape: Sequence[int]) -> torch.Tensor:
        size = math.prod(shape)
        if size > len(self._buffer):  # an embedding, with equal rows
            return self._buffer[: shape[1]].expand(*shape)
        return self._buffer[:size].view(*shape)

    def whole(self, parameter: str) -> torch.Tensor:
        shape = self._shapes[parameter]  # small enough for the states to stay finite
        return torch.full(shape, 0.02) if len(shape) > 1 else torch.ones(shape)


def layer_time(
    root: Path, counts: Sequence[int], tell: Callable[[int, int], None]
) -> Mapping[str, JsonValue]:
    """Return `layers`, and the seconds of one `layer` and of the `head` for each count of tokens.

    The layer in the middle runs with random weights of its shapes in memory, by the code of the
    other jobs; the faster of two runs counts. Raises InputRefused for an architecture without a
    list of decoder layers.
    """
    model = skeleton(root)
    decoder = decoder_of(model)
    found = [(n, m) for n, m in decoder.named_children() if isinstance(m, nn.ModuleList)]
    if len(found) != 1:
        raise InputRefused(
            f"{type(model).__name__} has no single list of decoder layers to measure",
            hint="plan without --measure",
        )
    ((name, layers),) = found
    weights: Any = _Random(model)
    setattr(decoder, name, nn.ModuleList([layers[len(layers) // 2]]))
    decoder.config.num_hidden_layers = 1
    lockstep = Lockstep(products=on_gpu())
    stream(model, weights, lockstep, 0)
    head = model.get_output_embeddings().weight.shape
    matrix, key = weights.matrix((min(_HEAD_ROWS, head[0]), head[1])), (len(weights.order), 0)

    @torch.inference_mode()  # it is per thread
    def run() -> dict[str, list[float]]:
        times: dict[str, list[float]] = {"layer": [], "head": []}
        for done, count in enumerate(counts, 1):
            ids = torch.zeros((-(-count // _WIDTH), min(count, _WIDTH)), dtype=torch.long)
            states = torch.randn((count, head[1]))
            times["layer"].append(_fastest(partial(decoder, input_ids=ids, use_cache=False)))
            part = _fastest(partial(lockstep.multiply, key, states, matrix))
            times["head"].append(part * head[0] / len(matrix))
            tell(done, len(counts))
        return times

    return {"layers": len(layers), "counts": list(counts), **lockstep.run({"": run})[""]}


def _fastest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(2):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
