"""Builds the requests to the container engine: pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from docker.types import DeviceRequest, Mount

from weightsmith.core.jobs import Job
from weightsmith.core.ports import StartSpec
from weightsmith.core.resources import compiled_engines
from weightsmith.outside.image_sandbox import PROCESSES
from weightsmith.outside.toolset import tools_variable

LABEL_OWNER = "weightsmith.owner"
LABEL_JOB = "weightsmith.job"
INPUTS, OUTPUT, JOB_FILE, PACKAGE, TOOLS = "/in", "/out", "/job/job.json", "/weightsmith", "/opt"
NOBODY = 65532
"""User and group of jobs whose caller is root."""
_PYTHON = "/opt/venv/bin/python"
_SHM_WITH_GPU = 1 << 30
_JOB_PROCESSES = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFiles:
    """Where the files of one job are on this machine."""

    inputs: Mapping[str, Path]
    output: Path
    job_file: Path
    package: Path
    tools: Mapping[str, Path] = field(default_factory=dict)
    """Tools that are not in the builder's image, by engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """A container's user, owner and GPUs."""

    user: int
    group: int
    owner: str
    gpu: bool


def job_request(
    job: Job, image: str, files: JobFiles, bounds: Bounds, environment: Mapping[str, str]
) -> dict[str, object]:
    """Return the create request of a job's container: no network, no privileges, one output."""
    engines = {*compiled_engines(job.builder), *files.tools}
    binds = {f"{INPUTS}/{name}": path for name, path in sorted(files.inputs.items())}
    binds |= {f"{TOOLS}/{engine}": folder for engine, folder in files.tools.items()}
    binds |= {JOB_FILE: files.job_file, f"{PACKAGE}/weightsmith": files.package}
    return {
        **_confined(job.memory_bytes, gpu=bounds.gpu),
        "image": image,
        "entrypoint": [_PYTHON],
        "command": ["-m", "weightsmith.worker", JOB_FILE],
        "working_dir": "/tmp",  # noqa: S108 - inside the container
        "user": f"{bounds.user}:{bounds.group}",
        "environment": {
            **environment,
            "HOME": "/tmp",  # noqa: S108
            "PYTHONPATH": PACKAGE,
            "PYTHONSAFEPATH": "1",
            **{tools_variable(engine): f"{TOOLS}/{engine}" for engine in sorted(engines)},
        },
        "mounts": [
            *(_bind(source, target) for target, source in binds.items()),
            _bind(files.output, OUTPUT, read_only=False),
        ],
        "network_mode": "none",
        # Standard input closes with our connection (the client library requests that unless
        # `detach` is set), so end of file tells the worker that we are gone.
        "stdin_open": True,
        "detach": False,
        "auto_remove": True,
        "labels": {LABEL_OWNER: bounds.owner, LABEL_JOB: job.kind},
        "pids_limit": _JOB_PROCESSES,
    }


def inside(job: Job) -> Job:
    """Return the job with the paths that hold inside its container."""
    inputs = {name: given.at(Path(INPUTS, name)) for name, given in job.inputs.items()}
    return job.at(inputs, Path(OUTPUT))


def server_request(
    image: str, spec: StartSpec, owner: str, *, gpu: bool, network: str = ""
) -> dict[str, object]:
    """Return the create request of a server: the image unchanged, with its own user.

    It is on `network`, the internal one, if given; else on the default bridge, with its port
    published on loopback. Its root file system is read-only, its home is the temporary folder, and
    it is process 1, as in production.
    """
    published = {"ports": {f"{spec.port}/tcp": ("127.0.0.1", None)}}
    return {
        **_confined(spec.memory_bytes, gpu=gpu),
        "image": image,
        "environment": {"HOME": "/tmp", **spec.env},  # noqa: S108 - inside the container
        "init": False,
        "labels": {LABEL_OWNER: owner},
        # Engines with several workers share tensors there; the default is 64 MiB.
        "shm_size": max(spec.shm_bytes, _SHM_WITH_GPU if gpu else 0) or None,
        "pids_limit": PROCESSES,
        **({"network": network} if network else published),
    }


def _confined(memory_bytes: int, *, gpu: bool) -> dict[str, object]:
    """Return the settings of all our containers."""
    # GPU libraries compile kernels into their cache folder and run them from there.
    temporary = "rw,nosuid,nodev,mode=1777" + (",exec" if gpu else ",noexec")
    request: dict[str, object] = {
        "read_only": True,
        "tmpfs": {"/tmp": temporary},  # noqa: S108 - inside the container
        "security_opt": ["no-new-privileges"],
        "cap_drop": ["ALL"],
        "init": True,
    }
    if memory_bytes:
        # The same limit for both: no additional swap.
        request |= {"mem_limit": memory_bytes, "memswap_limit": memory_bytes}
    if gpu:
        every = DeviceRequest(count=-1, capabilities=[["gpu", "compute", "utility"]])
        request["device_requests"] = [every]
    return request


def _bind(source: Path, target: str, *, read_only: bool = True) -> Mount:
    return Mount(target=target, source=str(source), type="bind", read_only=read_only)
