"""Plans llama-server's memory: how long a request may be, how many at once, on which device.

The guarantee is strict: every slot owns its share of the cache, so `max_num_seqs` requests of
`max_model_len` tokens run together and none is cut off (`-np N -c pad256(L)*N --no-kv-unified`).
The cache is exact; everything else except the weights is an estimate. Bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.values import JsonValue
from weightsmith.models.facts import ModelFacts, Vision
from weightsmith.models.shape import CacheLayers, ModelShape
from weightsmith.serving.architectures import check_architecture
from weightsmith.serving.auto import Fitting, choices, choose_length, rule, usable
from weightsmith.serving.devices import CPU, named_gpu
from weightsmith.serving.engine import ServeOptions
from weightsmith.serving.llamacpp_options import extra_options
from weightsmith.serving.memory import MIB, host_memory, human
from weightsmith.serving.plan import ServingPlan
from weightsmith.serving.pooling import (
    keeps_cache,
    llamacpp_settings,
    notes_of,
    pooling_of,
    require_no_cache_type,
)
from weightsmith.serving.speculation import Speculation

_AUTO_SLOTS = 4
_MANY_SLOTS = 64
_UNKNOWN_LENGTH = 4096
_SPLIT_LENGTH = 4096
_BATCH = 2048
_UBATCH = 512
"""Its default of tokens computed together."""
_MARGIN = 20
"""One part in twenty of the memory stays free: for the system, and for what is estimated."""
_PROGRAM = 32 * MIB
"""The process and its requests on a CPU (17 to 24 MiB measured)."""
_WORD = 448
"""Each token of the vocabulary, with its merges (320 to 410 bytes measured)."""
_OF_THE_CACHE = frozenset({"cache-type-k", "cache-type-v", "cache-ram"})
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


def plan(model: ModelFacts, weight_bytes: int, options: ServeOptions) -> ServingPlan:
    """Return the plan for a model of `weight_bytes` on the machine that the options name.

    `auto` for the length takes the longest that fits, up to the model's own, for as many requests
    as the options say, or as `choose_length` says; `auto` for requests takes up to four. Raises
    InputRefused for numbers in config.json that are wrong, and UsageError for options that do not
    fit, with the nearest that do.
    """
    shape = model.shape
    if shape.layer_types and not any("attention" in kind for kind in shape.layer_types):
        raise InputRefused(
            f"{shape.architecture} has no attention layer: its cache cannot be planned",
            hint="choose a decoder with attention",
        )
    extra = _with_options(extra_options(options.extra), options)
    require_no_cache_type(model, options.kv_cache_dtype)
    capacity = _capacity(model, weight_bytes, options, extra)
    said = check_architecture(model) if keeps_cache(model) else ""
    tokens, slots, limit = _choose(capacity, options, extra)
    _check_batches(capacity, tokens, extra)
    notes = _notes(model, capacity, options, tokens, said)
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
    if model.task.kind != "generate":
        notes += notes_of(model, normalizes=True)
        extra = {**llamacpp_settings(model), **extra}
    return replace(_result(capacity, tokens, slots, layers, extra, notes), choices=rows)


def _check_batches(capacity: LlamaCppCapacity, tokens: int, extra: Mapping[str, JsonValue]) -> None:
    """Refuse batches that are smaller than a text that must be in one."""
    for option in ("batch-size", "ubatch-size"):
        if capacity.whole and _whole(extra, option, tokens, least=1) < tokens:
            raise UsageError(
                f"{option} {extra[option]}: a text of {tokens} tokens is computed in one batch",
                hint=f"leave it out, or set serve.max_model_len to {extra[option]}",
            )


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
        found |= {"batch-size": batch, "ubatch-size": min(_UBATCH, batch)}
    return {**found, **extra}


def _choose(
    capacity: LlamaCppCapacity, options: ServeOptions, extra: Mapping[str, JsonValue]
) -> tuple[int, int, int]:
    """Return (tokens, slots, the longest request that the model allows)."""
    limit, tokens = capacity.shape.max_positions or _UNKNOWN_LENGTH, options.max_model_len
    if tokens is None:
        if slots := options.max_num_seqs:
            tokens = capacity.longest(slots, limit)
        else:
            tokens = choose_length(capacity, limit, _AUTO_SLOTS)
        if capacity.machine.gpus:  # one that cannot hold everything has as many layers as it can
            tokens = max(tokens, min(_SPLIT_LENGTH, limit))
        tokens = usable(tokens, limit)
    elif tokens > limit:
        stretched = any(option.startswith(("rope-", "yarn-")) for option in extra)
        if capacity.shape.max_positions and not stretched:
            raise UsageError(
                f"max_model_len {tokens} is longer than the model's {limit} positions",
                hint=f"nearest: max_model_len {limit}; or stretch the positions with"
                " serve.extra.rope-scale or serve.extra.yarn-orig-ctx",
            )
        limit = tokens
    slots = options.max_num_seqs or capacity.most_requests(tokens, _AUTO_SLOTS) or 1
    return tokens, slots, limit


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
    return "; or ".join(str(way["text"]) for way in _ways(capacity, tokens, slots))


def _notes(
    model: ModelFacts, capacity: LlamaCppCapacity, options: ServeOptions, tokens: int, assumed: str
) -> list[str]:
    shape, notes = model.shape, list[str]()
    if not shape.max_positions:
        notes.append(f"config.json gives no length: {_UNKNOWN_LENGTH} tokens are assumed")
    if not capacity.cached:
        return notes
    if shape.sliding_window and not sliding_layers(shape):
        notes.append("sliding layers are planned at full length, which is never too little")
    if sliding_layers(shape) == shape.layers:
        notes.append(
            f"every layer slides: a request keeps its last {shape.sliding_window} tokens and those"
            " of a step, and grows by nothing beyond them"
        )
    notes += [assumed] if assumed else []
    if capacity.projector:
        notes.append(
            f"the server reads pictures: a projector of {human(capacity.projector)} lies beside the"
            f" model, and a picture takes up to {human(capacity.picture(tokens))} more (an"
            " estimate)"
        )
    elif model.sees_images:
        notes.append(
            "the server reads text only: the pinned llama.cpp has no projector for"
            f" {model.architecture}, or the model has no preprocessor_config.json"
        )
    if options.adapters:
        weights = human(sum(adapter.weight_bytes for adapter in options.adapters))
        graph = f", and a graph that has room for all of them {human(capacity.graph)} (an estimate)"
        on_cpu = "" if capacity.machine.gpus else graph
        count = len(options.adapters)
        notes.append(f"{count} adapter(s) are loaded: their weights take {weights}{on_cpu}")
    return notes


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
        **_speculative(capacity.drafts, capacity.machine.gpus),
    }
    if capacity.pools:  # the server lowers the first to the second
        settings |= dict.fromkeys(("batch-size", "ubatch-size"), capacity.batch(tokens))
    if not capacity.cached:
        settings = {key: value for key, value in settings.items() if key not in _OF_THE_CACHE}
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
        max_concurrency=room // (kv // slots) if kv else slots,
        weight_bytes=capacity.weights,
        weights_bytes_per_gpu=-(-capacity.weights // gpus),
        kv_bytes_per_token=capacity.growth,
        kv_bytes_per_request=kv // slots,
        kv_bytes_total=kv,
        kv_cache_bytes=room // gpus if kv else 0,
        overhead_bytes=overhead,
        usable_bytes=machine.usable,
        margin_bytes=machine.held_back // gpus,
        host_bytes=capacity.weights + kv + overhead,
        pipeline_parallel_size=gpus,
        gpu_layers=gpu_layers,
        fits=fits,
        nearest=None if fits else tuple(_ways(capacity, tokens, slots)),
        settings={**settings, **extra},
        notes=tuple(notes),
    )


def _speculative(wanted: Speculation | None, gpus: int) -> dict[str, JsonValue]:
    """Return llama-server's options (docs/speculative.md of llama.cpp)."""
    if wanted is None:
        return {}
    if wanted.draft:
        layers = wanted.draft.shape.layers + 1 if gpus else 0
        return {
            "spec-type": "draft-simple",
            "spec-draft-model": wanted.path,
            "spec-draft-n-max": wanted.tokens,
            "n-gpu-layers-draft": layers,
        }
    return {
        "spec-type": "ngram-simple",
        "spec-ngram-simple-size-n": 3,  # tokens that must be found again
        "spec-ngram-simple-size-m": wanted.tokens,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledMachine:
    """Memory of all devices together; `gpus` is 0 for a CPU."""

    device: str
    gpus: int
    usable: int
    held_back: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCppCapacity(Fitting):
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
    cached: bool = True
    """Whether it keeps keys and values: encoders do not."""
    pools: bool = False
    """Whether it gives vectors or scores."""
    whole: bool = False
    """Whether a text must be in one micro-batch (`can_split` in server-context.cpp)."""
    drafts: Speculation | None = None
    adapted: int = 0
    """Matrices of all adapters that are served beside the model; their weights are in `weights`."""

    @property
    def growth(self) -> int:
        """One token in all layers of the cache that keep every token."""
        if not self.cached:
            return 0
        drafted = growth_bytes(self.drafting, ("f16", "f16")) if self.drafting else 0
        return growth_bytes(self.shape, (self.type_k, self.type_v)) + drafted

    def kv(self, tokens: int, slots: int) -> int:
        """Return the cache of so many slots of that length."""
        if not self.cached:
            return 0
        types = self.type_k, self.type_v
        own = kv_cache_bytes(self.shape, tokens, slots, types, self.ubatch)
        if draft := self.drafting:  # whose context has as many slots of the same length
            own += kv_cache_bytes(draft, tokens, slots, ("f16", "f16"), self.ubatch)
        return own

    @property
    def drafting(self) -> ModelShape | None:
        """The shape of the model that drafts."""
        return self.drafts.draft.shape if self.drafts and self.drafts.draft else None

    def batch(self, tokens: int) -> int:
        """Return the tokens that are computed together, for texts of up to so many."""
        return max(self.ubatch, padded(tokens)) if self.whole else self.ubatch

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
        if not self.cached:  # a mask over the whole batch, in float32 first
            per_token += 4 * self.batch(tokens)
        drafted = self.drafts.tokens if self.drafts else 0  # each has logits, too
        compute = self.batch(tokens) * per_token + 8 * slots * (1 + drafted) * shape.vocab
        if draft := self.drafting:
            wide = 4 * (2 * draft.intermediate + 8 * draft.hidden) + 2 * padded(tokens)
            compute += self.batch(tokens) * wide + 8 * slots * draft.vocab
        gpus = self.machine.gpus
        if not gpus:
            return self.program + compute + self.graph + self.picture(tokens) + self.host_cache
        # Layers are whole: with several GPUs one may hold a layer more than its share.
        layer, picture = (self.weights - self.projector) // shape.layers, self.picture(tokens)
        widened = 0
        if (self.type_k, self.type_v) != ("f16", "f16"):
            # CUDA's flash attention widens one layer of a packed cache to float16 at a time.
            widened = padded(tokens) * slots * kv_layer_bytes(shape, "f16", "f16")
        uneven = (gpus - 1) * (layer + self.projector + picture)
        return gpus * (_CUDA + compute) + widened + picture + uneven

    @property
    def program(self) -> int:
        """What the process takes in the host's memory beside all that depends on requests.

        An estimate, compared with what llama-server 0c1e57098 held on a CPU for vocabularies of
        50,257 to 262,144 tokens, and never below it there.
        """
        return _PROGRAM + _WORD * (self.shape.vocab + (self.drafting.vocab if self.drafting else 0))

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

    def needs(self, tokens: int, slots: int) -> int:
        """Return weights, cache and all else."""
        return self.weights + self.kv(tokens, slots) + self.overhead(tokens, slots)

    @property
    def step(self) -> int:
        """What llama.cpp rounds lengths up to."""
        return KV_PADDING

    def fits(self, tokens: int, slots: int) -> bool:
        """Say whether so many requests of that length run together."""
        return self.needs(tokens, slots) <= self.machine.usable


def _capacity(
    model: ModelFacts, weights: int, options: ServeOptions, extra: Mapping[str, JsonValue]
) -> LlamaCppCapacity:
    shape, projector = model.shape, options.projector_bytes
    flash = str(extra.get("flash-attn", "on")).lower() not in {"off", "false", "0", "disabled"}
    type_v = str(extra.get("cache-type-v", "f16"))
    if not flash and type_v not in {"f16", "bf16", "f32"}:
        raise UsageError(
            f"cache type {type_v} for V needs flash attention", hint="leave flash-attn out"
        )
    cached, pools = keeps_cache(model), model.task.kind != "generate"
    whole = pools and not (cached and pooling_of(model) == "lasttoken")
    if str(extra.get("swa-full", "off")).lower() not in {"off", "false", "0", "disabled"}:
        shape = replace(shape, sliding_window=0)
    return LlamaCppCapacity(
        shape=shape,
        weights=weights + (options.speculation.weight_bytes if options.speculation else 0),
        machine=_machine(options),
        type_k=str(extra.get("cache-type-k", "f16")),
        type_v=type_v,
        ubatch=_whole(extra, "ubatch-size", _UBATCH, least=1),
        flash=flash,
        host_cache=_whole(extra, "cache-ram", 0, least=0) * MIB,
        projector=projector,
        tower=model.matrices.vision if projector else Vision(),
        cached=cached,
        pools=pools,
        whole=whole,
        drafts=options.speculation,
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
        gpus, usable = options.gpu_count, total - held
        return PooledMachine(device=device, gpus=gpus, usable=usable, held_back=held)
    total = options.host_memory_bytes or host_memory()
    held, device = total // _MARGIN, options.gpu or CPU
    return PooledMachine(device=device, gpus=0, usable=total - held, held_back=held)


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


def _ways(capacity: LlamaCppCapacity, tokens: int, slots: int) -> list[dict[str, JsonValue]]:
    both: dict[str, JsonValue] = {"max_model_len": tokens, "max_num_seqs": slots}
    found: list[dict[str, JsonValue]] = []
    if shorter := capacity.longest(slots, tokens):
        text = f"max_model_len {shorter} with {slots} at once"
        found.append({"text": text, **both, "max_model_len": shorter})
    if fewer := capacity.most_requests(tokens, slots):
        text = f"max_num_seqs {fewer} at {tokens}"
        found.append({"text": text, **both, "max_num_seqs": fewer})
    packed, longer = replace(capacity, type_k="q8_0", type_v="q8_0"), 0
    try:
        if (
            capacity.flash
            and capacity.cached
            and packed.kv(KV_PADDING, 1) < capacity.kv(KV_PADDING, 1)
        ):
            longer = packed.longest(slots, tokens)
    except UsageError:
        pass  # its blocks do not divide the heads
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


_KV_TYPES: dict[str, tuple[int, int]] = {
    "f32": (4, 1),
    "f16": (2, 1),
    "bf16": (2, 1),
    "q8_0": (34, 32),
    "q5_0": (22, 32),
    "q5_1": (24, 32),
    "q4_0": (18, 32),
    "q4_1": (20, 32),
    "iq4_nl": (18, 32),
}
"""Cache type -> (bytes, elements) of one block; ggml/src/ggml-common.h of llama.cpp."""

KV_PADDING = 256
"""llama.cpp rounds the context of a slot up to this many tokens (src/llama-context.cpp)."""

# Models whose sliding layers get the small cache in llama.cpp (src/models/*.cpp set swa_type), and
# the period by which every last layer is full whatever config.json lists, since its converter
# writes none down; for all others every layer is planned at full length, never too little.
_PERIODS = {
    "Cohere2ForCausalLM": 4,
    "Gemma2ForCausalLM": 2,
    "Gemma3ForCausalLM": 6,
    "Gemma3ForConditionalGeneration": 6,
    "GptOssForCausalLM": 2,
}

_LISTED = ("Gemma4For", "Gemma4UnifiedFor")
"""Beginnings of models whose sliding layers llama.cpp takes from config.json's list; their heads
may differ from those of full layers, and layers that share another's cache have none."""


def padded(tokens: int) -> int:
    """Return the tokens that llama.cpp allocates for a slot of that length."""
    return -(-tokens // KV_PADDING) * KV_PADDING


def kv_layer_bytes(
    shape: ModelShape, type_k: str, type_v: str, layer: CacheLayers | None = None
) -> int:
    """Return the bytes that one token takes in one layer of llama.cpp's cache.

    `layer` says which layers, where these differ.

    `kv_heads * (head_dim * k + v_head_dim * v)`, with the bytes per element of the two types;
    for multi-head latent attention one row of `kv_lora_rank + rope_head_dim` and no values
    (src/llama-kv-cache.cpp). Raises UsageError for a type that does not divide the heads.
    """
    if shape.latent_cache:
        return _row(shape.kv_lora_rank + shape.rope_head_dim, type_k, "K")
    own, width = (layer.kv_heads, layer.head_dim) if layer else (0, 0)
    heads = own or shape.kv_heads
    keys = heads * _row(width or shape.head_dim, type_k, "K")
    return keys + heads * _row(width or shape.v_head_dim, type_v, "V")


def kv_cache_bytes(
    shape: ModelShape, tokens: int, slots: int, types: tuple[str, str], ubatch: int
) -> int:
    """Return llama.cpp's whole cache for `slots` requests of up to `tokens` each.

    `types` are those of keys and of values.

    Full layers hold every token of a slot; sliding layers hold window + ubatch
    (src/llama-kv-cache-iswa.cpp); both are padded to 256. Recurrent layers hold a state in float32
    for each slot (src/llama-memory-recurrent.cpp).
    """
    window = padded(min(padded(tokens), shape.sliding_window + ubatch))
    kept = {"sliding": window, "full": padded(tokens)}
    return slots * (
        sum(
            part.layers * kept[part.kind] * kv_layer_bytes(shape, *types, part)
            for part in _parts(shape)
        )
        + _state_bytes(shape)
    )


def growth_bytes(shape: ModelShape, types: tuple[str, str]) -> int:
    """Return the bytes that a request grows by with each token."""
    return sum(
        part.layers * kv_layer_bytes(shape, *types, part)
        for part in _parts(shape)
        if part.kind == "full"
    )


def _parts(shape: ModelShape) -> list[CacheLayers]:
    """Return the layers with a cache as llama.cpp keeps them, each full or sliding."""
    if shape.architecture.startswith(_LISTED):
        return [part for part in shape.cache if part.kind in {"full", "sliding"}]
    sliding = sliding_layers(shape)
    full = attention_layers(shape) - sliding
    return [CacheLayers(kind="full", layers=full), CacheLayers(kind="sliding", layers=sliding)]


def attention_layers(shape: ModelShape) -> int:
    """Return the layers that keep tokens; all of them where a state's size is not known."""
    if not _state_bytes(shape):
        return shape.layers
    return sum(part.layers for part in shape.cache if part.kind != "state")


def _state_bytes(shape: ModelShape) -> int:
    """Return what all recurrent layers keep for one slot; 0 without any, or if it is not known."""
    states = [part for part in shape.cache if part.kind == "state"]
    return 4 * sum(part.layers * (part.convolved + part.recurrent) for part in states)


def sliding_layers(shape: ModelShape) -> int:
    """Return the layers that have the small cache in llama.cpp.

    Raises InputRefused for a model whose layers slide otherwise than llama.cpp computes them.
    """
    if shape.architecture.startswith(_LISTED):
        return sum(part.layers for part in shape.cache if part.kind == "sliding")
    period = _PERIODS.get(shape.architecture)
    if not period or not shape.sliding_window:
        return 0
    slides = [layer % period < period - 1 for layer in range(shape.layers)]
    listed = [kind == "sliding_attention" for kind in shape.layer_types]
    if listed and not any(listed):
        return 0
    if listed and listed != slides:
        raise InputRefused(
            f"config.json: layer_types of {shape.architecture} are not {period - 1} sliding and one"
            " full in turn, and llama.cpp computes no others",
            hint="choose a target of vLLM",
        )
    return sum(slides)


def _row(elements: int, kind: str, which: str) -> int:
    if kind not in _KV_TYPES:
        hint = f"one of: {', '.join(_KV_TYPES)}"
        raise UsageError(f"unknown cache type {kind!r} for {which}", hint=hint)
    size, block = _KV_TYPES[kind]
    if elements % block:
        raise UsageError(
            f"cache type {kind} packs {block} elements, which does not divide this model's"
            f" {which} head of {elements}",
            hint="choose f16 or bf16",
        )
    return elements // block * size
