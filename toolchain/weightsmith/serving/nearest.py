"""What would fit, where the options do not: changed ones, each with its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from weightsmith.core.values import JsonValue
from weightsmith.serving.gpus import GPUS
from weightsmith.serving.machine import can_split
from weightsmith.serving.memory import human
from weightsmith.serving.paged_capacity import PagedCapacity
from weightsmith.serving.plan import ServingPlan

_MOST_GPUS = 16
_FOUR_BITS = 4.25
"""Four bits and a 16-bit scale and 4-bit zero per 128 weights, nearly (AWQ, GPTQ)."""


def alternatives(capacity: PagedCapacity, plan: ServingPlan) -> tuple[Mapping[str, JsonValue], ...]:
    """Return changes of one option each that fit: `text` for people, the rest as `serve` keys.

    In this order: a shorter request, fewer at once, a smaller cache type, smaller weights, more
    GPUs, another GPU. One that changes nothing enough is left out; the list may be empty.
    """
    tokens, requests = plan.max_model_len, plan.max_num_seqs
    found = [
        _shorter(capacity, tokens, requests),
        _fewer(capacity, tokens, requests),
        _smaller_cache(capacity, tokens, requests),
        _smaller_weights(capacity, tokens, requests),
        _more_gpus(capacity, tokens, requests),
        _other_gpu(capacity, tokens, requests),
        _more_memory(capacity, tokens, requests),
    ]
    return tuple(way for way in found if way)


def _shorter(capacity: PagedCapacity, tokens: int, requests: int) -> Mapping[str, JsonValue]:
    shorter = capacity.longest(requests, tokens)
    if not 0 < shorter < tokens:
        return {}
    return {
        "text": f"max_model_len {shorter} with {requests} at once",
        "max_model_len": shorter,
        "max_num_seqs": requests,
    }


def _fewer(capacity: PagedCapacity, tokens: int, requests: int) -> Mapping[str, JsonValue]:
    fewer = capacity.most(tokens, requests)
    if not 0 < fewer < requests:
        return {}
    return {
        "text": f"max_num_seqs {fewer} at {tokens} tokens",
        "max_model_len": tokens,
        "max_num_seqs": fewer,
    }


def _smaller_cache(capacity: PagedCapacity, tokens: int, requests: int) -> Mapping[str, JsonValue]:
    card = capacity.machine.gpu
    if capacity.element <= 1 or "fp8" not in capacity.rules.cache_dtypes or (card and not card.fp8):
        return {}
    packed = replace(capacity, options=replace(capacity.options, kv_cache_dtype="fp8"))
    longest = packed.longest(requests, tokens)
    if longest <= capacity.longest(requests, tokens):
        return {}
    text = "the same" if longest == tokens else f"max_model_len {longest} with {requests} at once"
    return {
        "text": f"{text} with kv_cache_dtype fp8",
        "kv_cache_dtype": "fp8",
        "max_model_len": longest,
        "max_num_seqs": requests,
    }


def _smaller_weights(
    capacity: PagedCapacity, tokens: int, requests: int
) -> Mapping[str, JsonValue]:
    bits = capacity.options.format.bits_per_weight
    if bits <= 8 or capacity.packed or not capacity.rules.small_target:
        return {}
    outside = min(capacity.weights, capacity.shape.vocab * capacity.shape.hidden * 2)
    size = outside + int((capacity.weights - outside) * _FOUR_BITS / bits)
    packed = replace(capacity, weights=size)
    if not packed.fits(tokens, requests):
        return {}
    return {
        "text": f"the same with 4-bit weights of about {human(size)}: target"
        f" {capacity.rules.small_target}",
        "target": capacity.rules.small_target,
        "weight_bytes": size,
    }


def _more_gpus(capacity: PagedCapacity, tokens: int, requests: int) -> Mapping[str, JsonValue]:
    machine = capacity.machine
    if not machine.gpus:
        return {}
    for count in range(machine.gpus + 1, _MOST_GPUS + 1):
        if not can_split(capacity.shape, count):
            continue
        wider = replace(
            capacity,
            machine=replace(machine, gpus=count, tensor_parallel=count, pipeline_parallel=1),
        )
        if wider.fits(tokens, requests):
            return {
                "text": f"{count} x {machine.device} ({human(wider.weights_each)} of weights each)",
                "gpu_count": count,
            }
    return {}


def _other_gpu(capacity: PagedCapacity, tokens: int, requests: int) -> Mapping[str, JsonValue]:
    machine = capacity.machine
    if not machine.gpus:
        return {}
    for card in sorted(GPUS.values(), key=lambda card: card.usable_bytes):
        # AMD's need another image.
        if card.usable_bytes <= machine.bytes_each or not any(card.compute_capability):
            continue
        other = replace(machine, device=card.name, gpu=card, bytes_each=card.usable_bytes)
        if replace(capacity, machine=other).fits(tokens, requests):
            count = f"{machine.gpus} x " if machine.gpus > 1 else ""
            return {
                "text": f"{count}{card.name} ({human(card.usable_bytes)})",
                "gpu": card.name,
                "gpu_count": machine.gpus,
            }
    return {}


def _more_memory(capacity: PagedCapacity, tokens: int, requests: int) -> Mapping[str, JsonValue]:
    if capacity.machine.gpus:
        return {}
    low, high = capacity.machine.bytes_each, capacity.machine.bytes_each * 2
    while not _with_memory(capacity, high).fits(tokens, requests):
        low, high = high, high * 2
    while high - low > 1 << 26:
        middle = (low + high) // 2
        fits = _with_memory(capacity, middle).fits(tokens, requests)
        low, high = (low, middle) if fits else (middle, high)
    return {"text": f"{human(high)} of memory", "memory": high}


def _with_memory(capacity: PagedCapacity, size: int) -> PagedCapacity:
    return replace(capacity, machine=replace(capacity.machine, bytes_each=size))
