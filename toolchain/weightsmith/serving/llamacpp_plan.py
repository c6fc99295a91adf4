"""Plans llama-server's memory: how long a request may be, how many at once, on which device.

The guarantee is strict: every slot owns its share of the cache, so `max_num_seqs` requests of
`max_model_len` tokens run together and none is cut off (`-np N -c pad256(L)*N --no-kv-unified`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from weightsmith.core.errors import UsageError
from weightsmith.core.values import JsonValue
from weightsmith.models.facts import ModelFacts
from weightsmith.models.shape import ModelShape
from weightsmith.serving.architectures import check_architecture
from weightsmith.serving.auto import choices, choose_length, rule, usable
from weightsmith.serving.engine import ServeOptions
from weightsmith.serving.llamacpp_cache import (
    padded,
    require_attention,
    sliding_layers,
)
from weightsmith.serving.llamacpp_capacity import UBATCH, LlamaCppCapacity, make_capacity, ways
from weightsmith.serving.llamacpp_options import extra_options
from weightsmith.serving.memory import human
from weightsmith.serving.plan import ServingPlan

_AUTO_SLOTS = 4
_MANY_SLOTS = 64
_UNKNOWN_LENGTH = 4096
_SPLIT_LENGTH = 4096
_BATCH = 2048


def plan(model: ModelFacts, weight_bytes: int, options: ServeOptions) -> ServingPlan:
    """Return the plan for a model of `weight_bytes` on the machine that the options name.

    `auto` for the length takes the longest that fits, up to the model's own, for as many requests
    as the options say, or as `choose_length` says; `auto` for requests takes up to four. Raises
    InputRefused for numbers in config.json that are wrong, and UsageError for options that do not
    fit, with the nearest that do.
    """
    shape = model.shape
    require_attention(shape)
    extra = _with_options(extra_options(options.extra), options)
    capacity = make_capacity(model, weight_bytes, options, extra)
    notes = _shape_notes(shape)
    if said := check_architecture(model):
        notes.append(said)
    limit = _length_limit(shape, options, extra)
    tokens, slots = _choose(capacity, options, limit)
    notes += _picture_notes(model, capacity, tokens)
    notes += _adapter_notes(capacity, options)
    if capacity.fits(tokens, slots):
        layers = capacity.shape.layers + 1 if capacity.machine.gpus else 0
    elif capacity.machine.gpus:
        layers = _split(capacity, tokens, slots, options)
        notes.append(
            f"{layers} of {shape.layers} layers fit on {capacity.machine.device}; the rest run on"
            " the host's CPU, many times slower"
        )
    else:
        raise _too_much(capacity, tokens, slots)
    rows: tuple[Mapping[str, JsonValue], ...] = ()
    if options.max_model_len is None and options.max_num_seqs is None:
        rows = choices(capacity, limit, _MANY_SLOTS, tokens)
        notes += [rule(limit, _AUTO_SLOTS)] if rows and tokens < limit else []
    return replace(_result(capacity, tokens, slots, layers, extra, notes), choices=rows)


_CACHE_TYPES = {"fp8": "q8_0", "fp8_e4m3": "q8_0", "float16": "f16", "bfloat16": "bf16"}
"""Other engines' names -> the nearest of llama.cpp's own."""


def _with_options(extra: dict[str, JsonValue], options: ServeOptions) -> dict[str, JsonValue]:
    """Return llama-server's options for those that every engine has; `extra` wins.

    Raises UsageError for an option that llama.cpp has nothing for.
    """
    if options.dtype:
        raise UsageError(
            f"dtype {options.dtype}: a GGUF file has its types already",
            hint="choose another target",
        )
    if options.tensor_parallel_size > 1:
        raise UsageError(
            "tensor_parallel_size: llama.cpp gives whole layers to each GPU",
            hint="set serve.gpu_count alone",
        )
    if options.pipeline_parallel_size not in {0, options.gpu_count}:
        raise UsageError(
            f"pipeline_parallel_size {options.pipeline_parallel_size} is not gpu_count"
            f" {options.gpu_count}",
            hint="leave it out: llama.cpp spreads the layers over all GPUs",
        )
    found: dict[str, JsonValue] = {}
    if options.kv_cache_dtype:
        kind = _CACHE_TYPES.get(options.kv_cache_dtype, options.kv_cache_dtype)
        found |= {"cache-type-k": kind, "cache-type-v": kind}
    if batch := options.max_num_batched_tokens:
        found |= {"batch-size": batch, "ubatch-size": min(UBATCH, batch)}
    return {**found, **extra}


def _length_limit(shape: ModelShape, options: ServeOptions, extra: Mapping[str, JsonValue]) -> int:
    """Return the longest request the model allows; stretched positions lift the limit."""
    limit = shape.max_positions or _UNKNOWN_LENGTH
    wanted = options.max_model_len
    if wanted is None:
        return limit
    stretched = any(option.startswith(("rope-", "yarn-")) for option in extra)
    if shape.max_positions and wanted > shape.max_positions and not stretched:
        raise UsageError(
            f"max_model_len {wanted} is longer than the model's {shape.max_positions} positions",
            hint=f"nearest: max_model_len {shape.max_positions}; or stretch the positions with"
            " serve.extra.rope-scale or serve.extra.yarn-orig-ctx",
        )
    return max(limit, wanted)


def _choose(capacity: LlamaCppCapacity, options: ServeOptions, limit: int) -> tuple[int, int]:
    """Return (tokens, slots): the options, and for `auto` the most that fits."""
    tokens = options.max_model_len
    if tokens is None:
        slots = options.max_num_seqs
        tokens = (
            capacity.longest(slots, limit) if slots else choose_length(capacity, limit, _AUTO_SLOTS)
        )
        # A GPU that cannot hold everything is used for as many layers as it can.
        useful = min(_SPLIT_LENGTH, limit)
        if capacity.machine.gpus and tokens < useful:
            tokens = useful
        tokens = usable(tokens, limit)
    slots = options.max_num_seqs or capacity.most_requests(tokens, _AUTO_SLOTS) or 1
    return tokens, slots


def _split(capacity: LlamaCppCapacity, tokens: int, slots: int, options: ServeOptions) -> int:
    """Return how many layers fit on the GPU, counting a layer's weights and cache as equal."""
    layers = capacity.shape.layers
    kv = capacity.kv(tokens, slots)
    each = -(-(capacity.weights - capacity.projector) // layers) + -(-kv // layers)
    room = capacity.machine.usable - capacity.overhead(tokens, slots) - capacity.projector
    fitting = min(layers, room // each)
    if fitting < 1:
        raise _too_much(capacity, tokens, slots)
    rest = (layers - fitting) * each + capacity.program
    if options.host_memory_bytes and rest > options.host_memory_bytes:
        raise UsageError(
            f"{layers - fitting} layers do not fit on {capacity.machine.device} and need"
            f" {human(rest)} of host memory; there are {human(options.host_memory_bytes)}",
            hint=f"nearest that fits: {_nearest(capacity, tokens, slots)}",
        )
    return fitting


def _too_much(capacity: LlamaCppCapacity, tokens: int, slots: int) -> UsageError:
    machine = capacity.machine
    return UsageError(
        f"max_model_len {tokens} x max_num_seqs {slots} needs"
        f" {human(capacity.needs(tokens, slots))}, {human(machine.usable)} are usable on"
        f" {machine.device}: weights {human(capacity.weights)},"
        f" cache {human(capacity.kv(tokens, slots))},"
        f" overhead {human(capacity.overhead(tokens, slots))}",
        hint=f"nearest that fits: {_nearest(capacity, tokens, slots)}",
        details={"plan": _result(capacity, tokens, slots, 0, {}, [])},
    )


def _nearest(capacity: LlamaCppCapacity, tokens: int, slots: int) -> str:
    """Return the nearest options that fit, for people."""
    return "; or ".join(str(way["text"]) for way in ways(capacity, tokens, slots))


def _shape_notes(shape: ModelShape) -> list[str]:
    notes = []
    if not shape.max_positions:
        notes.append(f"config.json gives no length: {_UNKNOWN_LENGTH} tokens are assumed")
    if shape.sliding_window and not sliding_layers(shape):
        notes.append("sliding layers are planned at full length, which is never too little")
    if sliding_layers(shape) == shape.layers:
        notes.append(
            f"every layer slides: a request keeps its last {shape.sliding_window} tokens and those"
            " of a step, and grows by nothing beyond them"
        )
    return notes


def _picture_notes(model: ModelFacts, capacity: LlamaCppCapacity, tokens: int) -> list[str]:
    text = (
        "the server reads text only: the pinned llama.cpp has no projector for"
        f" {model.architecture}, or the model has no preprocessor_config.json"
    )
    pictures = (
        f"the server reads pictures: a projector of {human(capacity.projector)} lies beside the"
        f" model, and a picture takes up to {human(capacity.picture(tokens))} more (an estimate)"
    )
    if capacity.projector:
        return [pictures]
    return [text] if model.sees_images else []


def _adapter_notes(capacity: LlamaCppCapacity, options: ServeOptions) -> list[str]:
    if not (found := options.adapters):
        return []
    weights = human(sum(adapter.weight_bytes for adapter in found))
    graph = f", and a graph that has room for all of them {human(capacity.graph)} (an estimate)"
    on_cpu = "" if capacity.machine.gpus else graph
    return [f"{len(found)} adapter(s) are loaded: their weights take {weights}{on_cpu}"]


def _result(
    capacity: LlamaCppCapacity,
    tokens: int,
    slots: int,
    gpu_layers: int,
    extra: Mapping[str, JsonValue],
    notes: list[str],
) -> ServingPlan:
    settings: dict[str, JsonValue] = {
        "ctx-size": padded(tokens) * slots,
        "parallel": slots,
        "kv-unified": False,
        "n-gpu-layers": gpu_layers,
        "flash-attn": "on",
        "cache-type-k": capacity.type_k,
        "cache-type-v": capacity.type_v,
        "batch-size": max(_BATCH, capacity.ubatch),
        "ubatch-size": capacity.ubatch,
        "cache-ram": 0,
        "fit": "off",
    }
    machine, kv = capacity.machine, capacity.kv(tokens, slots)
    gpus, overhead = max(1, machine.gpus), capacity.overhead(tokens, slots)
    room = max(0, machine.usable - capacity.weights - overhead)
    fits = capacity.fits(tokens, slots)
    return ServingPlan(
        device=machine.device,
        gpus=machine.gpus,
        max_model_len=tokens,
        max_num_seqs=slots,
        max_num_batched_tokens=int(str({**settings, **extra}["batch-size"])),
        max_concurrency=room // (kv // slots),
        weight_bytes=capacity.weights,
        weights_bytes_per_gpu=-(-capacity.weights // gpus),
        kv_bytes_per_token=capacity.growth,
        kv_bytes_per_request=kv // slots,
        kv_bytes_total=kv,
        kv_cache_bytes=room // gpus,
        overhead_bytes=overhead,
        usable_bytes=machine.usable,
        margin_bytes=machine.held_back // gpus,
        host_bytes=capacity.weights + kv + overhead,
        pipeline_parallel_size=gpus,
        gpu_layers=gpu_layers,
        fits=fits,
        nearest=None if fits else tuple(ways(capacity, tokens, slots)),
        settings={**settings, **extra},
        notes=tuple(notes),
    )
