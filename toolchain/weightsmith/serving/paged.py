"""The paged key-value cache of vLLM, to the byte: blocks, groups, and what a request takes.

Source: vLLM 0.33, v1/core/kv_cache_utils.py and v1/kv_cache_interface.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weightsmith.checkpoints.attention import CacheLayers, Kind
from weightsmith.checkpoints.shape import ModelShape
from weightsmith.errors import InputRefused

SPARSE_MLA_BYTES = 656
"""Bytes of a token in one layer with `fp8_ds_mla`, whatever the ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Layers that share block tables."""

    kind: Kind
    window: int
    count: int
    """Groups of this kind; each request holds blocks for each of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedCache:
    """The block pool of one GPU."""

    block: int
    """Tokens of a block."""
    bytes_per_block: int
    """One block of every layer of a group."""
    groups: tuple[Group, ...]
    state_blocks: int
    """Blocks of a request in a group of `state` layers: 2 with prefix caching, else 1."""

    def blocks(self, tokens: int, inflight: int) -> int:
        """Return the blocks of a request of that length.

        `inflight` is how many tokens may be scheduled before windows slide on:
        max_num_batched_tokens, times the batches that are under way at once.
        """
        return sum(group.count * self._of_kind(group, tokens, inflight) for group in self.groups)

    def _of_kind(self, group: Group, tokens: int, inflight: int) -> int:
        if group.kind == "full":
            return -(-tokens // self.block)
        if group.kind == "sliding":
            return -(-min(group.window - 1 + inflight, tokens) // self.block) + 1
        if group.kind == "chunked":
            return -(-min(group.window + inflight, tokens) // self.block)
        return self.state_blocks

    def number(self, available: int) -> int:
        """Return the blocks that fit into so many bytes."""
        return max(0, available) // self.bytes_per_block

    def usable(self, available: int) -> int:
        """Return the blocks that requests can have: the first one is the null block."""
        return max(0, self.number(available) - 1)

    def concurrency(self, available: int, tokens: int, inflight: int) -> float:
        """Return vLLM's own figure, "Maximum concurrency for N tokens per request"."""
        return self.number(available) / self.blocks(tokens, inflight)


def token_bytes(shape: ModelShape, element: float, tensor_parallel: int, *, sparse: bool) -> int:
    """Return the bytes of one token in one attention layer on one GPU.

    `element` is the bytes of a number. Multi-head latent attention keeps one row for all heads,
    which is not divided among GPUs; else every GPU has at least one key-value head.
    """
    if shape.kv_lora_rank:
        if sparse:
            return SPARSE_MLA_BYTES
        return int((shape.kv_lora_rank + shape.rope_head_dim) * element)
    heads = max(1, shape.kv_heads // tensor_parallel)
    return int(heads * (shape.head_dim + shape.v_head_dim) * element)


def paged_cache(
    shape: ModelShape,
    *,
    block: int,
    element: float,
    state_element: int,
    recurrent_element: int = 0,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    prefix_caching: bool = True,
    sparse: bool = False,
    hybrid: bool = True,
) -> PagedCache:
    """Return the pool of the GPU that holds the most layers.

    `element`, `state_element` and `recurrent_element` are bytes of a number in the cache, in a
    layer's convolution state and in its recurrent state (0: as the convolution's).
    Raises InputRefused where a state's size is not known.
    Without `hybrid` (--disable-hybrid-kv-cache-manager) every attention layer keeps all tokens.
    """
    token = token_bytes(shape, element, tensor_parallel, sparse=sparse)
    layers = shape.cache if hybrid else _all_full(shape.cache)
    states = [part for part in layers if part.kind == "state"]
    page = block * token
    if states:
        if not states[0].recurrent:
            raise InputRefused(
                f"config.json does not say how large a state {shape.architecture}'s layers keep",
                hint="its memory would be a guess; choose a decoder with attention",
            )
        size = states[0].convolved * state_element
        size += states[0].recurrent * (recurrent_element or state_element)
        state = -(-size // tensor_parallel)
        if len(states) == len(layers):
            page = state
        elif state > page:
            # Attention blocks grow until they hold a state (platforms/interface.py).
            step = max(block, 128) if shape.kv_lora_rank else block
            block = -(-state // (token * step)) * step
            page = block * token
    size, groups = _grouped(layers)
    return PagedCache(
        block=block,
        bytes_per_block=-(-size // pipeline_parallel) * page,
        groups=groups,
        state_blocks=2 if prefix_caching else 1,
    )


def _grouped(layers: Sequence[CacheLayers]) -> tuple[int, tuple[Group, ...]]:
    """Return the layers of a group, and the groups: the smallest kind's number decides.

    Unless the largest is less than half as large again: then padding the small one is cheaper.
    """
    counts = [part.layers for part in layers]
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    return size, tuple(
        Group(kind=part.kind, window=part.window, count=-(-part.layers // size)) for part in layers
    )


def _all_full(layers: Sequence[CacheLayers]) -> tuple[CacheLayers, ...]:
    attention = sum(part.layers for part in layers if part.kind != "state")
    states = tuple(part for part in layers if part.kind == "state")
    return (CacheLayers(kind="full", layers=attention), *states) if attention else states
