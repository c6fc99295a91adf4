"""Torch's arithmetic with the same bits on every x86-64 CPU that has AVX2 and FMA.

Our kernel for products adds up each element in the same order whatever the width of the CPU's
vectors, but torch's libraries for them choose an order by CPU and maker. So here our kernel does
all products, and oneDNN, which also does GELU, is turned off. What is left is torch's own loops,
each compiled for several kinds of CPU: they are asked for those of AVX2
(`AVX2_LOOPS` in core/cpus.py), and run on one thread, because the rest of a thread's share that
does not fill a vector is computed by other code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise, product
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_QUERIES = 128
"""That look at keys together; a multiple of the lanes of a vector."""
_PART = 512
"""DEPTH in products.h."""
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows [n, columns], matrix [m, columns]) -> float32 [n, m]"""


@contextmanager
def reproducible(multiply: Product) -> Iterator[None]:
    """Do all products of matrices by `multiply`, and the rest by torch's loops on one thread."""
    onednn: Any = torch.backends.mkldnn
    threads, enabled = torch.get_num_threads(), onednn.enabled
    torch.set_num_threads(1)
    onednn.enabled = False
    try:
        with _ByProduct(multiply):
            yield
    finally:
        onednn.enabled = enabled
        torch.set_num_threads(threads)


def follow(multiply: Product) -> None:
    """Let this thread compute as the block of `reproducible` does in which it was started."""
    torch.set_num_threads(1)
    mode: Any = _ByProduct(multiply)
    mode.__enter__()  # for as long as the thread lives


class _ByProduct(TorchFunctionMode):
    """Replaces the functions by which models multiply matrices."""

    def __init__(self, multiply: Product) -> None:
        super().__init__()
        self._multiply = multiply
        matmul = torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm
        self._ours: Mapping[Any, Callable[..., torch.Tensor]] = {
            **dict.fromkeys((torch.matmul, torch.bmm, *matmul), self._matmul),
            functional.linear: self._linear,
            functional.scaled_dot_product_attention: self._attention,
            torch._grouped_mm: self._of_groups,  # noqa: SLF001 - functional.grouped_mm calls it
        }

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return self._ours.get(func, func)(*args, **(kwargs or {}))

    def _linear(
        self, rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        flat = self._multiply(rows.reshape(-1, rows.shape[-1]), matrix)
        found = flat.reshape(*rows.shape[:-1], len(matrix))
        return found if bias is None else found + bias

    def _matmul(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Return left [..., n, columns] times right [..., columns, m], as `torch.matmul` does."""
        if left.dim() == 1:
            return self._matmul(left[None], right)[..., 0, :]
        if right.dim() == 1:
            return self._matmul(left, right[:, None])[..., 0]
        many = (left[..., 0, 0] + right[..., 0, 0]).shape
        lefts = left.expand(*many, *left.shape[-2:]).reshape(-1, *left.shape[-2:])
        rights = right.expand(*many, *right.shape[-2:]).reshape(-1, *right.shape[-2:])
        pairs = zip(lefts, rights.transpose(1, 2), strict=True)
        found = torch.stack([self._multiply(a, b) for a, b in pairs])
        return found.reshape(*many, left.shape[-2], right.shape[-1])

    def _of_groups(
        self, rows: torch.Tensor, matrices: torch.Tensor, *, offs: torch.Tensor, **_: torch.Tensor
    ) -> torch.Tensor:
        """Return rows [n, columns] times matrices [groups, columns, m], each its group's.

        `offs` [groups] are the ends of groups; rows behind the last are zero.
        """
        found = rows.new_zeros((len(rows), matrices.shape[2]))
        for matrix, (start, end) in zip(matrices, pairwise([0, *offs.tolist()]), strict=True):
            found[start:end] = self._multiply(rows[start:end], matrix.T)
        return found

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,  # noqa: ARG002 - of training
        *,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Return the attention [..., heads, n, head]; the formula is torch's own documentation's.

        https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
        """
        if is_causal:
            attn_mask = torch.ones((query.shape[-2], key.shape[-2]), dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape).masked_fill_(~attn_mask, float("-inf"))
        # Heads that share keys follow each other, also where each has its own.
        groups = key.shape[-3] if enable_gqa else query.shape[-3]
        shape = (*query.shape[:-3], groups, query.shape[-3] // groups, query.shape[-2])
        scaled = query * (query.shape[-1] ** -0.5 if scale is None else scale)
        scaled = scaled.reshape(*shape, -1)
        found = query.new_empty((*shape, value.shape[-1]))
        masks = None
        if attn_mask is not None:
            masks = attn_mask.expand(*query.shape[:-1], key.shape[-2]).reshape(*shape, -1)
        blocks = _blocks(query.shape[-2], key.shape[-2], is_causal=is_causal)
        # One head's keys at a time, whose scores stay in the CPU's cache.
        for place in product(*map(range, found.shape[:-3])):
            turned = value[place].T.contiguous()
            for start, end, seen in blocks:
                some = scaled[place][:, start:end]
                rows = some.reshape(-1, some.shape[-1])
                scores = self._multiply(rows, key[place][:seen]).view(*some.shape[:-1], seen)
                if masks is not None:
                    scores += masks[place][:, start:end, :seen]
                weights = scores.softmax(-1).reshape(-1, seen)
                made = self._multiply(weights, turned[:, :seen])
                found[place][:, start:end] = made.view(*some.shape[:-1], -1)
        return found.reshape(*query.shape[:-1], value.shape[-1])


def _blocks(queries: int, keys: int, *, is_causal: bool) -> list[tuple[int, int, int]]:
    """Return first and last query, and how many keys these see.

    What the others would add is zero. It changes no bit as long as the kernel adds up all keys in
    one part, and torch's softmax whole vectors.
    """
    if not is_causal or queries != keys or keys > _PART:
        return [(0, queries, keys)]
    ends = [min(start + _QUERIES, queries) for start in range(0, queries, _QUERIES)]
    return [(start, end, end) for start, end in zip(range(0, queries, _QUERIES), ends, strict=True)]
