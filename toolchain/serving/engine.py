"""What an engine is: one frozen value per file of this folder, found by listing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from toolchain.values import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the user asks of a serving plan; None stands for `auto`."""

    gpu: str = ""
    gpu_count: int = 1
    gpu_memory_bytes: int = 0
    host_memory_bytes: int = 0
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    extra: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPlan:
    """Memory worked out for one engine, model and machine; bytes throughout."""

    max_model_len: int
    max_num_seqs: int
    kv_bytes_per_token: int
    kv_bytes_total: int
    weight_bytes: int
    usable_bytes: int
    overhead_bytes: int
    gpu_layers: int
    """Layers on the GPU; 0 on CPU."""
    device: str
    """`cpu` or the GPU's name."""
    settings: Mapping[str, Json] = field(default_factory=dict)
    """Engine options that follow from the plan, in the engine's own names."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBase:
    """The image below the weights."""

    cpu: str
    """Reference, or `engine:NAME` for a folder of `images/engines/` that we assemble ourselves."""
    gpu: str
    """Upstream reference, pinned by `images/bases.lock`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A serving engine: what it loads, how it is planned, started and asked."""

    name: str
    accepts: frozenset[str]
    """Kinds of Format (`gguf`, `safetensors`, `awq` …)."""
    base: EngineBase
    port: int
    health_path: str
    plan: Callable[[Mapping[str, Json], int, Wishes], ServingPlan]
    """(config.json, weight bytes, wishes) -> plan; raises UsageError where it cannot fit."""
    env: Callable[[ServingPlan, Mapping[str, Json]], Mapping[str, str]]
    """(plan, names) -> environment of the process; names has `model_path`, `served_name`."""
    entrypoint: tuple[str, ...]
    command: Callable[[ServingPlan, Mapping[str, Json]], tuple[str, ...]]
    healthcheck: tuple[str, ...]
    """Command inside the CPU image; empty where there is no program for it."""
    model_dir: str = "/models"
    image_files: Mapping[str, str] = field(default_factory=dict)
    """Absolute path in the image -> template name in the engine's template folder."""
    port_variable: str = ""
    """The variable that moves the port."""
    host_variable: str = ""
    """The variable that says which address it listens on."""
    threads_variable: str = ""
    """The variable for its number of threads, where it would count the machine's CPUs itself."""
    neutral_settings: frozenset[str] = frozenset()
    """Settings of a plan that change no answer: slots, total context, threads."""
    legacy: str = ""
    """Why one should choose another engine, or empty."""
