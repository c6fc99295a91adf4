"""Plans engines whose cache is a pool on each GPU: vLLM, SGLang, TensorRT-LLM, TGI.

The guarantee is strict: `max_num_seqs` requests of `max_model_len` tokens are in the cache
together, none waits and none is computed twice.

The engine could preempt requests, but the purpose of a plan is that none is computed twice under
load. Each engine supplies a dozen facts, so the block rules have one place; llama.cpp's slots
follow other rules and have a planner of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from weightsmith.core.errors import UsageError
from weightsmith.core.values import LORA, SAFETENSORS, JsonValue
from weightsmith.models.facts import ModelFacts
from weightsmith.models.shape import ModelShape
from weightsmith.serving.architectures import check_architecture
from weightsmith.serving.auto import choices, choose_length, rule, usable
from weightsmith.serving.devices import GPUS
from weightsmith.serving.engine import ServeOptions
from weightsmith.serving.machine import Machine, can_split, choose_dtype, machine_for
from weightsmith.serving.memory import GIB, human
from weightsmith.serving.paged_capacity import PagedCapacity, Rules, Switches, lengths
from weightsmith.serving.plan import ServingPlan
from weightsmith.serving.pooling import keeps_cache
from weightsmith.serving.speculation import with_drafter

_AUTO_REQUESTS = 8
"""For which `auto` makes requests shorter than the model allows."""


def plan_paged(
    model: ModelFacts,
    weight_bytes: int,
    options: ServeOptions,
    rules: Rules,
    switches: Switches,
) -> tuple[ServingPlan, PagedCapacity]:
    """Return a model's plan, without the engine's settings, and its capacity.

    `auto` for the length takes the longest that fits, up to the model's own, for as many requests
    as the options say, or as `choose_length` says; `auto` for requests takes as many as fit.
    Raises InputRefused for numbers in config.json that are wrong, and UsageError for options that
    do not fit, with the nearest that do.
    """
    capacity = _capacity(model, weight_bytes, options, rules, switches)
    tokens = _tokens(capacity)
    limit = rules.most_requests(capacity.machine)
    requests = options.max_num_seqs or capacity.most_requests(tokens, limit) or 1
    if options.max_num_batched_tokens and options.max_num_batched_tokens < requests:
        raise UsageError(
            f"max_num_batched_tokens {options.max_num_batched_tokens} is less than max_num_seqs"
            f" {requests}: each request takes at least one token of a batch",
            hint=f"nearest: max_num_batched_tokens {requests}",
        )
    plan = _plan(capacity, tokens, requests)
    if not plan.fits:
        raise _too_much(capacity, plan)
    if options.max_model_len is None and options.max_num_seqs is None:
        own = capacity.limit.default
        said = (rule(own, _AUTO_REQUESTS),) if tokens < own else ()
        rows = choices(capacity, own, limit, tokens)
        plan = replace(plan, choices=rows, notes=(*plan.notes, *said))
    return plan, capacity


def _capacity(
    model: ModelFacts, weight_bytes: int, options: ServeOptions, rules: Rules, switches: Switches
) -> PagedCapacity:
    shape = model.shape if keeps_cache(model) else replace(model.shape, cache=())
    machine = machine_for(options, shape)
    if not machine.gpus and not rules.runs_on_cpu:
        raise UsageError(
            f"{rules.name} needs a GPU",
            hint="set serve.gpu (such as nvidia-l4), or choose a llamacpp target for a CPU",
        )
    if machine.pipeline_parallel > 1 and not rules.splits_by_layers:
        fitting = [n for n in range(1, machine.gpus + 1) if can_split(shape, n)]
        raise UsageError(
            f"{rules.name} cannot spread this model over {machine.gpus} GPUs: its {shape.heads}"
            f" heads, or its {shape.kv_heads} key-value heads, do not divide, and it does not split"
            " by layers",
            hint=f"nearest: gpu_count {max(fitting)}",
        )
    wanted = options.dtype
    if model.task.kind != "generate" and shape.dtype == "float32" and not wanted:
        # As vLLM does it (0.33, config/model.py); half of the digits of vectors are worth little.
        wanted = "float16" if machine.gpus else "float32"
    dtype, note = choose_dtype(shape, machine, wanted)
    _check_cache(rules, machine, dtype, options)
    assumed = check_architecture(model) if shape.cache else ""
    notes = [said for said in (note, assumed) if said]
    if options.gpu_memory_bytes and machine.gpu is None:
        notes.append("a GPU without a name: its number formats are not checked")
    if not shape.max_positions:
        notes.append("config.json gives no length")
    if not rules.keeps_windows_small and any(p.kind in {"sliding", "chunked"} for p in shape.cache):
        notes.append("layers with a window are planned at full length, which is never too little")
    notes += _copies(shape, machine, rules)
    float32 = (options.format, model.stated_dtype) == (SAFETENSORS, "float32")
    if float32 and dtype != "float32":
        notes.append(f"float32 weights are loaded as {dtype}: half of the files' size")
        weight_bytes //= 2
    stretching = {"hf-overrides", "rope-scaling"}
    stretched = any(key.replace("_", "-") in stretching for key in options.extra)
    return PagedCapacity(
        rules=rules,
        shape=with_drafter(shape, model, options.speculation),
        weights=weight_bytes + (options.speculation.weight_bytes if options.speculation else 0),
        machine=machine,
        options=options,
        dtype=dtype,
        switches=switches,
        packed=model.packing is not None,
        limit=lengths(model, stretched=stretched),
        notes=tuple(notes),
    )


def _copies(shape: ModelShape, machine: Machine, rules: Rules) -> list[str]:
    """Return what to know of a cache that is not divided among all GPUs that share a layer."""
    tensor = machine.tensor_parallel
    copies = tensor if shape.latent_cache else max(1, tensor // shape.kv_heads)
    if copies == 1:
        return []
    what = "latent attention" if shape.latent_cache else f"{shape.kv_heads} key-value head(s)"
    more = f", or with data parallelism ({rules.data_parallel}), which is not planned here"
    note = (
        f"the cache is there {copies} times, because {what} cannot be divided among {tensor} GPUs:"
        f" they hold no more requests than {tensor // copies} with as much memory left. More fit in"
        f" replicas on fewer GPUs{more if rules.data_parallel else ''}"
    )
    return [note]


def _check_cache(rules: Rules, machine: Machine, dtype: str, options: ServeOptions) -> None:
    wanted, share = options.kv_cache_dtype, options.gpu_memory_utilization
    if share and not 0.05 <= share <= 0.99:
        raise UsageError(
            f"gpu_memory_utilization {share}: outside 0.05 to 0.99",
            hint="it is a fraction of one GPU's memory, such as 0.9",
        )
    if not wanted:
        return
    if wanted not in rules.cache_dtypes:
        raise UsageError(
            f"kv_cache_dtype {wanted}: {rules.name} has no such type",
            hint=f"one of auto, {', '.join(rules.cache_dtypes)}",
        )
    if wanted in {"float16", "bfloat16"} and wanted != dtype:
        raise UsageError(
            f"kv_cache_dtype {wanted} is not the model's {dtype}",
            hint="leave it out, or set an 8-bit type",
        )
    # E4M3 in hardware came with compute capability 8.9; E5M2 is converted from 8.0 on.
    card = machine.gpu
    needs = (8, 0) if wanted == "fp8_e5m2" else (8, 9)
    if card and wanted.startswith("fp8") and not card.fp8 and card.compute_capability < needs:
        raise UsageError(
            f"kv_cache_dtype {wanted} needs compute capability {needs[0]}.{needs[1]}, and"
            f" {card.name} has {card.compute_capability[0]}.{card.compute_capability[1]}",
            hint="leave it out, or choose an L4, L40S, H100 or later",
        )


def _tokens(capacity: PagedCapacity) -> int:
    """Return max_model_len: the option, else the longest that fits and is of use."""
    wanted, limit = capacity.options.max_model_len, capacity.limit
    if wanted is None:
        if requests := capacity.options.max_num_seqs:
            found = capacity.longest(requests, limit.default)
        else:
            found = choose_length(capacity, limit.default, _AUTO_REQUESTS)
        return usable(found, limit.default)
    if wanted > limit.most:
        raise UsageError(
            f"max_model_len {wanted} is longer than the model's {limit.most} positions",
            hint=f"nearest: max_model_len {limit.most}",
        )
    return wanted


def _plan(capacity: PagedCapacity, tokens: int, requests: int) -> ServingPlan:
    machine, cache, weights = capacity.machine, capacity.cache, capacity.weights
    room, margin, fraction = capacity.budget(tokens, requests)
    gpus, tensor = max(1, machine.gpus), machine.tensor_parallel
    need = capacity.blocks(tokens, requests) * cache.bytes_per_block
    overhead = capacity.overhead(tokens, requests)
    inflight = capacity.inflight(tokens, requests)
    growth, notes = cache.growth, capacity.notes
    # vLLM's own figure, "Maximum concurrency for N tokens per request".
    concurrency: float = requests
    if cache.groups:
        concurrency = cache.number(room) / cache.blocks(tokens, inflight)
    if machine.pipeline_parallel > 1:  # in the layers of all stages
        whole = replace(capacity, machine=replace(machine, pipeline_parallel=1))
        growth = whole.cache.growth
    wanted = capacity.options.gpu_memory_utilization
    if wanted and fraction < wanted:
        said = f"gpu_memory_utilization {fraction} instead of {wanted}: activations need the rest"
        notes = (*notes, said)
    if machine.gpus:
        # The files' pages while they are copied, and a process per GPU.
        host = weights + 4 * GIB + 2 * GIB * machine.gpus
        shared = 2 * GIB if machine.gpus > 1 else 0
    else:
        host = weights + need * requests + cache.bytes_per_block + overhead
        # vLLM has a process for its one worker on a CPU too, and asks for 160 MiB before it starts
        # (0.32, shm_broadcast.py: 10 chunks of 16 MiB).
        shared = GIB // 4
    return ServingPlan(
        device=machine.device,
        gpus=machine.gpus,
        max_model_len=tokens,
        max_num_seqs=requests,
        max_num_batched_tokens=capacity.batched(tokens, requests),
        max_concurrency=math.floor(concurrency * 100) / 100,
        weight_bytes=weights,
        weights_bytes_per_gpu=capacity.weights_each,
        kv_bytes_per_token=growth * tensor,
        kv_bytes_per_request=need * gpus,
        kv_bytes_total=need * gpus * requests,
        kv_cache_bytes=max(0, room) if cache.groups else 0,
        overhead_bytes=overhead * gpus,
        usable_bytes=(capacity.weights_each + overhead + max(0, room)) * gpus,
        margin_bytes=margin,
        host_bytes=host,
        shm_bytes=shared,
        gpu_memory_utilization=fraction if machine.gpus else None,
        tensor_parallel_size=tensor,
        pipeline_parallel_size=machine.pipeline_parallel,
        gpu_layers=capacity.shape.layers if machine.gpus else 0,
        fits=capacity.fits(tokens, requests),
        notes=notes,
    )


def _too_much(capacity: PagedCapacity, plan: ServingPlan) -> UsageError:
    # In this order: a shorter request, fewer at once, a smaller cache type, smaller weights, more
    # GPUs, another GPU, or without any more memory. What changes nothing enough is left out.
    tokens, requests = plan.max_model_len, plan.max_num_seqs
    ways = (*_smaller(capacity, tokens, requests), *_larger(capacity, tokens, requests))
    gpus = max(1, plan.gpus)
    where = f"{plan.device} x {gpus} per GPU" if gpus > 1 else plan.device
    return UsageError(
        f"max_model_len {tokens} x max_num_seqs {requests} does not fit on"
        f" {where}: weights {human(plan.weights_bytes_per_gpu)}, other"
        f" {human(plan.overhead_bytes // gpus)}, {human(plan.kv_cache_bytes)} are left for a cache"
        f" of {human(plan.kv_bytes_total // gpus)}",
        hint=f"nearest that fits: {'; or '.join(texts)}"
        if (texts := [str(way["text"]) for way in ways])
        else "nothing near fits, up to 16 GPUs of this kind: choose a smaller model",
        details={"plan": replace(plan, nearest=ways)},
    )


_MOST_GPUS = 16
_FOUR_BITS = 4.25
"""Four bits and a 16-bit scale and 4-bit zero per 128 weights, nearly (AWQ, GPTQ)."""


def _smaller(
    capacity: PagedCapacity, tokens: int, requests: int
) -> Iterator[Mapping[str, JsonValue]]:
    """Yield options that fit on the same machine: `text` for people, the rest as `serve` keys."""
    rules, card = capacity.rules, capacity.machine.gpu
    both: Mapping[str, JsonValue] = {"max_model_len": tokens, "max_num_seqs": requests}
    shorter = capacity.longest(requests, tokens)
    if 0 < shorter < tokens:
        text = f"max_model_len {shorter} with {requests} at once"
        yield {"text": text, **both, "max_model_len": shorter}
    fewer = capacity.most_requests(tokens, requests)
    if 0 < fewer < requests:
        text = f"max_num_seqs {fewer} at {tokens} tokens"
        yield {"text": text, **both, "max_num_seqs": fewer}
    if capacity.element > 1 and "fp8" in rules.cache_dtypes and (not card or card.fp8):
        packed = replace(capacity, options=replace(capacity.options, kv_cache_dtype="fp8"))
        longer = packed.longest(requests, tokens)
        if longer > shorter:
            text = f"max_model_len {longer} with {requests} at once"
            text = f"{'the same' if longer == tokens else text} with kv_cache_dtype fp8"
            yield {"text": text, "kv_cache_dtype": "fp8", **both, "max_model_len": longer}
    bits, name = capacity.options.format.bits_per_weight, rules.small_target
    name = f"{name}-{LORA.name}" if name and capacity.options.adapters else name
    if bits > 8 and not capacity.packed and name:
        outside = min(capacity.weights, capacity.shape.vocab * capacity.shape.hidden * 2)
        size = outside + int((capacity.weights - outside) * _FOUR_BITS / bits)
        if replace(capacity, weights=size).fits(tokens, requests):
            text = f"the same with 4-bit weights of about {human(size)}: target {name}"
            yield {"text": text, "target": name, "weight_bytes": size}


def _larger(
    capacity: PagedCapacity, tokens: int, requests: int
) -> Iterator[Mapping[str, JsonValue]]:
    machine = capacity.machine

    def on(other: Machine) -> PagedCapacity:
        return replace(capacity, machine=other)

    for count in range(machine.gpus + 1, _MOST_GPUS + 1) if machine.gpus else ():
        if can_split(capacity.shape, count):
            wider = on(replace(machine, gpus=count, tensor_parallel=count, pipeline_parallel=1))
            if wider.fits(tokens, requests):
                each = human(wider.weights_each)
                text = f"{count} x {machine.device} ({each} of weights each)"
                yield {"text": text, "gpu_count": count}
                break
    # AMD's need another image.
    cards = [one for one in GPUS.values() if capacity.rules.knows(one) and not one.shares_memory]
    for card in sorted(cards, key=lambda card: card.usable_bytes) if machine.gpus else ():
        size = card.usable_bytes
        if size > machine.bytes_each:
            other = replace(machine, device=card.name, gpu=card, bytes_each=size)
            if on(other).fits(tokens, requests):
                text = f"{machine.gpus} x " if machine.gpus > 1 else ""
                text += f"{card.name} ({human(size)})"
                yield {"text": text, "gpu": card.name, "gpu_count": machine.gpus}
                break
    if not machine.gpus:
        low, high = machine.bytes_each, machine.bytes_each * 2
        while not on(replace(machine, bytes_each=high)).fits(tokens, requests):
            low, high = high, high * 2
        while high - low > 1 << 26:
            middle = (low + high) // 2
            fits = on(replace(machine, bytes_each=middle)).fits(tokens, requests)
            low, high = (low, middle) if fits else (middle, high)
        yield {"text": f"{human(high)} of memory", "memory": high}
