"""A model on a machine as llama-server has it: what it weighs there, and what of it fits. Bytes.

The cache is exact; everything else except the weights is an estimate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from weightsmith.core.errors import UsageError
from weightsmith.core.values import JsonValue
from weightsmith.models.facts import ModelFacts, Vision
from weightsmith.models.shape import ModelShape
from weightsmith.serving.devices import CPU
from weightsmith.serving.engine import ServeOptions
from weightsmith.serving.gpus import named_gpu
from weightsmith.serving.llamacpp_cache import (
    KV_PADDING,
    growth_bytes,
    kv_cache_bytes,
    kv_layer_bytes,
    padded,
)
from weightsmith.serving.memory import MIB, host_memory, human

UBATCH = 512
"""Its default of tokens computed together."""
_MARGIN = 20
"""One part in twenty of the memory stays free: for the system, and for what is estimated."""
_PROGRAM = 32 * MIB
"""The process and its requests on a CPU (17 to 24 MiB measured)."""
_WORD = 448
"""Each token of the vocabulary, with its merges (320 to 410 bytes measured)."""
_CUDA = 640 * MIB
"""A CUDA context, cuBLAS workspace and the kernels' pool, per GPU (an estimate)."""

_ADAPTED = 6 * 24 * 1024
"""A matrix of an adapter on a CPU: llama.cpp reserves six nodes of its graph for it, used or not
(`get_n_nodes` in src/llama-adapter.h). A node takes 22 KiB, mostly for 60 tensors that it may need
where the graph is split between devices (`ggml_backend_sched_new`), and 1 more for a moment when a
request names another adapter. A container's limit does not see what is never written to, but
`RLIMIT_DATA` does, and a host that does not overcommit."""

_CLIP = 176 * MIB
"""The encoder's graph (168 MiB measured; little of it is touched)."""
_WARM_UP, _MOST_PATCHES = 4 * 46**2, 4 * 4096
"""Patches of a picture of any size: what is reserved at the start, and the most (clip.cpp)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledMachine:
    """Memory of all devices together; `gpus` is 0 for a CPU."""

    device: str
    gpus: int
    total: int
    held_back: int

    @property
    def usable(self) -> int:
        """What a plan may take."""
        return self.total - self.held_back


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCppCapacity:
    """A model on a machine, with the options that change what it weighs."""

    shape: ModelShape
    weights: int
    machine: PooledMachine
    type_k: str
    type_v: str
    ubatch: int
    flash: bool
    host_cache: int
    projector: int = 0
    """The weights that are a projector for pictures: no layers, and on the first GPU."""
    tower: Vision = field(default_factory=Vision)
    adapted: int = 0
    """Matrices of all adapters that are served beside the model; their weights are in `weights`."""

    @property
    def growth(self) -> int:
        """One token in all layers of the cache that keep every token."""
        return growth_bytes(self.shape, (self.type_k, self.type_v))

    @property
    def layer_weights(self) -> int:
        """One layer's weights, if all have as many."""
        return (self.weights - self.projector) // self.shape.layers

    def kv(self, tokens: int, slots: int) -> int:
        """Return the cache of so many slots of that length."""
        types = self.type_k, self.type_v
        return kv_cache_bytes(self.shape, tokens, slots, types, self.ubatch)

    def overhead(self, tokens: int, slots: int) -> int:
        """Return what is neither weights nor cache.

        The compute buffer is an estimate, compared with what llama-server 0c1e57098 reported on a
        CPU for eleven settings of three models, and never below it there: per token of a
        micro-batch the float32 activations of one layer (two of the feed-forward's width, eight of
        the hidden width) and a float16 attention mask over one slot; per slot its logits, twice.
        """
        shape = self.shape
        per_token = 4 * (2 * shape.intermediate + 8 * shape.hidden) + 2 * padded(tokens)
        if self.adapted:  # what one adds to the output of a matrix
            per_token += 4 * max(shape.intermediate, shape.hidden, shape.heads * shape.head_dim)
        if not self.flash:
            per_token += 4 * shape.heads * padded(tokens)
        compute = self.ubatch * per_token + 8 * slots * shape.vocab
        gpus = self.machine.gpus
        if not gpus:
            return self.program + compute + self.graph + self.picture(tokens) + self.host_cache
        # Layers are whole: with several GPUs one may hold a layer more than its share.
        picture = self.picture(tokens)
        uneven = (gpus - 1) * (self.layer_weights + self.projector + picture)
        return gpus * (_CUDA + compute) + self._dequantized(tokens, slots) + picture + uneven

    @property
    def program(self) -> int:
        """What the process takes in the host's memory beside all that depends on requests.

        An estimate, compared with what llama-server 0c1e57098 held on a CPU for vocabularies of
        50,257 to 262,144 tokens, and never below it there.
        """
        return _PROGRAM + _WORD * self.shape.vocab

    @property
    def graph(self) -> int:
        """What adapters take in the host's memory beside their weights: nodes of the graph.

        An estimate, compared with what llama-server 0c1e57098 allocated on a CPU for 1 to 300
        adapters of a small model, and never below it there.
        """
        return self.adapted * _ADAPTED

    def picture(self, tokens: int) -> int:
        """Return what encoding a picture takes beside the projector; 0 without one.

        An estimate, compared with what llama-server 0c1e57098 reported on a CPU for the towers of
        Gemma 3, Qwen2.5-VL and Qwen3-VL, and never below it there: per patch the float32
        activations of one layer, and where layers see windows, a mask in float32 and in float16.
        A picture of any size has four patches per token, at most as many as a request is long.
        """
        tower = self.tower
        if not self.projector:
            return 0
        if not tower.hidden:
            return _CLIP + self.projector
        patches = tower.patches or max(_WARM_UP, min(4 * tokens, _MOST_PATCHES))
        mask = 6 * patches**2 if tower.windowed else 0
        return _CLIP + 4 * patches * (2 * tower.intermediate + 4 * tower.hidden) + mask

    def _dequantized(self, tokens: int, slots: int) -> int:
        # CUDA's flash attention widens one layer of a packed cache to float16 at a time.
        if (self.type_k, self.type_v) == ("f16", "f16"):
            return 0
        return padded(tokens) * slots * kv_layer_bytes(self.shape, "f16", "f16")

    def needs(self, tokens: int, slots: int) -> int:
        """Return weights, cache and all else."""
        return self.weights + self.kv(tokens, slots) + self.overhead(tokens, slots)

    def fits(self, tokens: int, slots: int) -> bool:
        """Say whether so many requests of that length run together."""
        return self.needs(tokens, slots) <= self.machine.usable

    def longest(self, slots: int, most: int) -> int:
        """Return the largest length up to `most` that fits, a multiple of 256 below it; 0: none."""
        if self.fits(most, slots):
            return most
        low, high = 0, -(-most // KV_PADDING)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(middle * KV_PADDING, slots) else (low, middle)
        return low * KV_PADDING

    def most_requests(self, tokens: int, limit: int) -> int:
        """Return how many requests of that length fit, up to `limit`; 0: none."""
        low, high = 0, limit + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(tokens, middle) else (low, middle)
        return low


def make_capacity(
    model: ModelFacts, weights: int, options: ServeOptions, extra: Mapping[str, JsonValue]
) -> LlamaCppCapacity:
    """Return the capacity with llama-server's options read; UsageError for one that cannot be."""
    shape, projector = model.shape, options.projector_bytes
    flash = str(extra.get("flash-attn", "on")).lower() not in {"off", "false", "0", "disabled"}
    type_v = str(extra.get("cache-type-v", "f16"))
    if not flash and type_v not in {"f16", "bf16", "f32"}:
        raise UsageError(
            f"cache type {type_v} for V needs flash attention", hint="leave flash-attn out"
        )
    if str(extra.get("swa-full", "off")).lower() not in {"off", "false", "0", "disabled"}:
        shape = replace(shape, sliding_window=0)
    host_cache = _whole(extra, "cache-ram", 0, least=0)
    return LlamaCppCapacity(
        shape=shape,
        weights=weights,
        machine=_machine(options),
        type_k=str(extra.get("cache-type-k", "f16")),
        type_v=type_v,
        ubatch=_whole(extra, "ubatch-size", UBATCH, least=1),
        flash=flash,
        host_cache=host_cache * MIB,
        projector=projector,
        tower=model.matrices.vision if projector else Vision(),
        adapted=sum(adapter.matrices for adapter in options.adapters),
    )


def _machine(options: ServeOptions) -> PooledMachine:
    named = named_gpu(options.gpu)
    if named and named.compute_capability == (0, 0):
        raise UsageError(
            f"{named.name}: the llama.cpp image here is built for NVIDIA GPUs",
            hint="leave the GPU out to plan for the CPU, or choose an NVIDIA GPU",
        )
    if named or options.gpu_memory_bytes:
        each = options.gpu_memory_bytes or (named.usable_bytes if named else 0)
        total = each * options.gpu_count
        device = named.name if named else "gpu"
        held = total // _MARGIN
        if options.gpu_memory_utilization:
            held = total - int(total * options.gpu_memory_utilization)
        return PooledMachine(device=device, gpus=options.gpu_count, total=total, held_back=held)
    total = options.host_memory_bytes or host_memory()
    return PooledMachine(device=options.gpu or CPU, gpus=0, total=total, held_back=total // _MARGIN)


def _whole(extra: Mapping[str, JsonValue], option: str, default: int, *, least: int) -> int:
    value = extra.get(option, default)
    try:
        number = int(str(value))
    except ValueError:
        number = least - 1
    if number < least:
        raise UsageError(
            f"serve.extra.{option} is {value!r}", hint=f"give a whole number from {least} on"
        )
    return number


def ways(capacity: LlamaCppCapacity, tokens: int, slots: int) -> list[dict[str, JsonValue]]:
    """Return the nearest options that fit: `text` for people, the rest as `serve` keys."""
    both: dict[str, JsonValue] = {"max_model_len": tokens, "max_num_seqs": slots}
    found: list[dict[str, JsonValue]] = []
    if shorter := capacity.longest(slots, tokens):
        text = f"max_model_len {shorter} with {slots} at once"
        found.append({"text": text, **both, "max_model_len": shorter})
    if fewer := capacity.most_requests(tokens, slots):
        text = f"max_num_seqs {fewer} at {tokens}"
        found.append({"text": text, **both, "max_num_seqs": fewer})
    packed = _packed(capacity)
    longer = packed.longest(slots, tokens) if packed else 0
    if longer > shorter:
        text = "the same" if longer == tokens else f"max_model_len {longer}"
        text += " with serve.extra.cache-type-k=q8_0 and cache-type-v=q8_0"
        found.append({"text": text, **both, "max_model_len": longer, "kv_cache_dtype": "q8_0"})
    needed = capacity.needs(tokens, slots) * _MARGIN // (_MARGIN - 1) + MIB
    gpus = max(1, capacity.machine.gpus)
    memory = f"{human(-(-needed // gpus))} of {'GPU ' if capacity.machine.gpus else ''}memory"
    key = "gpu_memory" if capacity.machine.gpus else "memory"
    found.append({"text": memory + (" each" if gpus > 1 else ""), key: -(-needed // gpus)})
    return found


def _packed(capacity: LlamaCppCapacity) -> LlamaCppCapacity | None:
    packed = replace(capacity, type_k="q8_0", type_v="q8_0")
    try:
        smaller = packed.kv(KV_PADDING, 1) < capacity.kv(KV_PADDING, 1)
    except UsageError:
        return None
    return packed if smaller and capacity.flash else None
