"""Plans llama-server's memory: how long a request may be, how many at once, on which device.

The guarantee is strict: every slot owns its share of the cache, so `max_num_seqs` requests of
`max_model_len` tokens run together and none is cut off (`-np N -c pad256(L)*N --no-kv-unified`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from toolchain.errors import UsageError
from toolchain.serving.architectures import check_architecture
from toolchain.serving.engine import ServingPlan, Wishes
from toolchain.serving.gpus import gpu
from toolchain.serving.llamacpp_options import extra_options
from toolchain.serving.memory import (
    KV_PADDING,
    MIB,
    host_memory,
    human,
    kv_cache_bytes,
    kv_layer_bytes,
    padded,
    require_attention,
    sliding_layers,
)
from toolchain.serving.model import ModelShape
from toolchain.values import Json

_AUTO_SLOTS = 4
_UNKNOWN_LENGTH = 4096
_SPLIT_LENGTH = 4096
_BATCH, _UBATCH = 2048, 512
_MARGIN = 20
"""One part in twenty of the memory stays free: for the system, and for what is estimated."""
_PROGRAM = 128 * MIB
"""The process, its vocabulary and requests on a CPU (35 MiB measured on a small model)."""
_CUDA = 640 * MIB
"""A CUDA context, cuBLAS workspace and the kernels' pool, per GPU (an estimate)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Machine:
    device: str
    gpus: int
    total: int
    held_back: int

    @property
    def usable(self) -> int:
        return self.total - self.held_back


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A model on a machine, with the options that change what it weighs."""

    shape: ModelShape
    weights: int
    machine: _Machine
    type_k: str
    type_v: str
    ubatch: int
    flash: bool
    host_cache: int

    @property
    def layer_bytes(self) -> int:
        return kv_layer_bytes(self.shape, self.type_k, self.type_v)

    def kv(self, tokens: int, slots: int) -> int:
        return kv_cache_bytes(self.shape, tokens, slots, self.layer_bytes, self.ubatch)

    def overhead(self, tokens: int, slots: int) -> int:
        """Return what is neither weights nor cache.

        The compute buffer is an estimate, compared with what llama-server 0c1e57098 reported on a
        CPU for eleven settings of three models, and never below it there: per token of a
        micro-batch the float32 activations of one layer (two of the feed-forward's width, eight of
        the hidden width) and a float16 attention mask over one slot; per slot its logits, twice.
        """
        shape = self.shape
        per_token = 4 * (2 * shape.intermediate + 8 * shape.hidden) + 2 * padded(tokens)
        if not self.flash:
            per_token += 4 * shape.heads * padded(tokens)
        compute = self.ubatch * per_token + 8 * slots * shape.vocab
        gpus = self.machine.gpus
        if not gpus:
            return _PROGRAM + compute + self.host_cache
        # Layers are whole: with several GPUs one may hold a layer more than its share.
        uneven = (gpus - 1) * (self.weights // shape.layers)
        return gpus * (_CUDA + compute) + self._dequantized(tokens, slots) + uneven

    def _dequantized(self, tokens: int, slots: int) -> int:
        # CUDA's flash attention widens one layer of a packed cache to float16 at a time.
        if (self.type_k, self.type_v) == ("f16", "f16"):
            return 0
        return padded(tokens) * slots * kv_layer_bytes(self.shape, "f16", "f16")

    def needs(self, tokens: int, slots: int) -> int:
        return self.weights + self.kv(tokens, slots) + self.overhead(tokens, slots)

    def fits(self, tokens: int, slots: int) -> bool:
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

    def most_slots(self, tokens: int, most: int) -> int:
        return next((n for n in range(most, 0, -1) if self.fits(tokens, n)), 0)


def plan(config: Mapping[str, Json], weight_bytes: int, wishes: Wishes) -> ServingPlan:
    """Return the plan for a model of `weight_bytes` on the wished machine.

    `auto` takes the longest request that fits, up to the model's own length, then up to four at
    once. Raises InputRefused for a lying config.json, and UsageError for a wish that cannot be,
    with the nearest that can.
    """
    shape = ModelShape.from_config(config)
    require_attention(shape)
    extra = _with_wishes(extra_options(wishes.extra), wishes)
    case = _case(shape, weight_bytes, wishes, extra)
    notes = _shape_notes(shape)
    if said := check_architecture(shape, config):
        notes.append(said)
    limit = _length_limit(shape, wishes, extra)
    tokens, slots = _choose(case, wishes, limit)
    if case.fits(tokens, slots):
        layers = case.shape.layers + 1 if case.machine.gpus else 0
    elif case.machine.gpus:
        layers = _split(case, tokens, slots, wishes)
        notes.append(
            f"{layers} of {shape.layers} layers fit on {case.machine.device}; the rest run on the"
            f" host's CPU, many times slower. All would fit with: {_nearest(case, tokens, slots)}"
        )
    else:
        raise _too_much(case, tokens, slots)
    return _result(case, tokens, slots, layers, extra, notes)


_CACHE_TYPES = {"fp8": "q8_0", "fp8_e4m3": "q8_0", "float16": "f16", "bfloat16": "bf16"}
"""Other engines' names -> the nearest of llama.cpp's own."""


def _with_wishes(extra: dict[str, Json], wishes: Wishes) -> dict[str, Json]:
    """Return the options that the wishes of every engine stand for; `extra` wins.

    Raises UsageError for a wish that llama.cpp has nothing for.
    """
    if wishes.dtype not in {"", "auto"}:
        raise UsageError(
            f"dtype {wishes.dtype}: a GGUF file has its types already", hint="choose another target"
        )
    if wishes.tensor_parallel_size > 1:
        raise UsageError(
            "tensor_parallel_size: llama.cpp gives whole layers to each GPU",
            hint="set serve.gpu_count alone",
        )
    if wishes.pipeline_parallel_size not in {0, wishes.gpu_count}:
        raise UsageError(
            f"pipeline_parallel_size {wishes.pipeline_parallel_size} is not gpu_count"
            f" {wishes.gpu_count}",
            hint="leave it out: llama.cpp spreads the layers over all GPUs",
        )
    found: dict[str, Json] = {}
    if wishes.kv_cache_dtype not in {"", "auto"}:
        kind = _CACHE_TYPES.get(wishes.kv_cache_dtype, wishes.kv_cache_dtype)
        found |= {"cache-type-k": kind, "cache-type-v": kind}
    if batch := wishes.max_num_batched_tokens:
        found |= {"batch-size": batch, "ubatch-size": min(_UBATCH, batch)}
    return {**found, **extra}


def _case(shape: ModelShape, weights: int, wishes: Wishes, extra: Mapping[str, Json]) -> _Case:
    flash = str(extra.get("flash-attn", "on")).lower() not in {"off", "false", "0", "disabled"}
    type_v = str(extra.get("cache-type-v", "f16"))
    if not flash and type_v not in {"f16", "bf16", "f32"}:
        raise UsageError(
            f"cache type {type_v} for V needs flash attention", hint="leave flash-attn out"
        )
    if str(extra.get("swa-full", "off")).lower() not in {"off", "false", "0", "disabled"}:
        shape = replace(shape, sliding_window=0)
    host_cache = _whole(extra, "cache-ram", 0, least=0)
    return _Case(
        shape=shape,
        weights=weights,
        machine=_machine(wishes),
        type_k=str(extra.get("cache-type-k", "f16")),
        type_v=type_v,
        ubatch=_whole(extra, "ubatch-size", _UBATCH, least=1),
        flash=flash,
        host_cache=host_cache * MIB,
    )


def _machine(wishes: Wishes) -> _Machine:
    named = gpu(wishes.gpu) if wishes.gpu not in {"", "cpu"} else None
    if named and named.compute_capability == (0, 0):
        raise UsageError(
            f"{named.name}: the llama.cpp image here is built for NVIDIA GPUs",
            hint="leave the GPU out to plan for the CPU, or choose an NVIDIA GPU",
        )
    if named or wishes.gpu_memory_bytes:
        each = wishes.gpu_memory_bytes or (named.usable_bytes if named else 0)
        total = each * wishes.gpu_count
        device = named.name if named else "gpu"
        held = total // _MARGIN
        if wishes.gpu_memory_utilization:
            held = total - int(total * wishes.gpu_memory_utilization)
        return _Machine(device=device, gpus=wishes.gpu_count, total=total, held_back=held)
    total = wishes.host_memory_bytes or host_memory()
    return _Machine(device="cpu", gpus=0, total=total, held_back=total // _MARGIN)


def _whole(extra: Mapping[str, Json], option: str, default: int, *, least: int) -> int:
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


def _length_limit(shape: ModelShape, wishes: Wishes, extra: Mapping[str, Json]) -> int:
    """Return the longest request the model allows; stretched positions lift the limit."""
    limit = shape.max_positions or _UNKNOWN_LENGTH
    wish = wishes.max_model_len
    if wish is None:
        return limit
    stretched = any(option.startswith(("rope-", "yarn-")) for option in extra)
    if shape.max_positions and wish > shape.max_positions and not stretched:
        raise UsageError(
            f"max_model_len {wish} is longer than the model's {shape.max_positions} positions",
            hint=f"nearest: max_model_len {shape.max_positions}; or stretch the positions with"
            " serve.extra.rope-scale or serve.extra.yarn-orig-ctx",
        )
    return max(limit, wish)


def _choose(case: _Case, wishes: Wishes, limit: int) -> tuple[int, int]:
    """Return (tokens, slots): the wishes, and for `auto` the most that fits."""
    tokens = wishes.max_model_len
    if tokens is None:
        tokens = case.longest(wishes.max_num_seqs or 1, limit)
        # A GPU that cannot hold everything is used for as many layers as it can.
        useful = min(_SPLIT_LENGTH, limit)
        if case.machine.gpus and tokens < useful:
            tokens = useful
        tokens = tokens or min(KV_PADDING, limit)
    slots = wishes.max_num_seqs or case.most_slots(tokens, _AUTO_SLOTS) or 1
    return tokens, slots


def _split(case: _Case, tokens: int, slots: int, wishes: Wishes) -> int:
    """Return how many layers fit on the GPU, counting a layer's weights and cache as equal."""
    layers = case.shape.layers
    kv = case.kv(tokens, slots)
    each = -(-case.weights // layers) + -(-kv // layers)
    room = case.machine.usable - case.overhead(tokens, slots)
    fitting = min(layers, room // each)
    if fitting < 1:
        raise _too_much(case, tokens, slots)
    rest = (layers - fitting) * each + _PROGRAM
    if wishes.host_memory_bytes and rest > wishes.host_memory_bytes:
        raise UsageError(
            f"{layers - fitting} layers do not fit on {case.machine.device} and need"
            f" {human(rest)} of host memory; there are {human(wishes.host_memory_bytes)}",
            hint=f"nearest that fits: {_nearest(case, tokens, slots)}",
        )
    return fitting


def _too_much(case: _Case, tokens: int, slots: int) -> UsageError:
    machine = case.machine
    return UsageError(
        f"max_model_len {tokens} x max_num_seqs {slots} needs {human(case.needs(tokens, slots))},"
        f" {human(machine.usable)} are usable on {machine.device}: weights {human(case.weights)},"
        f" cache {human(case.kv(tokens, slots))}, overhead {human(case.overhead(tokens, slots))}",
        hint=f"nearest that fits: {_nearest(case, tokens, slots)}",
        details={"plan": _result(case, tokens, slots, 0, {}, [])},
    )


def _nearest(case: _Case, tokens: int, slots: int) -> str:
    """Return the wishes closest to these that fit, for people."""
    return "; or ".join(str(way["text"]) for way in _ways(case, tokens, slots))


def _ways(case: _Case, tokens: int, slots: int) -> list[dict[str, Json]]:
    """Return the wishes closest to these that fit: `text` for people, the rest as `serve` keys."""
    both: dict[str, Json] = {"max_model_len": tokens, "max_num_seqs": slots}
    ways: list[dict[str, Json]] = []
    if shorter := case.longest(slots, tokens):
        text = f"max_model_len {shorter} with {slots} at once"
        ways.append({"text": text, **both, "max_model_len": shorter})
    if fewer := case.most_slots(tokens, slots):
        text = f"max_num_seqs {fewer} at {tokens}"
        ways.append({"text": text, **both, "max_num_seqs": fewer})
    packed = _packed(case)
    longer = packed.longest(slots, tokens) if packed else 0
    if longer > shorter:
        text = "the same" if longer == tokens else f"max_model_len {longer}"
        text += " with serve.extra.cache-type-k=q8_0 and cache-type-v=q8_0"
        ways.append({"text": text, **both, "max_model_len": longer, "kv_cache_dtype": "q8_0"})
    needed = case.needs(tokens, slots) * _MARGIN // (_MARGIN - 1) + MIB
    gpus = max(1, case.machine.gpus)
    memory = f"{human(-(-needed // gpus))} of {'GPU ' if case.machine.gpus else ''}memory"
    key = "gpu_memory" if case.machine.gpus else "memory"
    ways.append({"text": memory + (" each" if gpus > 1 else ""), key: -(-needed // gpus)})
    return ways


def _packed(case: _Case) -> _Case | None:
    packed = replace(case, type_k="q8_0", type_v="q8_0")
    try:
        smaller = packed.layer_bytes < case.layer_bytes
    except UsageError:
        return None
    return packed if smaller and case.flash else None


def _shape_notes(shape: ModelShape) -> list[str]:
    notes = []
    if not shape.max_positions:
        notes.append(f"config.json gives no length: {_UNKNOWN_LENGTH} tokens are assumed")
    if shape.sliding_window and not sliding_layers(shape):
        notes.append("sliding layers are planned at full length, which is never too little")
    return notes


def _result(
    case: _Case,
    tokens: int,
    slots: int,
    gpu_layers: int,
    extra: Mapping[str, Json],
    notes: list[str],
) -> ServingPlan:
    growing = case.shape.layers - sliding_layers(case.shape)
    settings: dict[str, Json] = {
        "ctx-size": padded(tokens) * slots,
        "parallel": slots,
        "kv-unified": False,
        "n-gpu-layers": gpu_layers,
        "flash-attn": "on",
        "cache-type-k": case.type_k,
        "cache-type-v": case.type_v,
        "batch-size": max(_BATCH, case.ubatch),
        "ubatch-size": case.ubatch,
        "cache-ram": 0,
        "fit": "off",
    }
    machine, kv = case.machine, case.kv(tokens, slots)
    gpus, overhead = max(1, machine.gpus), case.overhead(tokens, slots)
    room = max(0, machine.usable - case.weights - overhead)
    fits = case.fits(tokens, slots)
    return ServingPlan(
        device=machine.device,
        gpus=machine.gpus,
        max_model_len=tokens,
        max_num_seqs=slots,
        max_num_batched_tokens=int(str({**settings, **extra}["batch-size"])),
        max_concurrency=room // (kv // slots),
        weight_bytes=case.weights,
        weights_bytes_per_gpu=-(-case.weights // gpus),
        kv_bytes_per_token=growing * case.layer_bytes,
        kv_bytes_per_request=kv // slots,
        kv_bytes_total=kv,
        kv_cache_bytes=room // gpus,
        overhead_bytes=overhead,
        usable_bytes=machine.usable,
        margin_bytes=machine.held_back // gpus,
        host_bytes=case.weights + kv + overhead,
        pipeline_parallel_size=gpus,
        gpu_layers=gpu_layers,
        fits=fits,
        nearest=None if fits else tuple(_ways(case, tokens, slots)),
        settings={**settings, **extra},
        notes=tuple(notes),
    )
