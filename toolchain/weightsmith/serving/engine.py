"""What an engine is: one frozen value per file of this folder, found by listing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from weightsmith.core.errors import UsageError
from weightsmith.core.values import SAFETENSORS, Format, JsonValue, Tree
from weightsmith.models.facts import ModelFacts
from weightsmith.models.gguf_config import projector_of
from weightsmith.serving.plan import ServingPlan
from weightsmith.serving.speculation import Speculation


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedAdapter:
    """A LoRA adapter that is served unmerged, with its base."""

    name: str
    """What clients ask for."""
    folder: str
    """Below the model's folder in the image."""
    rank: int
    matrices: int = 0
    """Matrices of the base that it changes; the experts of a layer are one."""
    weight_bytes: int = 0
    """Its weights as the engine loads them."""
    uri: str = ""
    """Where a cluster finds the same files, as KServe spells it; empty for a folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """The user's serving options; None, 0 and "" stand for `auto`."""

    gpu: str = ""
    gpu_count: int = 1
    gpu_memory_bytes: int = 0
    host_memory_bytes: int = 0
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_dtype: str = ""
    dtype: str = ""
    tensor_parallel_size: int = 0
    pipeline_parallel_size: int = 0
    gpu_memory_utilization: float = 0.0
    served_model_name: str = ""
    tool_parser: str = ""
    """`none`, or the engine's name of one."""
    reasoning_parser: str = ""
    adapters: tuple[ServedAdapter, ...] = ()
    """Served unmerged, for formats that do not merge them."""
    projector_bytes: int = 0
    """Bytes of the weights that are a projector for pictures."""
    format: Format = SAFETENSORS
    """The target's, not the user's: what the weights are packed in."""
    group_size: int = 0
    """Not the user's either: inputs per scale of integers that will be made; 0 for other weights.
    """
    speculation: Speculation | None = None
    manifests: tuple[str, ...] = ()
    """More of them, for Kubernetes: names of files in `templates/manifests/`."""
    extra: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model as it lies in the image and as clients ask for it."""

    path: str
    """Absolute, in the image: the folder, or the GGUF file."""
    name: str
    projector: str = ""
    """Absolute path of the file that lets it read pictures; empty if there is none."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Served name -> absolute path in the image."""
    startup_seconds: int
    """How long the server may take to start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Projector:
    """The file beside a GGUF model's that its server needs to read pictures."""

    file: str = ""
    """Relative to the model's folder; empty while there is none yet."""
    size: int
    """Bytes."""


def projector_in(tree: Tree) -> Projector | None:
    """Return the projector among a model's files."""
    name = projector_of(file.path for file in tree.files)
    return next((Projector(file=name, size=f.size) for f in tree.files if f.path == name), None)


OFFLINE: Mapping[str, str] = {
    "HOME": "/tmp",  # noqa: S108  # the one place that is writable in a read-only container
    "USER": "model",  # torch asks for a name where the user's number has none
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}
"""What engines in Python have in their environment: offline, writing below /tmp only."""


def checked_name(model: ServedModel) -> str:
    """Return the served name; raise UsageError for one that an argument parser takes otherwise."""
    name = model.name
    if name.startswith("-") or not name.strip() or not name.isprintable():
        raise UsageError(
            f"the served name {name!r} would be read as an option, or not at all",
            hint="choose a name of letters, digits, dots and dashes",
        )
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBase:
    """The image below the weights."""

    cpu: str
    """Reference, or `engine:NAME` for a folder of `images/engines/` that we assemble ourselves."""
    gpu: str
    """Upstream reference, pinned by `images/bases.lock`."""
    rocm: str = ""
    """The same for AMD's GPUs."""
    stock_cpu: str = ""
    """Upstream's own image for CPUs, to run beside a volume of weights; empty if there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertKernel:
    """A kernel for quantized experts that an engine has on CPUs with AMX."""

    name: str
    architectures: frozenset[str]
    """Models that choose experts in a way that it takes."""
    hidden: int = 1
    """What the hidden size must be a multiple of."""
    width: int = 1
    """The same of an expert's intermediate size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """What an engine needs to load one format."""

    capability: tuple[int, int]
    """The least compute capability of an NVIDIA GPU that it starts on."""
    before: tuple[int, int] = (99, 0)
    """The least one for which it has no kernel any more."""
    cpu: bool = False
    """Whether its build for CPUs has a kernel."""
    amx: bool = False
    """Whether that build has one on CPUs with AMX alone."""
    cpu_experts: str = ""
    """Where that build says that it has no such kernel for experts; empty if it has one."""
    amx_experts: ExpertKernel | None = None
    """The one that it has on CPUs with AMX alone."""
    cpu_adapters: str = ""
    """Where that build says that its layers take no adapters beside them; empty if they do."""
    amd: bool = True
    """Whether its build for AMD's GPUs has a kernel."""
    source: str
    """The file and name that say so, in the engine's package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A serving engine: what it loads, how it is planned, started and asked."""

    name: str
    title: str
    """For people."""
    accepts: frozenset[str]
    """Kinds of Format (`gguf`, `safetensors`, `awq` …)."""
    layouts: frozenset[str] = frozenset()
    """Of compressed-tensors' layouts of integers, those that it loads with zero points, too."""
    base: EngineBase
    port: int
    health_path: str
    tells_size: bool = False
    """Whether its list of models says how many bytes their weights have."""
    plan: Callable[[ModelFacts, int, ServeOptions], ServingPlan]
    """(model, weight bytes, options) -> plan; raises UsageError for what does not fit."""
    env: Callable[[ServingPlan, ServedModel], Mapping[str, str]]
    """(plan, model) -> environment of the process."""
    entrypoint: tuple[str, ...]
    command: Callable[[ServingPlan, ServedModel], tuple[str, ...]]
    file_settings: Callable[[ServingPlan, ServedModel], Mapping[str, JsonValue]] = field(
        default=lambda _plan, _model: {}
    )
    """(plan, model) -> what the engine's own file says, for its template."""
    python: str = ""
    """The Python in its image that has numpy; empty if none has."""
    model_dir: str = "/models"
    image_files: Mapping[str, str] = field(default_factory=dict)
    """Absolute path in the image -> template name in the engine's template folder."""
    key_variable: str = ""
    """The variable that sets a password, for manifests to take from a secret."""
    port_variable: str = ""
    """The variable that moves the port."""
    host_variable: str = ""
    """The variable that says which address it listens on."""
    threads_variable: str = ""
    """The variable for its number of threads, where it would count the machine's CPUs itself."""
    drains: bool = False
    """Whether upstream's server lets running requests end after SIGTERM without being told to."""
    drain_setting: str = ""
    """The setting that tells it to."""
    neutral_settings: frozenset[str] = frozenset()
    """Settings of a plan that change no answer: slots, total context, threads."""
    adapter_fields: Callable[[int], Mapping[str, JsonValue]] | None = None
    """(adapter's number) -> request fields that choose it; None where its name is the model's."""
    has_parsers: bool = False
    """Whether `serve.tool_parser` and `serve.reasoning_parser` choose how it reads answers."""
    pictures: tuple[str, ...] = ("png", "jpeg", "webp")
    """Formats of the pictures that it reads, of those that a question may have."""
    lacks: Callable[[ModelFacts], str] = field(
        default=lambda _model: "is planned here as a server that continues text alone"
    )
    """Why it does not serve a model that does not chat; "" if it does."""
    speculates: frozenset[str] = frozenset()
    """Methods of `serve.speculative` that it has."""
    drafts_unplanned: Mapping[str, str] = field(default_factory=dict)
    """Further methods that its program has -> what they lack here."""
    draft_counters: tuple[str, ...] = ()
    """Prometheus counters of steps with drafts, of drafted and of accepted tokens; () for none."""
    draft_length: str = ""
    """Prometheus gauge of the tokens of a step, of an engine without such counters."""
    undrafted: tuple[Mapping[str, str], tuple[str, ...]] = field(default_factory=lambda: ({}, ()))
    """Environment and further arguments that start an image without its drafts; both empty where
    nothing does."""
    most_apart: int = 0
    """By how many rows it lets the embeddings of a model and its draft differ."""
    reads_calls: bool = False
    """Whether it finds out by itself how the chat template words tool calls."""
    test_arguments: tuple[str, ...] = ()
    """Let this project's image of it read tokens back with its parser for calls, in a test."""
    load_metrics: tuple[str, ...] = ()
    """Prometheus gauges of requests that run and of those that wait; empty where it has none."""
    can_be_picked: bool = False
    """Whether a Gateway's endpoint picker reads its metrics as they are."""
    probe_seconds: int = 3
    """How long a health probe may take."""
    fixed_name: str = ""
    """The model's name at the server, where nothing can change it."""
    legacy: str = ""
    """Why one should choose another engine, or empty."""
    support: Mapping[str, Support] = field(default_factory=dict)
    """Name or kind of a Format -> what loading it needs; formats without a row are not checked."""
    expert_adapters: str = ""
    """Where its build for CPUs says that models with experts take no adapters; empty if they do."""
    support_versions: Mapping[str, str] = field(default_factory=dict)
    """`cpu` and `gpu` -> the pinned version, whose source the rows of `support` were read from.

    A test fails when a pin changes: then read the files that the rows name again.
    """

    def lets_requests_end(self, plan: ServingPlan) -> bool:
        """Return whether upstream's server, as planned, answers what is running after SIGTERM."""
        return self.drains or bool(plan.settings.get(self.drain_setting))
