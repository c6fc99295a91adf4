"""The container engine: runs jobs in builder containers, takes image archives."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from socket import SHUT_RDWR
from typing import Any

import docker
from docker.context import ContextAPI
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.models.containers import Container
from docker.utils.socket import SocketError, frames_iter
from requests.exceptions import RequestException

from weightsmith.drivers.docker_images import build_image, image_tag
from weightsmith.drivers.docker_loading import load_in_turn
from weightsmith.drivers.docker_requests import (
    INPUTS,
    LABEL_OWNER,
    NOBODY,
    Bounds,
    JobFiles,
    inside,
    job_request,
)
from weightsmith.drivers.handover import owned_by, readable
from weightsmith.drivers.hardware import gpu_names
from weightsmith.drivers.lines import RESULT, Lines
from weightsmith.drivers.local import worker_environment
from weightsmith.drivers.ownership import is_dead, owner_token, private_folder
from weightsmith.drivers.process import TookTooLong
from weightsmith.drivers.wire import Conversation, open_log
from weightsmith.errors import EnvironmentFailure
from weightsmith.jobs import Job, write_job
from weightsmith.ports import CANDIDATES, Progress
from weightsmith.resources import package
from weightsmith.values import Json

GONE = (DockerException, RequestException, OSError)
"""What the client library raises for an engine that is not there or went away."""
_ANSWER_SECONDS = 120
_UNPACK_SECONDS = 24 * 3600
"""The engine says nothing while it unpacks a large layer."""


def engine_host() -> str:
    """Return the address of the user's engine: DOCKER_HOST, or the docker command's context."""
    if named := os.environ.get("DOCKER_HOST"):
        return named
    try:
        context = ContextAPI.get_current_context()
    except (DockerException, OSError, ValueError):
        context = None
    return (context.Host if context else None) or "unix:///var/run/docker.sock"


_CONFLICT = 409
_ABREAST = 2
"""Archives that containerd is sent at once: it takes each in steps whose answers are waited for.
Docker's own store takes one as fast as it comes; what is slow there is to unpack it."""


class DockerEngine:
    """The engine itself: whether it is there, what it holds, and how it takes an image."""

    def __init__(self) -> None:
        self.owner = owner_token()
        self._opened: docker.DockerClient | None = None

    @property
    def client(self) -> docker.DockerClient:
        """The connection, made when first needed; EnvironmentFailure without an engine."""
        if self._opened is None:
            self._opened = _connect(_ANSWER_SECONDS)
            weakref.finalize(self, self._opened.close)
        return self._opened

    def answers(self) -> bool:
        """Say whether an engine is there."""
        try:
            return bool(self.client.ping())
        except (EnvironmentFailure, *GONE):
            return False

    def load(self, archives: Iterable[Iterator[bytes]], reference: str) -> str:
        """Load image archives, each on the one before it, streamed; return the last one's id.

        Raises EnvironmentFailure where the engine refuses one or goes away. After Ctrl-C the image
        is there or is not: the engine, once it has all bytes, would name it some time later.
        """
        with engine_errors(f"loading {reference} into the container engine"):
            abreast = _ABREAST if self._in_containerd() else 1
            load_in_turn(lambda: _connect(_UNPACK_SECONDS), archives, reference, abreast)
            self._forget_dead_names()
            return str(self.client.images.get(reference).id)

    def _in_containerd(self) -> bool:
        status = dict(self.client.info().get("DriverStatus") or ())
        return "containerd" in status.get("driver-type", "")

    def _forget_dead_names(self) -> None:
        api: Any = self.client.api
        for row in api.images(name=CANDIDATES):
            for name in row.get("RepoTags") or ():
                if is_dead(name.rpartition(":")[2].partition("-")[2]):
                    self.untag(name)

    def chains_of(self, *repositories: str) -> tuple[tuple[str, ...], ...]:
        """Return the diff ids, bottom first, of each image that the engine holds of these."""
        with engine_errors("asking the container engine for its images"):
            api: Any = self.client.api
            found = [row["Id"] for name in repositories for row in api.images(name=name)]
            # One that another build removes at this moment is not held any more: {}.
            held = [self.inspect(name) for name in found]
            return tuple(tuple(told["RootFS"].get("Layers") or ()) for told in held if told)

    def inspect(self, reference: str) -> Mapping[str, Json]:
        """Return an image's `Id` and `Config`; {} where absent."""
        with engine_errors(f"asking the container engine for {reference}"):
            try:
                return dict(self.client.images.get(reference).attrs or {})
            except ImageNotFound:
                return {}

    def untag(self, reference: str) -> None:
        """Remove a name; the image goes too when it was the last one.

        Absent is fine, and so is one that another build's container still runs from.
        """
        with engine_errors(f"removing the name {reference}"), contextlib.suppress(ImageNotFound):
            try:
                self.client.images.remove(reference, noprune=False)
            except APIError as problem:
                if problem.status_code != _CONFLICT:
                    raise

    def describe(self) -> Mapping[str, Json]:
        """Return version, storage driver, GPU runtime and such; {} without an engine."""
        if not self.answers():
            return {}
        with engine_errors("asking the container engine about itself"):
            told = self.client.info()
            parts = self.client.version().get("Components") or ()
        return {
            "host": engine_host(),
            "version": told.get("ServerVersion", ""),
            "storage": told.get("Driver", ""),
            "root": told.get("DockerRootDir", ""),
            "gpu": _passes_gpus(told),
            # Both of Docker's image stores look for layers that they hold; Podman, behind the
            # same API, wants every archive whole.
            "layerwise": any(part.get("Name") == "Engine" for part in parts),
            "rootless": any("rootless" in option for option in told.get("SecurityOptions") or ()),
        }

    def has_gpu(self) -> bool:
        """Say whether containers can be given this machine's GPUs."""
        if not gpu_names():
            return False
        with engine_errors("asking the container engine about itself"):
            return _passes_gpus(self.client.info())

    def holds(self, reference: str) -> bool:
        """Say whether the engine has an image."""
        return bool(self.inspect(reference))

    def reap(self) -> None:
        """Remove containers and networks whose owner was killed before it could."""
        with engine_errors("looking for left-over containers"):
            mine = self.client.containers.list(
                all=True, filters={"label": LABEL_OWNER}, ignore_removed=True
            )
            for container in mine:
                if is_dead(container.labels[LABEL_OWNER]):
                    remove(container)
            for network in self.client.networks.list(filters={"label": LABEL_OWNER}):
                if is_dead((network.attrs.get("Labels") or {}).get(LABEL_OWNER, "")):
                    with contextlib.suppress(*GONE):
                        network.remove()


class DockerRunner:
    """Runs each job in a container of its builder's image, without network and rights.

    `cache` holds logs and private copies of inputs that the container's user could not read.
    """

    name = "docker"
    networked = False

    def __init__(self, engine: DockerEngine, cache: Path) -> None:
        self._engine = engine
        self._cache = cache

    def prepare(self, builder: str, progress: Progress) -> None:
        """Build the builder's image, if the engine does not hold it; minutes, once."""
        self._engine.reap()
        if not self.ready(builder):
            build_image(builder, self._flavour(), engine_host(), self._cache, progress)

    def check(self, builder: str) -> None:
        """Nothing is told beforehand: an image brings all that it is made with."""

    def ready(self, builder: str) -> bool:
        """Say whether the engine holds the builder's image."""
        return self._engine.holds(image_tag(builder, self._flavour()))

    def run(self, job: Job, progress: Progress) -> Mapping[str, Json]:
        """Run the job to its end; raises the job's own error, EnvironmentFailure where it died.

        `builder_image` in the result is the digest of the image that it ran in.
        """
        self.prepare(job.builder, progress)
        root = os.getuid() == 0
        user, group = (NOBODY, NOBODY) if root else (os.getuid(), os.getgid())
        gpu = job.use_gpu and self._engine.has_gpu()
        bounds = Bounds(user=user, group=group, owner=owner_token(), gpu=gpu)
        with contextlib.ExitStack() as stack:
            staging = stack.enter_context(private_folder(self._cache))
            place = _hand_over(job, staging, by_others=root)
            log = stack.enter_context(open_log(self._cache, job.kind))
            if root:
                stack.enter_context(owned_by(job.output, user, group))
            image = image_tag(job.builder, self._flavour())
            request = job_request(job, image, place, bounds, worker_environment())
            conversation = Conversation(job=job, progress=progress, log=log, inside=INPUTS)
            stack.enter_context(conversation.in_time())
            with engine_errors(f"running the {job.kind} job"):
                returncode = _converse(self._engine.client, request, conversation)
            ran_in = self._engine.inspect(image).get("Id", "")
            return {**conversation.result(returncode), "builder_image": ran_in}

    def _flavour(self) -> str:
        return "cuda" if self._engine.has_gpu() else "cpu"


def remove(container: Container) -> None:
    """Remove a container, running or not; one that is gone already, with its engine, is fine."""
    with contextlib.suppress(*GONE):
        container.remove(force=True, v=True)


@contextlib.contextmanager
def engine_errors(doing: str) -> Iterator[None]:
    """Turn the client library's exceptions into one EnvironmentFailure that says what to do."""
    try:
        yield
    except NotFound as problem:
        raise EnvironmentFailure(
            f"{doing}: {problem.explanation}",
            hint="load or pull the image first; `docker images` lists what the engine holds",
        ) from problem
    except APIError as problem:
        raise EnvironmentFailure(
            f"{doing}: the container engine says: {problem.explanation}",
            hint="see `docker info` and the engine's own log",
        ) from problem
    except (DockerException, RequestException, SocketError, ConnectionError) as problem:
        raise EnvironmentFailure(
            f"{doing}: the container engine went away: {problem}",
            hint="start it again (`systemctl status docker`), then run the same command: "
            "stages that ended are kept",
        ) from problem


def _connect(timeout: int) -> docker.DockerClient:
    """Open a connection on which the engine may be silent for `timeout` seconds."""
    environment = {**os.environ, "DOCKER_HOST": engine_host()}
    try:
        return docker.from_env(environment=environment, timeout=timeout)
    except GONE as problem:
        raise EnvironmentFailure(
            f"no container engine answers at {engine_host()}: {problem}",
            hint="start it, set DOCKER_HOST, or use `--runner local`, which needs none",
        ) from problem


def _passes_gpus(info: Mapping[str, Any]) -> bool:
    devices = info.get("DiscoveredDevices") or ()
    return "nvidia" in (info.get("Runtimes") or {}) or any(
        "nvidia.com/gpu" in str(device.get("ID", "")) for device in devices
    )


def _hand_over(job: Job, staging: Path, *, by_others: bool) -> JobFiles:
    """Lay out what the container will see, readable for its user."""
    inputs = {
        name: readable(given.path, staging / "in" / name, by_others=by_others)
        for name, given in job.inputs.items()
    }
    place = JobFiles(
        inputs=inputs,
        output=job.output.resolve(),
        job_file=staging / "job.json",
        package=readable(package(), staging / "weightsmith", by_others=by_others),
    )
    place.job_file.write_text(write_job(inside(job)), encoding="utf-8")
    place.job_file.chmod(0o444)
    return place


def _converse(
    client: docker.DockerClient, request: Mapping[str, Any], conversation: Conversation
) -> int:
    """Start the container, listen to it until it ends, and return its exit code."""
    container = client.containers.create(**request)
    api: Any = client.api
    seconds = conversation.job.seconds
    patience = seconds + _ANSWER_SECONDS if seconds else None
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            streams = {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1}
            socket = api.attach_socket(container.id, params=streams)
            with (
                contextlib.closing(socket),
                contextlib.closing(_beneath(socket)),
                _ended_after(seconds, container, _beneath(socket)),
            ):
                # Asked before it starts: the container is gone as soon as it has ended.
                ended = pool.submit(api.wait, container.id, patience, "removed")
                container.start()
                _listen(socket, conversation)
                return int(ended.result()["StatusCode"])
        finally:
            remove(container)


@contextlib.contextmanager
def _ended_after(seconds: int, container: Container, socket: Any) -> Iterator[None]:
    """Remove the container when its time is over, and raise TookTooLong then; 0 for never."""
    over = threading.Event()

    def end() -> None:
        over.set()
        remove(container)
        # An engine that hangs as well says nothing of the end; nobody waits for it.
        with contextlib.suppress(*GONE):
            socket.shutdown(SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    if seconds:
        timer.start()
    try:
        yield
    except (*GONE, EnvironmentFailure):
        if not over.is_set():
            raise
    finally:
        timer.cancel()
    if over.is_set():
        raise TookTooLong("the container's time is over", hint="see the job's log")


def _beneath(socket: Any) -> Any:
    """Return the socket below the file that the client library hands out: it does not close it."""
    return getattr(socket, "_sock", socket)


def _listen(socket: Any, conversation: Conversation) -> None:
    hearers = {1: (Lines(RESULT), conversation.hear), 2: (Lines(), conversation.hear_error)}
    frames: Any = frames_iter
    for number, chunk in frames(socket, tty=False):
        lines, hear = hearers.get(number, hearers[2])
        for line in lines.feed(chunk):
            hear(line)
    for lines, hear in hearers.values():
        for line in lines.feed(b""):
            hear(line)
