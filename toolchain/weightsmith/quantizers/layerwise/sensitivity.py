"""What a model loses if a matrix is rounded to a type, from one walk forward and one back.

The loss is the expected Kullback-Leibler divergence of the next token, in nats, to second order in
the error dW: a half of dW F dW, with the Fisher information F of the model's own predictions. F of
a matrix is taken as K-FAC takes it, and of that the diagonal (Martens and Grosse, Optimizing Neural
Networks with Kronecker-factored Approximate Curvature, 2015, section 3):

    1/2 sum over outputs i and inputs j of  E[g_i^2] E[x_j^2] dW_ij^2

x is a matrix's input, and g the gradient of log p by its output, where p is the probability of a
token that the model itself drew. So an error counts by what it changes in the end, not by what it
changes in its own layer. One layer at a time is in memory, and the states in front of each.

Where later inputs make up for the errors of earlier ones, as GPTQ does, what they leave of E[x_j^2]
stands in its place: the D of the moments' L D L^T (Chee et al., QuIP, 2023, section 3), damped as
GPTQ's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from weightsmith.core.kernels import quants
from weightsmith.forward.layers import Layers
from weightsmith.forward.memory import LOGIT_BYTES
from weightsmith.forward.reproducible import reproducible
from weightsmith.forward.threads import product
from weightsmith.quantizers.gguf_importance import Importance
from weightsmith.quantizers.gguf_mix import EMBEDDING, HEAD, LOSS_TOKENS, Losses, kinds_of_rows
from weightsmith.quantizers.layerwise.importance import DOWN, GATED, NAMES, Progress, windows
from weightsmith.quantizers.layerwise.observing import is_experts
from weightsmith.quantizers.layerwise.quantizing import unexplained

_ROWS = 256
"""Rows of a tensor that are rounded; the errors of the others are taken to be as large for their
size."""
_DIGITS = 6


@dataclass(slots=True)
class _Moments:
    """Sums of squares over the tokens that a matrix gets."""

    inputs: torch.Tensor
    """float64 [columns]"""
    gradients: torch.Tensor
    """By its outputs: float64 [rows]."""
    gram: torch.Tensor | None
    """Sum of x x^T, float32 [columns, columns], if it is wanted."""
    count: int = 0

    @classmethod
    def of_none(cls, rows: int, columns: int, *, gram: bool = False) -> _Moments:
        """Return those of no token."""
        kind = torch.float64
        products = torch.zeros(columns, columns) if gram else None
        return cls(torch.zeros(columns, dtype=kind), torch.zeros(rows, dtype=kind), products)

    def add(self, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        """Add those of inputs [tokens, columns] and gradients [tokens, rows]."""
        self.inputs += inputs.double().square_().sum(0)
        self.gradients += gradients.double().square_().sum(0)
        self.count += len(inputs)
        if self.gram is not None:
            turned = inputs.T.contiguous()
            self.gram += product(turned, turned)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a tensor, and what the square of each error counts."""

    rows: torch.Tensor
    """float32 [rows, columns]"""
    by_row: torch.Tensor
    """float64 [rows, 1], or [rows, columns]."""
    by_column: torch.Tensor
    """float64 [columns]"""
    left: torch.Tensor | None = None
    """Likewise, where later columns make up for errors."""
    importance: np.ndarray | None = None
    """What they are rounded with: float32 [columns]."""

    def picked(self, step: int) -> _Rows:
        """Return each row of so many."""
        rows, by_row = self.rows[::step].contiguous(), self.by_row[::step]
        return replace(self, rows=rows, by_row=by_row)

    def counts(self, errors: torch.Tensor, by_column: torch.Tensor | None = None) -> float:
        """Return what errors [rows, columns] count."""
        columns = self.by_column if by_column is None else by_column
        parts = zip(torch.split(errors, _ROWS), torch.split(self.by_row, _ROWS), strict=True)
        return math.fsum(
            float((part.double().square_() * columns * own).sum()) for part, own in parts
        )

    def loss(self, kind: str, types: Types) -> float:
        """Return what the errors of a type count."""
        made = types.rounded(kind, self.rows.numpy(), self.importance)
        left = self.left if types.compensated(kind) else None
        return self.counts(torch.from_numpy(made) - self.rows, left)


Rounded = Callable[[str, np.ndarray, np.ndarray | None], np.ndarray]
"""(type, float32 rows [n, columns], importance [columns]) -> those rows as they will be read."""


@dataclass(frozen=True, slots=True)
class Types:
    """The types whose losses are measured."""

    of: Callable[[str, int], Sequence[str]]
    """(tensor, columns) -> its types."""
    rounded: Rounded
    compensated: Callable[[str], bool] = lambda _: False
    """(type) -> whether later columns make up for the errors of earlier ones."""


def gguf_types(*, low: bool) -> Types:
    """Return llama.cpp's; `low` adds those below four bits."""

    def rounded(kind: str, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        import gguf

        made = quants.quantize_rows(kind, rows, importance)
        found: np.ndarray = gguf.dequantize(made, gguf.GGMLQuantizationType[kind])
        return found

    return Types(lambda _, columns: kinds_of_rows(columns, low=low), rounded)


def sensitivities(
    model: Path,
    texts: Sequence[str],
    tokens: int,
    importance: Importance,
    types: Types,
    progress: Progress = lambda *_: None,
) -> Losses:
    """Return what each matrix of the layers, the embedding and the head loses by each type.

    By llama.cpp's names; `importance` is what rows are rounded with. In an environment of
    `AVX2_LOOPS`, the bits do not depend on the CPU. Raises as `importance.importance` does.
    """
    chunks = windows(model, texts, tokens)
    most = max(1, LOSS_TOKENS // len(chunks[0]))
    chunks = chunks[:: -(-len(chunks) // most)]
    walk = _BackwardWalk(Layers(model, chunks, len(chunks[0])), importance, types)
    with reproducible(walk.multiply):
        walk.run(progress)
    return walk.losses


@dataclass(slots=True)
class _BackwardWalk:
    """Runs the layers forward, then back, and sees the products of matrices that it knows."""

    layers: Layers
    importance: Importance
    types: Types
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    _known: dict[int, _Moments] = field(default_factory=dict)
    """Address of a matrix's weights -> its sums."""

    @property
    def tokens(self) -> int:
        """How many the losses are a mean over."""
        return sum(batch.ids.numel() for batch in self.layers.batches)

    def multiply(self, rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Return rows [n, columns] times the matrix [m, columns] transposed."""
        function: Any = _Product
        made: torch.Tensor = function.apply(rows, matrix, self._known.get(matrix.data_ptr()))
        return made

    def run(self, progress: Progress) -> None:
        """Find the losses of all tensors."""
        layers, total = self.layers, 2 * len(self.layers.layers)
        entered: list[list[torch.Tensor]] = []
        for number in range(len(layers.layers)):
            # In half the memory: gradients are taken where the states are, nearly.
            entered.append([one.bfloat16() for one in layers.states])
            with layers.loaded(number):
                layers.states = [layers.run(number, n) for n in range(len(layers.batches))]
                layers.require_finite(number, layers.states)
            progress(number + 1, total)
        gradients = self._through_head()
        for number in reversed(range(len(layers.layers))):
            layers.states = [one.float().requires_grad_() for one in entered[number]]
            self._through_layer(number, gradients)
            gradients = [_gradient(one) for one in layers.states]
            progress(total - number, total)
        self._add_embedding(entered[0], gradients)

    def _through_layer(self, number: int, gradients: Sequence[torch.Tensor]) -> None:
        """Give the states in front of a layer their gradients, and add what its tensors lose."""
        with self.layers.with_weights(number) as layer:
            for module in layer.modules():
                if type(module) is nn.Linear:
                    del module.forward  # else it multiplies without us
            products = [*_products(layer, f"blk.{number}.")]
            for matrix, parts in products:
                kinds = (self.types.of(tensor, matrix.shape[1]) for tensor in parts)
                gram = any(self.types.compensated(kind) for each in kinds for kind in each)
                self._known[matrix.data_ptr()] = _Moments.of_none(*matrix.shape, gram=gram)
            for batch, gradient in enumerate(gradients):
                torch.autograd.backward([self.layers.run(number, batch)], [gradient])
            rows_of: dict[str, list[_Rows]] = {}
            for matrix, heights in products:
                sums, start = self._known[matrix.data_ptr()], 0
                columns, left = self._by_column(sums), self._left(sums)
                for tensor, height in heights.items():
                    own = slice(start, start + height)
                    made = _Rows(matrix[own], sums.gradients[own, None], columns, left)
                    rows_of.setdefault(tensor, []).append(made)
                    start += height
            for tensor, each in rows_of.items():
                values = self.importance.of(tensor, each[0].rows.shape[1], len(each))
                found = [None] * len(each) if values is None else [*values]
                rows = [replace(one, importance=v) for one, v in zip(each, found, strict=True)]
                step = max(1, sum(len(one.rows) for one in rows) // _ROWS)
                size = sum(one.counts(one.rows) for one in rows)
                self._add(tensor, size, [one.picked(step) for one in rows])
            self._known.clear()

    def _by_column(self, sums: _Moments) -> torch.Tensor:
        return sums.inputs / (2 * self.tokens * max(1, sums.count))

    def _left(self, sums: _Moments) -> torch.Tensor | None:
        """Return what is left of `_by_column` where later columns make up for errors."""
        if sums.gram is None:
            return None
        return unexplained(sums.gram) / (2 * self.tokens * max(1, sums.count))

    def _add(self, tensor: str, size: float, some: Sequence[_Rows]) -> None:
        """Add a tensor's losses, by those of some of its rows; `size` is what all weights count."""
        whole = sum(one.counts(one.rows) for one in some)
        ratio, found = size / whole if whole else 0.0, self.losses.setdefault(tensor, {})
        for kind in self.types.of(tensor, some[0].rows.shape[1]):
            loss = ratio * sum(one.loss(kind, self.types) for one in some)
            found[kind] = float(f"{found.get(kind, 0.0) + loss:.{_DIGITS}g}")

    def _through_head(self) -> list[torch.Tensor]:
        """Return the gradients by the last layer's states, and add what the head loses."""
        layers, model = self.layers, self.layers.model
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        parameter = f"{_path(model, head)}.weight"
        sums = _Moments.of_none(*head.weight.shape)
        draw = torch.Generator().manual_seed(0)
        read = partial(layers.weights.rows, parameter)
        states: list[torch.Tensor] = []

        def logits(inputs: torch.Tensor) -> torch.Tensor:
            function: Any = _Streamed
            made: torch.Tensor = function.apply(inputs, read, sums)
            return made if head.bias is None else made + head.bias

        own, head.forward = head.forward, logits
        for layer in layers.layers:
            layer.forward = lambda *_, **__: states[0]
        gradients = []
        step = max(1, LOGIT_BYTES // (4 * len(head.weight)))
        for batch, last in zip(layers.batches, layers.states, strict=True):
            found = []
            parts = (torch.split(each, step, 1) for each in (batch.ids, last))
            for ids, some in zip(*parts, strict=True):
                states[:] = [some.clone().requires_grad_()]
                made = model(input_ids=ids, use_cache=False).logits
                shares = made.detach().softmax(-1)
                drawn = torch.multinomial(shares[0], 1, generator=draw)
                right = torch.zeros_like(made).scatter_(2, drawn[None], 1) - shares
                torch.autograd.backward([made], [right])
                found.append(_gradient(states[0]))
            gradients.append(torch.cat(found, 1))
        head.forward = own
        for layer in layers.layers:
            del layer.forward

        size, some, step = 0.0, list[_Rows](), max(1, len(head.weight) // _ROWS)
        columns = self._by_column(sums)
        for first, block in read():
            rows = _Rows(block.float(), sums.gradients[first : first + len(block), None], columns)
            size += rows.counts(rows.rows)
            if len(picked := rows.rows[-first % step :: step]):
                by_row = rows.by_row[-first % step :: step]
                some.append(_Rows(picked.contiguous(), by_row, columns))
        tied = layers.weights.tensor_of(parameter) == layers.weights.tensor_of(
            f"{_path(model, embedding)}.weight"
        )
        self._add(EMBEDDING if tied else HEAD, size, some)
        return gradients

    def _add_embedding(
        self, states: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
    ) -> None:
        """Add what the embedding loses where tokens are looked up."""
        layers, model = self.layers, self.layers.model
        path = _path(model, model.get_input_embeddings())
        matrix = layers.weights.mapped(layers.weights.tensor_of(f"{path}.weight"))
        ids = torch.cat([batch.ids.reshape(-1) for batch in layers.batches])
        unique, places, counts = torch.unique(ids, return_inverse=True, return_counts=True)
        rows = matrix[unique].float()
        entered = torch.cat([one.reshape(-1, rows.shape[1]) for one in states])
        # Some models scale what they look up.
        scale = entered.double().square().sum() / (rows.double().square().sum(1) * counts).sum()
        factors = torch.zeros(rows.shape, dtype=torch.float64)
        # A token that is looked up twice has the same error in both places.
        for batch, gradient in zip(layers.batches, gradients, strict=True):
            own = torch.zeros_like(factors)
            count = batch.ids.numel()
            own.index_add_(0, places[:count], gradient.reshape(count, -1).double())
            factors += own.square_()
            places = places[count:]
        each = (scale / (2 * self.tokens)).expand(rows.shape[1])
        some = _Rows(rows, factors, each)
        step = max(1, len(rows) // _ROWS)
        self._add(EMBEDDING, some.counts(rows), [some.picked(step)])


def _path(model: nn.Module, wanted: nn.Module) -> str:
    paths: Iterator[str] = (path for path, one in model.named_modules() if one is wanted)
    return next(paths)


def _gradient(states: torch.Tensor) -> torch.Tensor:
    if states.grad is None:
        raise ValueError("the model's output does not depend on its states")
    return states.grad


def _products(layer: nn.Module, block: str) -> Iterator[tuple[torch.Tensor, Mapping[str, int]]]:
    """Yield each matrix that a layer multiplies by, and the tensors of its rows, with heights."""
    for name, module in layer.named_modules():
        if is_experts(module):
            for gate_up, down in zip(module.gate_up_proj, module.down_proj, strict=True):
                half = len(gate_up) // 2
                yield gate_up, {f"{block}{part}.weight": half for part in GATED}
                yield down, {f"{block}{DOWN[0]}.weight": len(down)}
        elif type(module) is nn.Linear and (known := NAMES.get(name.rpartition(".")[2])):
            shared = "_shexp" if "shared_expert" in name else ""
            yield module.weight, {f"{block}{known}{shared}.weight": len(module.weight)}


class _Product(torch.autograd.Function):
    """A product with gradients, which adds what it sees to a matrix's sums."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, matrix: torch.Tensor, sums: _Moments | None
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, matrix)
        ctx.sums = sums
        return product(rows, matrix)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, matrix = ctx.saved_tensors
        if ctx.sums:
            ctx.sums.add(rows, gradient)
        by_rows, by_matrix, _ = ctx.needs_input_grad
        turned = gradient.T.contiguous() if by_matrix else gradient
        return (
            product(gradient, matrix.T.contiguous()) if by_rows else None,
            product(turned, rows.T.contiguous()) if by_matrix else None,
            None,
        )


class _Streamed(torch.autograd.Function):
    """A product with a matrix that is read a few rows at a time, forward and back."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        read: Callable[[], Iterable[tuple[int, torch.Tensor]]],
        sums: _Moments,
    ) -> torch.Tensor:
        rows = inputs.reshape(-1, inputs.shape[-1])
        ctx.save_for_backward(rows)
        ctx.read, ctx.sums = read, sums
        made = [product(rows, block.float()) for _, block in read()]
        return torch.cat(made, 1).reshape(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        flat = gradient.reshape(len(rows), -1)
        ctx.sums.add(rows, flat)
        found = torch.zeros_like(rows)
        for first, block in ctx.read():
            part = flat[:, first : first + len(block)].contiguous()
            found += product(part, block.float().T.contiguous())
        return found.reshape(*gradient.shape[:-1], -1), None, None
