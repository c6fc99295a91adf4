"""A model on a machine under the rules of an engine with a pool: what fits, per GPU.

Exact: the weights, and the cache by the engine's own block rules. Estimated: what else the engine
needs, so a margin is held back. Sizes in bytes.

A twentieth of the memory is reserved for the estimates: activations, the CUDA context and CUDA
graphs cannot be known before the server starts, and the build machine does not have the GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from weightsmith.core.errors import InputRefused
from weightsmith.models.facts import ModelFacts
from weightsmith.models.shape import CacheLayers, Kind, ModelShape
from weightsmith.serving.auto import Fitting
from weightsmith.serving.devices import Gpu
from weightsmith.serving.engine import ServeOptions
from weightsmith.serving.machine import Machine, dtype_bytes
from weightsmith.serving.memory import GIB, MIB

_MARGIN = 20
"""One part in twenty of what the engine may take stays free, because the rest is estimated."""

_CPU_PROGRAM = 3 * GIB // 2
"""Python, torch and the engine on a CPU: 1.30 to 1.40 GiB for models of 8 to 2,860 MiB."""

_NOT_MULTIPLIED = frozenset(
    {"su", "longrope", "llama3", "yarn", "deepseek_yarn", "default", "mrope", "proportional"}
)
"""Kinds of position scaling whose factor is in the stated length already."""

_UNKNOWN = 2048
"""Tokens that a request may be long, where no length is stated: vLLM's own fallback."""
_STRETCHED = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of prompt and answer together."""

    default: int
    most: int
    """What may be asked for; larger than the default where positions can be stretched."""


def lengths(model: ModelFacts, *, stretched: bool = False) -> Lengths:
    """Return the model's own length and the longest that the engine accepts.

    Of several stated lengths the smallest counts. `stretched` says that the user changes the
    positions, which lifts the limit. Raises InputRefused for a scaling factor that is no number.
    """
    positions, kind = model.positions, model.positions.scaling
    if not positions.lengths:
        return Lengths(default=_UNKNOWN, most=_STRETCHED)
    length = min(positions.lengths)
    if 0 < model.tokenizer_length < _STRETCHED:  # transformers writes 1e30 for no limit
        length = min(length, model.tokenizer_length)
    if kind in {"longrope", "su"}:
        default = positions.original if 0 < positions.original <= length else length
        return Lengths(default=default, most=_STRETCHED if stretched else length)
    # Gemma 3 states the scaled length.
    if kind not in _NOT_MULTIPLIED and not model.text_model_type.startswith("gemma3"):
        if not positions.factor:
            raise InputRefused(
                "config.json: the position scaling's factor is not a number above 0, up to 1000",
                hint="check the checkpoint's config.json",
            )
        length = int(length * positions.factor)
    return Lengths(default=length, most=_STRETCHED if stretched else length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Switches:
    """Engine options that change what the cache weighs."""

    block: int = 0
    """Tokens of a block; 0 for the engine's own."""
    prefix_caching: bool = True
    hybrid: bool = True
    chunked_prefill: bool = True
    overlapping: bool = True
    """The next batch is scheduled while one runs, so windows slide one batch later."""
    graphs: bool = True
    state_dtype: str = ""
    """Of recurrent states; "" for what model and engine choose."""
    adapter_bytes: int = 0
    """Further bytes per GPU, such as adapters that are loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What differs between engines; fractions are of one GPU's memory."""

    name: str
    block: int
    cpu_block: int
    keeps_windows_small: bool
    """Sliding and chunked layers keep their window only; else every layer keeps all tokens."""
    null_block: bool
    fraction: float
    """The engine's own default for how much of a GPU it takes."""
    fraction_of: Literal["all", "static", "free"]
    """`all` it takes; only weights and cache (`static`); or what is `free` beside the weights."""
    batched_tokens: Callable[[Machine], int]
    most_requests: Callable[[Machine], int]
    """What `auto` goes up to."""
    cache_dtypes: Mapping[str, float]
    """Name -> bytes of a number; `auto` is the model's type."""
    wiggle: float = 1.0
    """A further factor that the engine itself applies to its fraction."""
    runs_on_cpu: bool = False
    state_dtype: str = ""
    """Of recurrent states where the model does not say; "" for the weights' own."""
    capabilities: tuple[tuple[int, int], tuple[int, int]] = ((0, 1), (99, 0))
    """Of NVIDIA's GPUs that it has kernels for: from the first on, up to below the second."""
    splits_by_layers: bool = True
    """It knows pipeline parallelism."""
    data_parallel: str = ""
    """How its replicas share experts while each has its own requests, if it knows that."""
    small_target: str = ""
    """The engine's target with 4-bit weights, to point to where weights are too large."""

    def knows(self, card: Gpu) -> bool:
        """Return whether the engine has kernels for this GPU of NVIDIA's."""
        first, after = self.capabilities
        return first <= card.compute_capability < after


@dataclass(frozen=True, kw_only=True)
class PagedCapacity(Fitting):
    """A model on a machine under an engine's rules."""

    rules: Rules
    shape: ModelShape
    weights: int
    machine: Machine
    options: ServeOptions
    dtype: str
    switches: Switches
    packed: bool = False
    """Whether the checkpoint's own weights are quantized."""
    limit: Lengths
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def cache(self) -> PagedCache:
        """The pool of one GPU."""
        rules, machine, switches = self.rules, self.machine, self.switches
        return paged_cache(
            self.shape,
            block=switches.block or (rules.block if machine.gpus else rules.cpu_block),
            element=self.element,
            state_element=dtype_bytes(self.dtype),
            recurrent_element=dtype_bytes(self.state_dtype),
            tensor_parallel=machine.tensor_parallel,
            pipeline_parallel=machine.pipeline_parallel,
            prefix_caching=switches.prefix_caching,
            sparse=self.options.kv_cache_dtype == "fp8_ds_mla",
            hybrid=switches.hybrid and rules.keeps_windows_small,
        )

    @property
    def state_dtype(self) -> str:
        """The type of recurrent states: the option's, the model's, the engine's, or the weights'.

        CPUs with bfloat16 arithmetic keep them in float32 (vLLM, platforms/cpu.py).
        """
        chosen = self.switches.state_dtype or self.shape.state_dtype or self.rules.state_dtype
        return chosen or (self.dtype if self.machine.gpus else "float32")

    @property
    def element(self) -> float:
        """Bytes of a number in the cache."""
        wanted = self.options.kv_cache_dtype
        return self.rules.cache_dtypes[wanted] if wanted else dtype_bytes(self.dtype)

    @cached_property
    def weights_each(self) -> int:
        """Weights on the GPU that holds the most, embeddings of first and last stage included."""
        machine, layers = self.machine, self.shape.layers
        stages = machine.pipeline_parallel
        if stages == 1:
            return -(-self.weights // machine.tensor_parallel)
        ends = min(self.weights // 2, self.shape.vocab * self.shape.hidden * 2)
        inner = max(0, self.weights - 2 * ends)
        return -(-(inner * -(-layers // stages) // layers + ends) // machine.tensor_parallel)

    def batched(self, tokens: int, requests: int) -> int:
        """Return max_num_batched_tokens: the option, else the engine's, no more than can come."""
        usual = min(self.rules.batched_tokens(self.machine), requests * tokens)
        chosen = self.options.max_num_batched_tokens or max(requests, usual)
        return chosen if self.switches.chunked_prefill else max(chosen, tokens)

    def inflight(self, tokens: int, requests: int) -> int:
        """Return how many tokens may be scheduled before a window slides on."""
        stages = self.machine.pipeline_parallel
        overlapping = self.switches.overlapping and self.machine.gpus
        return self.batched(tokens, requests) * (stages + 1 if overlapping else stages)

    def blocks(self, tokens: int, requests: int) -> int:
        """Return the blocks of one request of that length."""
        return self.cache.blocks(tokens, self.inflight(tokens, requests))

    def overhead(self, tokens: int, requests: int) -> int:
        """Return the estimate of all that is neither weights nor cache, per GPU.

        Activations of one forward pass at max_num_batched_tokens (four of the hidden width, three
        of the feed-forward's), the sampler's logits in the model's type and in float32 twice, the
        CUDA context with its libraries, NCCL's buffers, and CUDA graphs.
        """
        shape, machine = self.shape, self.machine
        size, tensor = dtype_bytes(self.dtype), machine.tensor_parallel
        batch = self.batched(tokens, requests)
        activations = batch * size * (4 * shape.hidden + 3 * shape.intermediate // tensor)
        drafts = self.options.speculation
        logits = requests * (1 + (drafts.tokens if drafts else 0)) * shape.vocab * (size + 8)
        # vLLM packs the embedding and the head for its kernels and keeps both forms, of tied ones
        # too (0.32, layers/vocab_parallel_embedding.py, dispatch_cpu_unquantized_gemm).
        fixed = _CPU_PROGRAM + 2 * shape.vocab * shape.hidden * size
        if machine.gpus:
            fixed = GIB + (GIB // 2 if tensor > 1 else 0)
            if self.switches.graphs:
                fixed += min(1536 * MIB, 300 * MIB + 15 * MIB * shape.layers)
        return activations + logits + fixed + self.switches.adapter_bytes

    def budget(self, tokens: int, requests: int) -> tuple[int, int, float]:
        """Return (bytes for the cache, bytes held back, the engine's fraction), per GPU.

        Those for the cache are negative where not even the weights fit.
        """
        total, rules = self.machine.bytes_each, self.rules
        used = self.weights_each + self.overhead(tokens, requests)
        fraction = self.options.gpu_memory_utilization or rules.fraction
        if not self.machine.gpus:
            margin = total // _MARGIN
            return total - margin - used, margin, 0.0
        if rules.fraction_of == "free":
            free = total - used
            room = int(free * fraction)
            return room, free - room, fraction
        if rules.fraction_of == "static":
            margin = total // _MARGIN
            most = (total - margin - self.overhead(tokens, requests)) / total
            chosen = math.floor(min(fraction, most) * 1000) / 1000
            return int(total * chosen) - self.weights_each, margin, chosen
        asked = math.ceil(total * fraction * rules.wiggle)
        margin = asked // _MARGIN
        return asked - margin - used, margin, fraction

    @property
    def step(self) -> int:
        """A block, of at least 16 tokens."""
        return max(16, self.cache.block)

    def fits(self, tokens: int, requests: int) -> bool:
        """Say whether so many requests of that length are in the cache together."""
        room = self.budget(tokens, requests)[0]
        if not self.cache.groups:
            return room >= 0
        blocks = self.cache.number(room) - self.rules.null_block
        return 0 < self.blocks(tokens, requests) * requests <= blocks


_SPARSE_MLA_BYTES = 656
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
    """The block pool of one GPU; without groups, there is none."""

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
        return sum(group.count * self._of_group(group, tokens, inflight) for group in self.groups)

    def _of_group(self, group: KvCacheGroup, tokens: int, inflight: int) -> int:
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
        row = int((shape.kv_lora_rank + shape.rope_head_dim) * element)
        return _SPARSE_MLA_BYTES if sparse else row
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
    if not shape.cache:  # an encoder
        return PagedCache(block=block, bytes_per_block=0, groups=(), state_blocks=0)
    tokens = {
        part: token_bytes(shape, element, tensor_parallel, sparse=sparse, layer=part)
        for part in shape.cache
        if part.kind != "state"
    }
    state_blocks = 2 if prefix_caching else 1
    # A draft's layers beside the model's own: one group of pages of several sizes.
    several = len(shape.cache) > 1 and all(part.kind == "full" for part in shape.cache)
    if several or (not hybrid and len(set(tokens.values())) > 1):
        size = sum(-(-part.layers // pipeline_parallel) * one for part, one in tokens.items())
        whole = KvCacheGroup(kind="full", window=0, count=1, block=block)
        return PagedCache(
            block=block, bytes_per_block=block * size, groups=(whole,), state_blocks=state_blocks
        )
    layers: Sequence[CacheLayers] = shape.cache
    if not hybrid and (attention := sum(p.layers for p in shape.cache if p.kind != "state")):
        states = [part for part in shape.cache if part.kind == "state"]
        layers = [CacheLayers(kind="full", layers=attention), *states]
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
    # The smallest kind's number decides on the layers of a group, unless the largest is less than
    # half as large again: then padding the small one is cheaper.
    counts = [part.layers for part in layers]
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
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
