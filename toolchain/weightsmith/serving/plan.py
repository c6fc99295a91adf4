"""What is planned and rendered for an image, and the JSON form that is written and read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from weightsmith.values import Digest, Json, plain

_OF_THE_MACHINE = frozenset(
    {"usable_bytes", "kv_cache_bytes", "margin_bytes", "max_concurrency", "notes", "nearest"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPlan:
    """Memory worked out for one engine, model and machine; bytes throughout.

    On a GPU: `weights_bytes_per_gpu + kv_cache_bytes + margin_bytes` and each GPU's part of
    `overhead_bytes` are what the engine may take of one GPU.
    """

    device: str
    """`cpu` or the GPU's name."""
    gpus: int = 0
    """GPUs of one replica; 0 on a CPU."""
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_concurrency: float
    """Requests of `max_model_len` that the cache holds at once."""
    weight_bytes: int
    """All weights; on several GPUs together."""
    weights_bytes_per_gpu: int
    kv_bytes_per_token: int
    """What a request grows by with each token, on all GPUs together."""
    kv_bytes_per_request: int
    """A request of `max_model_len` by the engine's own rules, on all GPUs together."""
    kv_bytes_total: int
    """`max_num_seqs` such requests."""
    kv_cache_bytes: int
    """What is left for the cache, per GPU."""
    overhead_bytes: int
    """Neither weights nor cache, on all GPUs together: an estimate."""
    usable_bytes: int
    """What the plan may use, on all GPUs together."""
    margin_bytes: int
    """Held back per GPU, because the overhead is an estimate."""
    host_bytes: int
    """Memory that the server's container needs on the host."""
    shm_bytes: int = 0
    """Shared memory that the engine's processes talk through; 0 where the default does."""
    gpu_memory_utilization: float | None = None
    """The engine's own fraction, where it has one."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    gpu_layers: int = 0
    """Layers on the GPU; 0 on CPU."""
    fits: bool = True
    nearest: tuple[Mapping[str, Json], ...] | None = None
    """Where it does not fit: changed options that do, each with a `text` for people."""
    settings: Mapping[str, Json] = field(default_factory=dict)
    """Engine options that follow from the plan, in the engine's own names."""
    notes: tuple[str, ...] = ()

    @property
    def memory_limit_bytes(self) -> int:
        """What to limit the container to: its need on the host and a tenth, in whole 64 MiB."""
        step = 64 << 20
        return -(-self.host_bytes * 11 // 10 // step) * step

    def to_json(self) -> dict[str, Json]:
        """Return the plan as it is written; of one that was never made, its device alone."""
        if not self.max_model_len:
            return {"device": self.device}
        return {**plain(self), "memory_limit_bytes": self.memory_limit_bytes}

    def portable(self) -> dict[str, Json]:
        """Return what of the plan goes into the image: on a CPU, nothing of the planning machine.

        Else the same build would have another digest on a machine with more memory.
        """
        own = _OF_THE_MACHINE if self.device == "cpu" else frozenset()
        return {key: value for key, value in self.to_json().items() if key not in own}

    @classmethod
    def from_json(cls, data: Json) -> ServingPlan:
        """Read a plan, or the part of it that an image has; numbers that are missing become 0.

        Raises ValueError for a value of another type.
        """
        numbers = (
            f.name for f in fields(cls) if f.type in {"int", "float"} and f.default is MISSING
        )
        return cls(**{"device": "cpu", **dict.fromkeys(numbers, 0), **_checked(cls, data)})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingConfig:
    """Rendered files and the process that an image starts."""

    target: str
    files: Mapping[str, str]
    """Relative path -> text, as written beside `build.json`."""
    image_files: Mapping[str, str]
    """Absolute path in the image -> text."""
    entrypoint: tuple[str, ...]
    command: tuple[str, ...]
    env: Mapping[str, str]
    port: int
    health_path: str
    healthcheck: tuple[str, ...]
    """Command inside the image that exits 0 when it serves; empty where there is none."""
    served_name: str
    plan: ServingPlan
    made_from: tuple[Digest, ...]

    def to_json(self) -> dict[str, Json]:
        """Return all that `bake` needs of a rendered folder."""
        return {**plain(self), "plan": self.plan.to_json()}

    @classmethod
    def from_json(cls, data: Json) -> ServingConfig:
        """Read what `to_json` returned; raises ValueError for a part that is not as it was."""
        whole = _checked(cls, data)
        if wrong := {part.name for part in fields(cls)} ^ set(data):
            raise ValueError(f"missing or unknown: {', '.join(sorted(wrong))}")
        made_from = tuple(Digest(digest) for digest in whole["made_from"])
        plan = ServingPlan.from_json(whole["plan"])
        return cls(**{**whole, "plan": plan, "made_from": made_from})


def _checked(cls: type, data: Json) -> dict[str, Any]:
    """Return the fields of a value that JSON has, lists as tuples; ValueError for a wrong type."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{cls.__name__} is not a JSON object")  # noqa: TRY004 - others wrote it
    found = {}
    for part in fields(cls):
        if part.name not in data:
            continue
        value = data[part.name]
        if not _IS_OF[str(part.type)](value):
            raise ValueError(f"{part.name} is {value!r}, not of the type {part.type}")
        found[part.name] = tuple(value) if isinstance(value, list) else value
    return found


def _is_whole(value: Json) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_texts(values: Json) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, str) for value in values)


_IS_OF: Mapping[str, Callable[[Json], bool]] = {
    "str": lambda value: isinstance(value, str),
    "int": _is_whole,
    "bool": lambda value: isinstance(value, bool),
    "float": _is_number,
    "float | None": lambda value: value is None or _is_number(value),
    "tuple[str, ...]": _are_texts,
    "tuple[Digest, ...]": _are_texts,
    "tuple[Mapping[str, Json], ...] | None": lambda value: (
        value is None or (isinstance(value, list) and all(isinstance(v, Mapping) for v in value))
    ),
    "Mapping[str, Json]": lambda value: isinstance(value, Mapping),
    "Mapping[str, str]": lambda value: isinstance(value, Mapping) and _are_texts([*value.values()]),
    "ServingPlan": lambda value: isinstance(value, Mapping),
}
"""A field's type, as it is written -> whether a JSON value is of it."""
