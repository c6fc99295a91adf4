"""What would fit, where a wish does not: changed wishes, each with its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from toolchain.serving.engine import ServingPlan
from toolchain.serving.gpus import GPUS
from toolchain.serving.machine import can_split
from toolchain.serving.memory import human
from toolchain.serving.paged_case import Case
from toolchain.values import Json

_MOST_GPUS = 16
_FOUR_BITS = 4.25
"""Four bits and a 16-bit scale and 4-bit zero per 128 weights, nearly (AWQ, GPTQ)."""


def alternatives(case: Case, plan: ServingPlan) -> tuple[Mapping[str, Json], ...]:
    """Return changes of one wish each that fit: `text` for people, the rest as `serve` keys.

    In this order: a shorter request, fewer at once, a smaller cache type, smaller weights, more
    GPUs, another GPU. One that changes nothing enough is left out; the list may be empty.
    """
    tokens, requests = plan.max_model_len, plan.max_num_seqs
    found = [
        _shorter(case, tokens, requests),
        _fewer(case, tokens, requests),
        _smaller_cache(case, tokens, requests),
        _smaller_weights(case, tokens, requests),
        _more_gpus(case, tokens, requests),
        _other_gpu(case, tokens, requests),
        _more_memory(case, tokens, requests),
    ]
    return tuple(way for way in found if way)


def _shorter(case: Case, tokens: int, requests: int) -> Mapping[str, Json]:
    shorter = case.longest(requests, tokens)
    if not 0 < shorter < tokens:
        return {}
    return {
        "text": f"max_model_len {shorter} with {requests} at once",
        "max_model_len": shorter,
        "max_num_seqs": requests,
    }


def _fewer(case: Case, tokens: int, requests: int) -> Mapping[str, Json]:
    fewer = case.most(tokens, requests)
    if not 0 < fewer < requests:
        return {}
    return {
        "text": f"max_num_seqs {fewer} at {tokens} tokens",
        "max_model_len": tokens,
        "max_num_seqs": fewer,
    }


def _smaller_cache(case: Case, tokens: int, requests: int) -> Mapping[str, Json]:
    card = case.machine.gpu
    if case.element <= 1 or "fp8" not in case.rules.cache_dtypes or (card and not card.fp8):
        return {}
    packed = replace(case, wishes=replace(case.wishes, kv_cache_dtype="fp8"))
    longest = packed.longest(requests, tokens)
    if longest <= case.longest(requests, tokens):
        return {}
    text = "the same" if longest == tokens else f"max_model_len {longest} with {requests} at once"
    return {
        "text": f"{text} with kv_cache_dtype fp8",
        "kv_cache_dtype": "fp8",
        "max_model_len": longest,
        "max_num_seqs": requests,
    }


def _smaller_weights(case: Case, tokens: int, requests: int) -> Mapping[str, Json]:
    bits = case.wishes.format.bits_per_weight
    if bits <= 8 or not case.rules.small_target:
        return {}
    outside = min(case.weights, case.shape.vocab * case.shape.hidden * 2)
    size = outside + int((case.weights - outside) * _FOUR_BITS / bits)
    packed = replace(case, weights=size)
    if not packed.fits(tokens, requests):
        return {}
    return {
        "text": f"the same with 4-bit weights of about {human(size)}: target"
        f" {case.rules.small_target}",
        "target": case.rules.small_target,
        "weight_bytes": size,
    }


def _more_gpus(case: Case, tokens: int, requests: int) -> Mapping[str, Json]:
    machine = case.machine
    if not machine.gpus:
        return {}
    for count in range(machine.gpus + 1, _MOST_GPUS + 1):
        if not can_split(case.shape, count):
            continue
        wider = replace(
            case, machine=replace(machine, gpus=count, tensor_parallel=count, pipeline_parallel=1)
        )
        if wider.fits(tokens, requests):
            return {
                "text": f"{count} x {machine.device} ({human(wider.weights_each)} of weights each)",
                "gpu_count": count,
            }
    return {}


def _other_gpu(case: Case, tokens: int, requests: int) -> Mapping[str, Json]:
    machine = case.machine
    if not machine.gpus:
        return {}
    for card in sorted(GPUS.values(), key=lambda card: card.usable_bytes):
        # AMD's need another image.
        if card.usable_bytes <= machine.bytes_each or not any(card.compute_capability):
            continue
        other = replace(machine, device=card.name, gpu=card, bytes_each=card.usable_bytes)
        if replace(case, machine=other).fits(tokens, requests):
            count = f"{machine.gpus} x " if machine.gpus > 1 else ""
            return {
                "text": f"{count}{card.name} ({human(card.usable_bytes)})",
                "gpu": card.name,
                "gpu_count": machine.gpus,
            }
    return {}


def _more_memory(case: Case, tokens: int, requests: int) -> Mapping[str, Json]:
    if case.machine.gpus:
        return {}
    low, high = case.machine.bytes_each, case.machine.bytes_each * 2
    while not _with_memory(case, high).fits(tokens, requests):
        low, high = high, high * 2
    while high - low > 1 << 26:
        middle = (low + high) // 2
        fits = _with_memory(case, middle).fits(tokens, requests)
        low, high = (low, middle) if fits else (middle, high)
    return {"text": f"{human(high)} of memory", "memory": high}


def _with_memory(case: Case, size: int) -> Case:
    return replace(case, machine=replace(case.machine, bytes_each=size))
