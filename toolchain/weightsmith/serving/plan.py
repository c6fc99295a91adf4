"""What is planned and rendered for an image, and the JSON form that is written and read back.

What goes into an image says what serving needs, nothing of the planning machine, on which the
digest would depend; that is in build.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from weightsmith.core.escape import joined
from weightsmith.core.json_objects import JsonObject, read_exactly
from weightsmith.core.values import Digest, JsonValue, plain
from weightsmith.serving.devices import CPU, is_cpu
from weightsmith.serving.memory import human
from weightsmith.serving.parameters import NO_WEIGHTS

GRACE_SECONDS = 60
"""How long a container may take to end; then it is killed."""
NOTICE_SECONDS = 5
"""How long a pod still takes requests, until those who send them know that it ends."""
DRAIN_SECONDS = 50
"""How long a server that counts itself lets requests run: shorter, so that it can still end."""
_OF_THE_MACHINE = frozenset(
    {
        "usable_bytes",
        "kv_cache_bytes",
        "margin_bytes",
        "max_concurrency",
        "notes",
        "nearest",
        "choices",
    }
)
_WIDTH = 60
"""Characters of a plan's bar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPlan(JsonObject):
    """Memory worked out for one engine, model and machine; bytes throughout.

    On a GPU: `weights_bytes_per_gpu + kv_cache_bytes + margin_bytes` and each GPU's part of
    `overhead_bytes` are what the engine may take of one GPU. Numbers are 0 if nothing was planned,
    or if an image's plan leaves them out (see `portable`).
    """

    device: str = CPU
    """A CPU of devices.py, or the GPU's name."""
    gpus: int = 0
    """GPUs of one replica; 0 on a CPU."""
    max_model_len: int = 0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    max_concurrency: float = 0
    """Requests of `max_model_len` that the cache holds at once."""
    weight_bytes: int = 0
    """All weights; on several GPUs together."""
    weights_bytes_per_gpu: int = 0
    kv_bytes_per_token: int = 0
    """What a request grows by with each token, on all GPUs together."""
    kv_bytes_per_request: int = 0
    """A request of `max_model_len` by the engine's own rules, on all GPUs together."""
    kv_bytes_total: int = 0
    """`max_num_seqs` such requests."""
    kv_cache_bytes: int = 0
    """What is left for the cache, per GPU."""
    overhead_bytes: int = 0
    """Neither weights nor cache, on all GPUs together: an estimate."""
    usable_bytes: int = 0
    """What the plan may use, on all GPUs together."""
    margin_bytes: int = 0
    """Held back per GPU, because the overhead is an estimate."""
    host_bytes: int = 0
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
    nearest: tuple[Mapping[str, JsonValue], ...] | None = None
    """Where it does not fit: changed options that do, each with a `text` for people."""
    choices: tuple[Mapping[str, JsonValue], ...] = ()
    """Where length and requests are left to the plan: other pairs that fit, as `serve` keys."""
    settings: Mapping[str, JsonValue] = field(default_factory=dict)
    """Engine options that follow from the plan, in the engine's own names."""
    notes: tuple[str, ...] = ()

    @property
    def memory_limit_bytes(self) -> int:
        """What to limit the container to: its need on the host and a tenth, in whole 64 MiB."""
        step = 64 << 20
        return -(-self.host_bytes * 11 // 10 // step) * step

    @property
    def docker_flags(self) -> tuple[str, ...]:
        """What `docker run` needs for the plan: the GPUs, and shared memory."""
        gpus: tuple[str, ...] = ("--gpus", "all") if self.gpus else ()
        if self.device.startswith("amd-"):
            gpus = ("--device", "/dev/kfd", "--device", "/dev/dri")
        return (*gpus, *(("--shm-size", str(self.shm_bytes)) if self.shm_bytes else ()))

    def to_json(self) -> dict[str, JsonValue]:
        """Return the plan as it is written; of one that was never made, its device alone."""
        if not self.max_model_len:
            return {"device": self.device}
        return {**plain(self), "memory_limit_bytes": self.memory_limit_bytes}

    def portable(self) -> dict[str, JsonValue]:
        """Return what of the plan goes into the image: what was chosen.

        On a CPU, nothing of the planning machine.
        Else the same build would have another digest on a machine with more memory.
        """
        own = _OF_THE_MACHINE if is_cpu(self.device) else {"choices"}
        return {key: value for key, value in self.to_json().items() if key not in own}


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
    manifests: tuple[str, ...] = ()
    """Of `serve.manifests`."""

    def to_json(self) -> dict[str, JsonValue]:
        """Return all that `bake` needs of a rendered folder."""
        return {**plain(self), "plan": self.plan.to_json()}

    @classmethod
    def from_json(cls, data: JsonValue) -> ServingConfig:
        """Read what `to_json` returned; raises ValueError for a part that is not as it was."""
        return read_exactly(cls, data)


def summary(name: str, plan: ServingPlan) -> str:
    """Return a plan as lines: what it serves, a bar of one device's memory, and its numbers.

    Sizes are per GPU, or of the machine without one.
    """
    gpus, requests, full = plan.gpus, plan.max_num_seqs, plan.max_concurrency
    where = f"{gpus} x {plan.device}" if gpus > 1 else plan.device
    devices = max(1, gpus)
    cache = plan.kv_bytes_total // devices
    estimated = any(note.startswith(NO_WEIGHTS) for note in plan.notes)
    exact = (
        f"exact: {human(plan.kv_bytes_per_request)} per request,"
        f" {human(plan.kv_bytes_per_token)} per further token"
    )
    spare = f"{full:g} request{'s' * (full != 1)} of full length would fit"
    files = "an estimate" if estimated else "by the files' size"
    parts = [
        ("w", "weights", plan.weights_bytes_per_gpu, files),
        ("k", "cache", cache, exact),
        ("o", "other", plan.overhead_bytes // devices, "an estimate"),
        ("+", "cache to spare", max(0, plan.kv_cache_bytes - cache), spare),
        (".", "held back", plan.margin_bytes, "because the rest is estimated"),
    ]
    whole = sum(size for _, _, size, _ in parts)
    bar, reached = "", 0  # one character per sixtieth; ends are rounded, so there are always 60
    for sign, _, size, _ in parts:
        reached += size
        bar += sign * (round(reached * _WIDTH / (whole or 1)) - len(bar))
    served = f"{requests} request{'s' * (requests > 1)} of {plan.max_model_len} tokens at once"
    lines = [
        f"{name} on {where}: {served}, {plan.max_num_batched_tokens} tokens a step",
        f"  [{bar.ljust(_WIDTH)}] {human(whole)}{' per GPU' if gpus > 1 else ''}",
    ]
    lines += [
        f"   {sign} {what:<14} {human(size):>10}  {said}"
        for sign, what, size, said in parts
        if size
    ]
    named = (("tool-call-parser", "tool calls"), ("reasoning-parser", "thoughts"))
    read = [f"{what} by {plan.settings[key]}" for key, what in named if key in plan.settings]
    lines += [f"  the server reads {' and '.join(read)}"] if read else []
    lines += [f"  note: {note}" for note in plan.notes]
    if not plan.fits:
        lines.append("  it would fit as a whole with:")
        lines += [f"   - {way['text']}" for way in plan.nearest or ()]
    if plan.choices:
        pairs = [(row["max_num_seqs"], row["max_model_len"]) for row in plan.choices]
        others = [f"{most} of {n}" for most, n in pairs if n != plan.max_model_len]
        lines.append(f"  requests at once, of other lengths: {', '.join(others)} tokens")
    return joined(lines)
