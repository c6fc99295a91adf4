"""Plans engines whose cache is a pool on each GPU: vLLM, SGLang, TensorRT-LLM, TGI.

Exact: the weights, and the cache by the engine's own block rules. Estimated: what the engine needs
beside them, so a margin is held back. The guarantee is strict: `max_num_seqs` requests of
`max_model_len` tokens are in the cache together, none waits and none is computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from toolchain.errors import UsageError
from toolchain.serving.architectures import check_architecture
from toolchain.serving.engine import ServingPlan, Wishes
from toolchain.serving.length import Lengths, lengths
from toolchain.serving.machine import Machine, can_split, choose_dtype, dtype_bytes, machine_for
from toolchain.serving.memory import GIB, MIB, human
from toolchain.serving.model import ModelShape
from toolchain.serving.nearest import alternatives
from toolchain.serving.paged import PagedCache, paged_cache
from toolchain.values import SAFETENSORS, Json

_MARGIN = 20
"""One part in twenty of what the engine may take stays free, because the rest is estimated."""


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
    beside: int = 0
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
    splits_by_layers: bool = True
    """It knows pipeline parallelism."""
    small_target: str = ""
    """The engine's target with 4-bit weights, to point to where weights are too large."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on a machine under an engine's rules."""

    rules: Rules
    shape: ModelShape
    weights: int
    machine: Machine
    wishes: Wishes
    dtype: str
    switches: Switches
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
            tensor_parallel=machine.tensor_parallel,
            pipeline_parallel=machine.pipeline_parallel,
            prefix_caching=switches.prefix_caching,
            sparse=self.wishes.kv_cache_dtype == "fp8_ds_mla",
            hybrid=switches.hybrid and rules.keeps_windows_small,
        )

    @property
    def element(self) -> float:
        """Bytes of a number in the cache."""
        wish = self.wishes.kv_cache_dtype
        return (
            self.rules.cache_dtypes[wish] if wish not in {"", "auto"} else dtype_bytes(self.dtype)
        )

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
        """Return max_num_batched_tokens: the wish, else the engine's, no more than can come."""
        wish = self.wishes.max_num_batched_tokens
        chosen = wish or max(
            requests, min(self.rules.batched_tokens(self.machine), requests * tokens)
        )
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
        logits = requests * shape.vocab * (size + 8)
        fixed = _CPU_PROGRAM
        if machine.gpus:
            graphs = (
                min(1536 * MIB, 300 * MIB + 15 * MIB * shape.layers) if self.switches.graphs else 0
            )
            fixed = GIB + (GIB // 2 if tensor > 1 else 0) + graphs
        return activations + logits + fixed + self.switches.beside

    def budget(self, tokens: int, requests: int) -> tuple[int, int, float]:
        """Return (bytes for the cache, bytes held back, the engine's fraction), per GPU."""
        total, rules = self.machine.bytes_each, self.rules
        beside = self.weights_each + self.overhead(tokens, requests)
        fraction = self.wishes.gpu_memory_utilization or rules.fraction
        if not self.machine.gpus:
            margin = total // _MARGIN
            return total - margin - beside, margin, 0.0
        if rules.fraction_of == "free":
            free = total - beside
            room = int(free * fraction)
            return room, free - room, fraction
        if rules.fraction_of == "static":
            margin = total // _MARGIN
            most = (total - margin - self.overhead(tokens, requests)) / total
            chosen = math.floor(min(fraction, most) * 1000) / 1000
            return int(total * chosen) - self.weights_each, margin, chosen
        asked = math.ceil(total * fraction * rules.wiggle)
        margin = asked // _MARGIN
        return asked - margin - beside, margin, fraction

    def room(self, tokens: int, requests: int) -> int:
        """Return the bytes for the cache, per GPU; negative where not even the weights fit."""
        return self.budget(tokens, requests)[0]

    def fits(self, tokens: int, requests: int) -> bool:
        """Say whether so many requests of that length are in the cache together."""
        blocks = self.cache.number(self.room(tokens, requests)) - self.rules.null_block
        return 0 < self.blocks(tokens, requests) * requests <= blocks

    def longest(self, requests: int, most: int) -> int:
        """Return the longest request up to `most` that fits, in whole blocks below it; 0: none."""
        if self.fits(most, requests):
            return most
        step = max(16, self.cache.block)
        low, high = 0, -(-most // step)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(middle * step, requests) else (low, middle)
        return low * step

    def most(self, tokens: int, limit: int) -> int:
        """Return how many requests of that length fit, up to `limit`; 0: none."""
        low, high = 0, limit + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(tokens, middle) else (low, middle)
        return low


_CPU_PROGRAM = 3 * GIB // 2
"""Python, torch and the engine on a CPU, before it has loaded anything (an estimate)."""


def plan_paged(
    config: Mapping[str, Json],
    weight_bytes: int,
    wishes: Wishes,
    rules: Rules,
    switches: Switches | None = None,
) -> tuple[ServingPlan, Case]:
    """Return the plan for a model of `weight_bytes`, without the engine's settings, and its case.

    `auto` takes the longest request that fits, up to the model's own length, for as many requests
    as are wished; then as many requests as fit. Raises InputRefused for a lying config.json and
    UsageError for a wish that cannot be, with the nearest that can.
    """
    case = make_case(config, weight_bytes, wishes, rules, switches or Switches())
    tokens = _tokens(case)
    requests = wishes.max_num_seqs or case.most(tokens, rules.most_requests(case.machine)) or 1
    if wishes.max_num_batched_tokens and wishes.max_num_batched_tokens < requests:
        raise UsageError(
            f"max_num_batched_tokens {wishes.max_num_batched_tokens} is less than max_num_seqs"
            f" {requests}: each request takes at least one token of a batch",
            hint=f"nearest: max_num_batched_tokens {requests}",
        )
    plan = _plan(case, tokens, requests)
    if not plan.fits:
        raise _too_much(case, plan)
    return plan, case


def make_case(
    config: Mapping[str, Json],
    weight_bytes: int,
    wishes: Wishes,
    rules: Rules,
    switches: Switches,
) -> Case:
    """Return the checked case; raises as `plan_paged`."""
    shape = ModelShape.from_config(config)
    machine = machine_for(wishes, shape)
    if not machine.gpus and not rules.runs_on_cpu:
        raise UsageError(
            f"{rules.name} needs a GPU",
            hint="set serve.gpu (such as nvidia-l4), or choose a llamacpp target for a CPU",
        )
    if machine.pipeline_parallel > 1 and not rules.splits_by_layers:
        fitting = [n for n in range(1, machine.gpus + 1) if can_split(shape, n)]
        raise UsageError(
            f"{rules.name} cannot spread this model over {machine.gpus} GPUs: its {shape.heads}"
            " heads do not divide, and it does not split by layers",
            hint=f"nearest: gpu_count {max(fitting)}",
        )
    dtype, note = choose_dtype(shape, machine, wishes.dtype)
    _check_cache_dtype(rules, machine, dtype, wishes.kv_cache_dtype)
    _check_fraction(wishes)
    notes = [said for said in (note, check_architecture(shape, config)) if said]
    if wishes.gpu_memory_bytes and machine.gpu is None:
        notes.append("a GPU without a name: its number formats are not checked")
    if not shape.max_positions:
        notes.append("config.json gives no length")
    if not rules.keeps_windows_small and any(p.kind in {"sliding", "chunked"} for p in shape.cache):
        notes.append("layers with a window are planned at full length, which is never too little")
    if _shrinks(config, shape, wishes, dtype):
        notes.append(f"float32 weights are loaded as {dtype}: half of the files' size")
        weight_bytes //= 2
    return Case(
        rules=rules,
        shape=shape,
        weights=weight_bytes,
        machine=machine,
        wishes=wishes,
        dtype=dtype,
        switches=switches,
        limit=lengths(config, stretched=_stretched(wishes)),
        notes=tuple(notes),
    )


def _shrinks(config: Mapping[str, Json], shape: ModelShape, wishes: Wishes, dtype: str) -> bool:
    """Say whether a float32 checkpoint is served in 16 bits; it must say that it is one."""
    parts = [config, config.get("text_config") or {}]
    stated = any(name in part for part in parts for name in ("dtype", "torch_dtype"))
    return (
        stated and (wishes.format, shape.dtype) == (SAFETENSORS, "float32") and dtype != "float32"
    )


def _stretched(wishes: Wishes) -> bool:
    return any(key.replace("_", "-") in {"hf-overrides", "rope-scaling"} for key in wishes.extra)


def _check_cache_dtype(rules: Rules, machine: Machine, dtype: str, wish: str) -> None:
    if wish in {"", "auto"}:
        return
    if wish not in rules.cache_dtypes:
        raise UsageError(
            f"kv_cache_dtype {wish}: {rules.name} has no such type",
            hint=f"one of auto, {', '.join(rules.cache_dtypes)}",
        )
    if wish in {"float16", "bfloat16"} and wish != dtype:
        raise UsageError(
            f"kv_cache_dtype {wish} is not the model's {dtype}",
            hint="leave it out, or set an 8-bit type",
        )
    # E4M3 in hardware came with compute capability 8.9; E5M2 is converted from 8.0 on.
    card = machine.gpu
    needs = (8, 0) if wish == "fp8_e5m2" else (8, 9)
    if card and wish.startswith("fp8") and not card.fp8 and card.compute_capability < needs:
        raise UsageError(
            f"kv_cache_dtype {wish} needs compute capability {needs[0]}.{needs[1]}, {card.name} has"
            f" {card.compute_capability[0]}.{card.compute_capability[1]}",
            hint="leave it out, or choose an L4, L40S, H100 or later",
        )


def _check_fraction(wishes: Wishes) -> None:
    if wishes.gpu_memory_utilization and not 0.05 <= wishes.gpu_memory_utilization <= 0.99:
        raise UsageError(
            f"gpu_memory_utilization {wishes.gpu_memory_utilization}: outside 0.05 to 0.99",
            hint="it is a fraction of one GPU's memory, such as 0.9",
        )


def _tokens(case: Case) -> int:
    """Return max_model_len: the wish, else the longest that fits; at least one block."""
    wish, limit = case.wishes.max_model_len, case.limit
    if wish is None:
        return case.longest(case.wishes.max_num_seqs or 1, limit.default) or min(16, limit.default)
    if wish > limit.most:
        raise UsageError(
            f"max_model_len {wish} is longer than the model's {limit.most} positions",
            hint=f"nearest: max_model_len {limit.most}",
        )
    return wish


def _plan(case: Case, tokens: int, requests: int) -> ServingPlan:
    machine, cache = case.machine, case.cache
    room, margin, fraction = case.budget(tokens, requests)
    gpus, tensor = max(1, machine.gpus), machine.tensor_parallel
    need = case.blocks(tokens, requests) * cache.bytes_per_block
    overhead = case.overhead(tokens, requests)
    # A further token takes a part of a block in the layers that keep every token.
    growing = [group.count for group in cache.groups if group.kind == "full"]
    count = sum(growing) or sum(g.count for g in cache.groups if g.kind != "state")
    fits = case.fits(tokens, requests)
    return ServingPlan(
        device=machine.device,
        gpus=machine.gpus,
        max_model_len=tokens,
        max_num_seqs=requests,
        max_num_batched_tokens=case.batched(tokens, requests),
        max_concurrency=_floored(
            cache.concurrency(max(0, room), tokens, case.inflight(tokens, requests))
        ),
        weight_bytes=case.weights,
        weights_bytes_per_gpu=case.weights_each,
        kv_bytes_per_token=_growth(case, count) * tensor,
        kv_bytes_per_request=need * gpus,
        kv_bytes_total=need * gpus * requests,
        kv_cache_bytes=max(0, room),
        overhead_bytes=overhead * gpus,
        usable_bytes=(case.weights_each + overhead + max(0, room)) * gpus,
        margin_bytes=margin,
        host_bytes=_host_bytes(case, need * requests, overhead),
        shm_bytes=2 * GIB if machine.gpus > 1 else 0,
        gpu_memory_utilization=fraction if machine.gpus else None,
        tensor_parallel_size=tensor,
        pipeline_parallel_size=machine.pipeline_parallel,
        gpu_layers=case.shape.layers if machine.gpus else 0,
        fits=fits,
        notes=(*case.notes, *_lowered(case, fraction)),
    )


def _lowered(case: Case, fraction: float) -> tuple[str, ...]:
    wish = case.wishes.gpu_memory_utilization
    if not wish or fraction >= wish:
        return ()
    return (f"gpu_memory_utilization {fraction} instead of {wish}: activations need the rest",)


def _growth(case: Case, groups: int) -> int:
    """Return the bytes of a token in the growing layers of all pipeline stages, on one shard."""
    cache, stages = case.cache, case.machine.pipeline_parallel
    if stages == 1:
        return groups * cache.bytes_per_block // cache.block
    whole = replace(case, machine=replace(case.machine, pipeline_parallel=1))
    return groups * whole.cache.bytes_per_block // whole.cache.block


def _host_bytes(case: Case, cache: int, overhead: int) -> int:
    if not case.machine.gpus:
        return case.weights + cache + case.cache.bytes_per_block + overhead
    # The files' pages while they are copied, and a process per GPU.
    return case.weights + 4 * GIB + 2 * GIB * case.machine.gpus


def _floored(number: float) -> float:
    return math.floor(number * 100) / 100


def _too_much(case: Case, plan: ServingPlan) -> UsageError:
    ways = alternatives(case, plan)
    told = replace(plan, nearest=ways)
    where = f"{plan.device}" + (f" x {plan.gpus}" if plan.gpus > 1 else "")
    gpus = max(1, plan.gpus)
    each = " per GPU" if plan.gpus > 1 else ""
    return UsageError(
        f"max_model_len {plan.max_model_len} x max_num_seqs {plan.max_num_seqs} does not fit on"
        f" {where}{each}: weights {human(plan.weights_bytes_per_gpu)}, other"
        f" {human(plan.overhead_bytes // gpus)}, {human(plan.kv_cache_bytes)} are left for a cache"
        f" of {human(plan.kv_bytes_total // gpus)}",
        hint=f"nearest that fits: {'; or '.join(texts)}"
        if (texts := [str(way["text"]) for way in ways])
        else "nothing near fits, up to 16 GPUs of this kind: choose a smaller model",
        details={"plan": told},
    )
