"""The paged key-value cache of vLLM, to the byte: blocks, groups, and what a request takes.

Source: vLLM 0.33, v1/core/kv_cache_utils.py and v1/kv_cache_interface.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weightsmith.core.errors import InputRefused
from weightsmith.models.attention import CacheLayers, Kind
from weightsmith.models.shape import ModelShape

SPARSE_MLA_BYTES = 656
"""Bytes of a token in one layer with `fp8_ds_mla`, whatever the ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCacheGroup:
    """Layers that share block tables."""

    kind: Kind
    window: int
    count: int
    """Groups of this kind; each request holds blocks for each of them."""
    block: int
    """Tokens of a block: more where a token takes less, since all blocks are equally large."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedCache:
    """The block pool of one GPU."""

    block: int
    """Tokens of the shortest block."""
    bytes_per_block: int
    """One block of every layer of a group."""
    groups: tuple[KvCacheGroup, ...]
    state_blocks: int
    """Blocks of a request in a group of `state` layers: 2 with prefix caching, else 1."""

    def blocks(self, tokens: int, inflight: int) -> int:
        """Return the blocks of a request of that length.

        `inflight` is how many tokens may be scheduled before windows slide on:
        max_num_batched_tokens, times the batches that are under way at once.
        """
        return sum(group.count * self._of_kind(group, tokens, inflight) for group in self.groups)

    def _of_kind(self, group: KvCacheGroup, tokens: int, inflight: int) -> int:
        if group.kind == "full":
            return -(-tokens // group.block)
        if group.kind == "sliding":
            return -(-min(group.window - 1 + inflight, tokens) // group.block) + 1
        if group.kind == "chunked":
            return -(-min(group.window + inflight, tokens) // group.block)
        return self.state_blocks

    @property
    def growth(self) -> int:
        """Bytes that a further token takes, on average over a block.

        In the layers that keep every token; where there are none, in those with a window.
        """
        full = [group for group in self.groups if group.kind == "full"]
        growing = full or [group for group in self.groups if group.kind != "state"]
        return sum(group.count * self.bytes_per_block // group.block for group in growing)

    def number(self, available: int) -> int:
        """Return the blocks that fit into so many bytes."""
        return max(0, available) // self.bytes_per_block

    def usable(self, available: int) -> int:
        """Return the blocks that requests can have: the first one is the null block."""
        return max(0, self.number(available) - 1)

    def concurrency(self, available: int, tokens: int, inflight: int) -> float:
        """Return vLLM's own figure, "Maximum concurrency for N tokens per request"."""
        return self.number(available) / self.blocks(tokens, inflight)


def token_bytes(
    shape: ModelShape,
    element: float,
    tensor_parallel: int,
    *,
    sparse: bool,
    layer: CacheLayers | None = None,
) -> int:
    """Return the bytes of one token in one attention layer on one GPU.

    `element` is the bytes of a number; `layer` says which layers, where these differ. Multi-head
    latent attention keeps one row for all heads, which is not divided among GPUs; else every GPU
    has at least one key-value head.
    """
    if shape.latent_cache:
        if sparse:
            return SPARSE_MLA_BYTES
        return int((shape.kv_lora_rank + shape.rope_head_dim) * element)
    total, width = (layer.kv_heads, layer.head_dim) if layer else (0, 0)
    heads = max(1, (total or shape.kv_heads) // tensor_parallel)
    # Where latent attention is expanded (MiniCPM 3), values are padded to the width of keys.
    values = width or (shape.head_dim if shape.kv_lora_rank else shape.v_head_dim)
    return int(heads * ((width or shape.head_dim) + values) * element)


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
    tokens = {
        part: token_bytes(shape, element, tensor_parallel, sparse=sparse, layer=part)
        for part in shape.cache
        if part.kind != "state"
    }
    state_blocks = 2 if prefix_caching else 1
    if not hybrid and len(set(tokens.values())) > 1:
        size = sum(-(-part.layers // pipeline_parallel) * one for part, one in tokens.items())
        whole = KvCacheGroup(kind="full", window=0, count=1, block=block)
        return PagedCache(
            block=block, bytes_per_block=block * size, groups=(whole,), state_blocks=state_blocks
        )
    layers = shape.cache if hybrid else _all_full(shape.cache)
    token, page = max(tokens.values(), default=0), 0
    if states := [part for part in layers if part.kind == "state"]:
        if not (states[0].recurrent or states[0].convolved):
            raise InputRefused(
                f"config.json does not say how large a state {shape.architecture}'s layers keep",
                hint="its memory would be a guess; choose a decoder with attention",
            )
        size = states[0].convolved * state_element
        size += states[0].recurrent * (recurrent_element or state_element)
        page = -(-size // tensor_parallel)
        if token and page > block * token:
            # Attention blocks grow until they hold a state (platforms/interface.py).
            step = max(block, 128) if shape.latent_cache else block
            block = -(-page // (token * step)) * step
    page = block * token or page
    size = _group_size(layers)
    return PagedCache(
        block=block,
        bytes_per_block=-(-size // pipeline_parallel) * page,
        groups=tuple(
            KvCacheGroup(
                kind=part.kind,
                window=part.window,
                count=-(-part.layers // size),
                # Pages are equally large: where a token is smaller, more of them are in a block,
                # or the page is padded (unify_kv_cache_spec_page_size).
                block=block * (token // one if token % one == 0 else 1),
            )
            for part in layers
            for one in [tokens.get(part, token) or 1]
        ),
        state_blocks=state_blocks,
    )


def _group_size(layers: Sequence[CacheLayers]) -> int:
    """Return the layers of a group: the smallest kind's number decides.

    Unless the largest is less than half as large again: then padding the small one is cheaper.
    """
    counts = [part.layers for part in layers]
    return max(counts) if max(counts) < 1.5 * min(counts) else min(counts)


def _all_full(layers: Sequence[CacheLayers]) -> tuple[CacheLayers, ...]:
    attention = sum(part.layers for part in layers if part.kind != "state")
    states = tuple(part for part in layers if part.kind == "state")
    return (CacheLayers(kind="full", layers=attention), *states) if attention else states
