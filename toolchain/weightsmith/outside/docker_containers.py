"""Containers: runs jobs in those of builders, and starts images as their users will, but isolated.

What the engine is asked for is made by pure functions.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
from docker.errors import APIError
from docker.models.containers import Container
from docker.models.networks import Network
from docker.types import DeviceRequest, Mount
from docker.utils.socket import frames_iter
from requests.exceptions import RequestException

from weightsmith.core.cpus import flags
from weightsmith.core.devices import Devices
from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.jobs import Job, write_job
from weightsmith.core.ports import Endpoint, Progress, StartSpec
from weightsmith.core.resources import compiled_engines, package
from weightsmith.core.values import Json, JsonValue
from weightsmith.outside.docker import (
    ANSWER_SECONDS,
    GONE,
    LABEL_OWNER,
    DockerEngine,
    engine_errors,
    engine_host,
    remove,
)
from weightsmith.outside.docker_images import build_image, image_tag
from weightsmith.outside.hardware import devices
from weightsmith.outside.image_sandbox import PROCESSES
from weightsmith.outside.lines import RESULT, Lines, when_readable
from weightsmith.outside.local import worker_environment
from weightsmith.outside.ownership import owned_by, owner_token, private_folder, readable
from weightsmith.outside.process import TookTooLong
from weightsmith.outside.start_errors import from_engine_message
from weightsmith.outside.toolset import optional_toolsets, tools_variable, try_toolsets
from weightsmith.outside.worker_protocol import Conversation, open_log

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


def job_request(
    job: Job, image: str, files: JobFiles, *, user: str, owner: str, gpu: bool
) -> dict[str, object]:
    """Return the create request of a job's container: no network, no privileges, one output."""
    engines = {*compiled_engines(job.builder), *files.tools}
    binds = {f"{INPUTS}/{name}": path for name, path in sorted(files.inputs.items())}
    binds |= {f"{TOOLS}/{engine}": folder for engine, folder in files.tools.items()}
    binds |= {JOB_FILE: files.job_file, f"{PACKAGE}/weightsmith": files.package}
    return {
        **_confined(job.memory_bytes, gpu=gpu),
        "image": image,
        "entrypoint": [_PYTHON],
        "command": ["-m", "weightsmith.worker", JOB_FILE],
        "working_dir": "/tmp",  # noqa: S108 - inside the container
        "user": user,
        "environment": {
            **worker_environment(),
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
        "labels": {LABEL_OWNER: owner, LABEL_JOB: job.kind},
        "pids_limit": _JOB_PROCESSES,
    }


def inside(job: Job) -> Job:
    """Return the job with the paths that hold inside its container."""
    inputs = {name: given.at(Path(INPUTS, name)) for name, given in job.inputs.items()}
    return job.at(inputs, Path(OUTPUT))


def server_request(
    image: str,
    spec: StartSpec,
    owner: str,
    *,
    gpu: bool,
    network: str = "",
    command: Sequence[str] = (),
) -> dict[str, object]:
    """Return the create request of a server: the image unchanged, with its own user.

    `command` is the image's own, which is needed if the start has further arguments.

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
        **({"command": [*command, *spec.arguments]} if spec.arguments else {}),
    }


def _confined(memory_bytes: int, *, gpu: bool) -> dict[str, object]:
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


class DockerRunner:
    """Runs each job in a container of its builder's image, without network and privileges."""

    name = "docker"
    networked = False

    def __init__(self, engine: DockerEngine, cache: Path) -> None:
        self._engine = engine
        self._cache = cache
        """For logs, and for private copies of inputs that the container's user cannot read."""

    def prepare(self, builder: str, progress: Progress) -> None:
        """Build the builder's image if the engine does not have it; takes minutes, once."""
        self._engine.reap()
        if not self.ready(builder):
            build_image(builder, self._flavour(), engine_host(), self._cache, progress)
        try_toolsets(self._cache, builder, progress)

    def check(self, builder: str) -> None:
        """Check nothing in advance: building the image needs nothing from this machine."""

    def ready(self, builder: str) -> bool:
        """Say whether the engine has the builder's image."""
        return self._engine.holds(image_tag(builder, self._flavour()))

    def run(
        self, job: Job, progress: Progress, *, stop: int | None = None
    ) -> Mapping[str, JsonValue]:
        """Run the job; raises the job's own error, or EnvironmentFailure if it died.

        InterruptedError once the open file `stop` can be read. `builder_image` in the result is
        the digest of its image.
        """
        self.prepare(job.builder, progress)
        root = os.getuid() == 0
        user, group = (NOBODY, NOBODY) if root else (os.getuid(), os.getgid())
        gpu = job.use_gpu and self._engine.has_gpu()
        with contextlib.ExitStack() as stack:
            staging = stack.enter_context(private_folder(self._cache))
            tools = optional_toolsets(self._cache, job.builder)
            given = {f"in/{name}": one.path for name, one in job.inputs.items()}
            places = {**given, "weightsmith": package(), **tools}
            there = {n: readable(p, staging / n, by_others=root) for n, p in places.items()}
            files = JobFiles(
                inputs={name: there[f"in/{name}"] for name in job.inputs},
                output=job.output.resolve(),
                job_file=staging / "job.json",
                package=there["weightsmith"],
                tools={engine: there[engine] for engine in tools},
            )
            files.job_file.write_text(write_job(inside(job)), encoding="utf-8")
            files.job_file.chmod(0o444)
            log = stack.enter_context(open_log(self._cache, job.kind))
            if root:
                stack.enter_context(owned_by(job.output, user, group))
            image = image_tag(job.builder, self._flavour())
            owner, ids = owner_token(), f"{user}:{group}"
            request = job_request(job, image, files, user=ids, owner=owner, gpu=gpu)
            conversation = Conversation(job=job, progress=progress, log=log, inside=INPUTS)
            stack.enter_context(conversation.in_time())
            with engine_errors(f"running the {job.kind} job"):
                returncode = run_container(self._engine.client, request, conversation, stop)
            ran_in = self._engine.inspect(image).get("Id", "")
            return {**conversation.result(returncode), "builder_image": ran_in}

    def _flavour(self) -> str:
        return "cuda" if self._engine.has_gpu() else "cpu"


_NOT_STARTED = "waiting for init preliminary setup"
"""runc says so of a container that ended before its program: on a busy machine, now and then."""


def run_container(
    client: docker.DockerClient,
    request: Mapping[str, object],
    conversation: Conversation,
    stop: int | None,
) -> int:
    """Start a job's container, process its output until it ends, and return its exit code.

    A container that the engine could not start is started once more. Raises TookTooLong after the
    job's time limit, InterruptedError once the open file `stop` can be read; the container is
    removed in any case.
    """
    try:
        return _run_once(client, request, conversation, stop)
    except APIError as problem:
        if _NOT_STARTED not in str(problem.explanation):
            raise
    return _run_once(client, request, conversation, stop)


def _run_once(
    client: docker.DockerClient,
    request: Mapping[str, object],
    conversation: Conversation,
    stop: int | None,
) -> int:
    api: Any = client.api
    containers: Any = client.containers
    frames: Any = frames_iter
    container = containers.create(**request)
    seconds = conversation.job.seconds
    patience = seconds + ANSWER_SECONDS if seconds else None
    listeners = {1: (Lines(RESULT), conversation.on_line), 2: (Lines(), conversation.on_error_line)}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            streams = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
            attached = api.attach_socket(container.id, params=streams)
            # The client library's file does not close the socket below it.
            below: socket.socket = getattr(attached, "_sock", attached)
            with (
                contextlib.closing(attached),
                contextlib.closing(below),
                _ended_early(seconds, stop, container, below),
            ):
                # Attached before it starts: the container is removed as soon as it ends.
                ended = pool.submit(api.wait, container.id, patience, "removed")
                container.start()
                for number, chunk in frames(attached, tty=False):
                    lines, on_line = listeners.get(number, listeners[2])
                    for line in lines.feed(chunk):
                        on_line(line)
                for lines, on_line in listeners.values():
                    for line in lines.feed(b""):
                        on_line(line)
                return int(ended.result()["StatusCode"])
        finally:
            remove(container)


@contextlib.contextmanager
def _ended_early(
    seconds: int, stop: int | None, container: Container, below: socket.socket
) -> Iterator[None]:
    """Remove the container after its time limit, and raise TookTooLong then; 0 for no limit.

    And once the file `stop` can be read, with InterruptedError.
    """
    why: list[Exception] = []

    def end(reason: Exception) -> None:
        why.append(reason)
        remove(container)
        # A hanging engine does not report the container's end; do not wait for it.
        with contextlib.suppress(*GONE):
            below.shutdown(socket.SHUT_RDWR)

    over = TookTooLong("the container exceeded its time limit", hint="see the job's log")
    timer = threading.Timer(seconds, end, [over])
    timer.daemon = True
    if seconds:
        timer.start()
    try:
        with when_readable(stop, lambda: end(InterruptedError())):
            yield
    except (*GONE, EnvironmentFailure):
        if not why:
            raise
    finally:
        timer.cancel()
    if why:
        raise why[0]


class DockerLauncher:
    """Starts an image as its own user, read-only, in a network without internet access.

    If this machine cannot reach such a network (the engine is in a virtual machine or on another
    host), the server's port is published on loopback instead.
    """

    name = "docker"

    def __init__(self, engine: DockerEngine) -> None:
        self._engine = engine

    def cpu_flags(self) -> frozenset[str] | None:
        """Return this machine's if the engine runs on it, else None: an engine does not tell."""
        return flags() if self._engine.is_here() else None

    def devices(self, image: str) -> Devices | None:
        """Return this machine's if the engine runs on it, else None: an engine does not tell."""
        del image
        return devices() if self._engine.is_here() else None

    @contextlib.contextmanager
    def serve(self, image: str, spec: StartSpec) -> Iterator[Endpoint]:
        """Start `image`; its container is removed when the context ends.

        Does not wait: the caller polls the server's health. Raises CheckFailed for an image that
        cannot be started, EnvironmentFailure for a missing image or a failing engine.
        """
        self._engine.reap()
        gpu = spec.use_gpu and self._engine.has_gpu()
        with self._internal_network() as network:
            name = (network.name or "") if network else ""
            containers: Any = self._engine.client.containers
            with _starting(image):
                own = self._command(image) if spec.arguments else ()
                request = server_request(
                    image, spec, owner_token(), gpu=gpu, network=name, command=own
                )
                container = containers.create(**request)
            try:
                yield self._started(container, image, spec, name)
            finally:
                remove(container)

    def _command(self, image: str) -> Sequence[str]:
        return self._engine.client.images.get(image).attrs["Config"].get("Cmd") or ()

    def _started(self, container: Container, image: str, spec: StartSpec, network: str) -> Endpoint:
        with _starting(image):
            container.start()
            container.reload()
        if network:
            joined = (container.attrs or {}).get("NetworkSettings", {}).get("Networks", {})
            # An ended container has none; the health check reports its last lines.
            address = (joined.get(network) or {}).get("IPAddress") or "127.0.0.1"
            url = f"http://{address}:{spec.port}"
        elif bindings := container.ports.get(f"{spec.port}/tcp"):
            url = f"http://127.0.0.1:{int(bindings[0]['HostPort'])}"
        else:
            raise EnvironmentFailure(
                f"the container of {container.image} ended before its port {spec.port} was "
                f"published: {_logs(container, 5)}",
                hint="start the image by hand to see why: `docker run --rm IMAGE`",
            )

        def alive() -> bool:
            try:
                container.reload()
            except GONE:
                return False
            return bool(container.status == "running")

        def stop(seconds: float) -> int | None:
            # Only SIGTERM, as from an orchestrator.
            with engine_errors("stopping the server"):
                container.kill("SIGTERM")
                try:
                    return int(container.wait(timeout=seconds)["StatusCode"])
                except RequestException:  # how the client library reports a timeout
                    return None

        return Endpoint(
            url=url,
            logs=lambda count: _logs(container, count),
            alive=alive,
            stop=stop,
            restart=lambda: self._started(container, image, spec, network),
            confinement=confinement(container.attrs or {}, network),
        )

    @contextlib.contextmanager
    def _internal_network(self) -> Iterator[Network | None]:
        """Yield an internal network of our own, or None if this machine could not reach it."""
        network = None
        # None if there is no free address range, and such.
        with contextlib.suppress(APIError, RequestException):
            if engine_host().startswith("unix://"):
                name, labels = f"weightsmith-{secrets.token_hex(6)}", {LABEL_OWNER: owner_token()}
                network = self._engine.client.networks.create(name, internal=True, labels=labels)
        try:
            # The bridge exists on this machine only if the engine runs on it.
            bridge = Path("/sys/class/net", f"br-{(network.id or '')[:12]}") if network else None
            yield network if bridge and bridge.exists() else None
        finally:
            if network is not None:
                with contextlib.suppress(*GONE):
                    network.remove()


@contextlib.contextmanager
def _starting(image: str) -> Iterator[None]:
    try:
        with engine_errors(f"starting {image}"):
            yield
    except EnvironmentFailure as failure:
        problem = failure.__cause__
        said = str(problem.explanation or "") if isinstance(problem, APIError) else ""
        if fault := from_engine_message(image, said):
            raise fault from problem
        raise


def confinement(reported: Mapping[str, Json], network: str) -> tuple[str, ...]:
    """Return a container's isolation as the engine reports it, not as it was requested.

    `network` is the internal one, if the container should be in it.
    """
    host, config = reported.get("HostConfig") or {}, reported.get("Config") or {}
    networks = set((reported.get("NetworkSettings") or {}).get("Networks") or {})
    dropped = {str(name).upper() for name in host.get("CapDrop") or ()}
    options = [str(option) for option in host.get("SecurityOpt") or ()]
    memory = int(host.get("Memory") or 0)
    words = (
        f"user {config.get('User') or 'root'}",
        "read-only root" if host.get("ReadonlyRootfs") else "",
        # It still reaches what listens on the network's bridge, so on all addresses of the machine.
        "no internet" if network and networks == {network} else "",
        "no capabilities" if "ALL" in dropped and not host.get("CapAdd") else "",
        "no new privileges" if any("no-new-privileges" in option for option in options) else "",
        f"{memory / 2**20:.0f} MiB of memory" if memory else "",
    )
    return tuple(word for word in words if word)


def _logs(container: Container, count: int) -> str:
    try:
        return container.logs(tail=count).decode(errors="replace").rstrip("\n")
    except GONE as problem:
        return f"(no logs: {problem})"
