"""The container engine itself: whether it answers, and what images it has and loads."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import tarfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import docker
from docker.context import ContextAPI
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.models.containers import Container
from docker.utils.socket import SocketError
from requests.exceptions import RequestException

from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.core.ports import CANDIDATES
from weightsmith.core.values import Json, JsonValue
from weightsmith.outside.hardware import gpu_names
from weightsmith.outside.ownership import is_dead, owner_token

LABEL_OWNER = "weightsmith.owner"
_UNPACK_SECONDS = 24 * 3600
"""Seconds; the engine sends nothing while it unpacks a large layer."""


def engine_host() -> str:
    """Return the URL of the user's engine: DOCKER_HOST, or the docker command's context."""
    if named := os.environ.get("DOCKER_HOST"):
        return named
    try:
        context = ContextAPI.get_current_context()
    except (DockerException, OSError, ValueError, AttributeError, TypeError):
        context = None  # none of that name, or a config.json that is none
    return (context.Host if context else None) or "unix:///var/run/docker.sock"


_CONFLICT = 409
_PARALLEL = 2
"""Archives sent to containerd in parallel, because it confirms each in steps. Docker's own store
receives one at full speed; there, unpacking is the slow part."""


class DockerEngine:
    """The engine itself: whether it runs, which images it has, and loading images."""

    def __init__(self) -> None:
        self.owner = owner_token()
        self._opened: docker.DockerClient | None = None

    @property
    def client(self) -> docker.DockerClient:
        """The connection, opened on first use; raises EnvironmentFailure without an engine."""
        if self._opened is None:
            self._opened = _connect(ANSWER_SECONDS)
            weakref.finalize(self, self._opened.close)
        return self._opened

    def answers(self) -> bool:
        """Say whether an engine responds."""
        try:
            return bool(self.client.ping())
        except (EnvironmentFailure, *GONE):
            return False

    def require(self) -> None:
        """Raise EnvironmentFailure, which says what is wrong, unless an engine responds."""
        with engine_errors("asking the container engine whether it runs"):
            self.client.ping()

    def load(self, archives: Iterable[Iterator[bytes]], reference: str) -> str:
        """Stream image archives, each based on the previous one; return the last one's image id.

        Raises EnvironmentFailure if the engine refuses one or stops. After Ctrl-C it waits until
        the image is loaded or dropped, since an engine with all bytes would still name it later.
        """
        with engine_errors(f"loading {reference} into the container engine"):
            status = dict(self.client.info().get("DriverStatus") or ())
            parallel = _PARALLEL if "containerd" in status.get("driver-type", "") else 1
            load_in_order(lambda: _connect(_UNPACK_SECONDS), archives, reference, parallel)
            api: Any = self.client.api
            rows = api.images(name=CANDIDATES)
            for name in [name for row in rows for name in row.get("RepoTags") or ()]:
                if is_dead(name.rpartition(":")[2].partition("-")[2]):
                    self.untag(name)
            return str(self.client.images.get(reference).id)

    def chains_of(self, *repositories: str) -> tuple[tuple[str, ...], ...]:
        """Return the diff ids, bottom first, of each image of these repositories in the engine."""
        with engine_errors("asking the container engine for its images"):
            api: Any = self.client.api
            # {} for an image that another build removes at this moment.
            found = [row["Id"] for name in repositories for row in api.images(name=name)]
            held = [self.inspect(name) for name in found]
            return tuple(tuple(image["RootFS"].get("Layers") or ()) for image in held if image)

    def inspect(self, reference: str) -> Mapping[str, Json]:
        """Return an image's `Id` and `Config`; {} if it does not exist."""
        with engine_errors(f"asking the container engine for {reference}"):
            try:
                return dict(self.client.images.get(reference).attrs or {})
            except ImageNotFound:
                return {}

    def read_file(self, reference: str, path: str, largest: int) -> bytes:
        """Return a file of an image, b"" if it has none; raises InputRefused for a larger one.

        It is copied out of a container that is never started.
        """
        with engine_errors(f"reading {path} of {reference}"):
            labels = {LABEL_OWNER: self.owner}
            container = self.client.containers.create(reference, labels=labels, network_mode="none")
            try:
                chunks, _ = container.get_archive(path)
                return _only_file(chunks, path, largest)
            except NotFound:
                return b""
            finally:
                remove(container)

    def untag(self, reference: str) -> None:
        """Remove a name; ignore one that is missing or that another build's container uses."""
        with engine_errors(f"removing the name {reference}"), contextlib.suppress(ImageNotFound):
            try:
                self.client.images.remove(reference, noprune=False)
            except APIError as problem:
                if problem.status_code != _CONFLICT:
                    raise

    def describe(self) -> Mapping[str, JsonValue]:
        """Return version, storage driver, GPU runtime and such; {} without an engine."""
        if not self.answers():
            return {}
        with engine_errors("asking the container engine about itself"):
            info: dict[str, Any] = self.client.info()
            parts = self.client.version().get("Components") or ()
        return {
            "host": engine_host(),
            "version": info.get("ServerVersion", ""),
            "storage": info.get("Driver", ""),
            "root": info.get("DockerRootDir", ""),
            "gpu": _passes_gpus(info),
            # Both of Docker's image stores reuse layers that they have; Podman, behind the same
            # API, needs complete archives.
            "layerwise": any(part.get("Name") == "Engine" for part in parts),
            "rootless": any("rootless" in option for option in info.get("SecurityOptions") or ()),
        }

    def is_here(self) -> bool:
        """Say whether containers run on this machine: under its kernel, not in a virtual one."""
        if not engine_host().startswith("unix://"):
            return False
        with engine_errors("asking the container engine about itself"):
            return self.client.info().get("KernelVersion") == os.uname().release

    def has_gpu(self) -> bool:
        """Say whether containers can use this machine's GPUs."""
        if not gpu_names():
            return False
        with engine_errors("asking the container engine about itself"):
            return _passes_gpus(self.client.info())

    def holds(self, reference: str) -> bool:
        """Say whether the engine has the image."""
        return bool(self.inspect(reference))

    def reap(self) -> None:
        """Remove containers and networks left by killed processes."""
        with engine_errors("looking for left-over containers"):
            ours = self.client.containers.list(
                all=True, filters={"label": LABEL_OWNER}, ignore_removed=True
            )
            for container in ours:
                if is_dead(container.labels[LABEL_OWNER]):
                    remove(container)
            for network in self.client.networks.list(filters={"label": LABEL_OWNER}):
                if is_dead((network.attrs.get("Labels") or {}).get(LABEL_OWNER, "")):
                    with contextlib.suppress(*GONE):
                        network.remove()


@contextlib.contextmanager
def engine_errors(doing: str) -> Iterator[None]:
    """Turn the client library's exceptions into an EnvironmentFailure that says what to do."""
    try:
        yield
    except NotFound as problem:
        raise EnvironmentFailure(
            f"{doing}: {problem.explanation}",
            hint="load or pull the image first; `docker images` lists the engine's images",
        ) from problem
    except APIError as problem:
        raise EnvironmentFailure(
            f"{doing}: the container engine reports: {problem.explanation}",
            hint="see `docker info` and the engine's own log",
        ) from problem
    except (DockerException, RequestException, SocketError, ConnectionError) as problem:
        raise EnvironmentFailure(
            f"{doing}: lost the connection to the container engine: {problem}",
            hint="start it again (`systemctl status docker`), then run the same command: "
            "finished stages are kept",
        ) from problem


def _only_file(chunks: Iterable[bytes], path: str, largest: int) -> bytes:
    """Return the file in the tar that an engine sends for a path."""
    data = bytearray()
    for chunk in chunks:
        data += chunk
        if len(data) > largest + _TAR:
            raise InputRefused(f"{path} has more than {largest} bytes", hint="do not use the image")
    try:
        with tarfile.open(fileobj=io.BytesIO(bytes(data))) as archive:
            entry = archive.next()
            content = archive.extractfile(entry) if entry and entry.isfile() else None
            return content.read(largest) if content else b""
    except (tarfile.TarError, EOFError) as problem:
        raise EnvironmentFailure(
            f"the container engine sent no tar for {path}: {problem}", hint="look at its log"
        ) from None


_TAR = 64 << 10
"""Bytes of a tar beside its file."""


def _connect(timeout: int) -> docker.DockerClient:
    """Connect; a request fails if the engine sends nothing for `timeout` seconds."""
    environment = {**os.environ, "DOCKER_HOST": engine_host()}
    scheme, _, path = engine_host().partition("://")
    try:
        if scheme == "unix":  # docker-py leaks its socket where nobody listens
            with socket.socket(socket.AF_UNIX) as trial:
                trial.settimeout(ANSWER_SECONDS)
                trial.connect("/" + path.lstrip("/"))
        return docker.from_env(environment=environment, timeout=timeout)
    except GONE as problem:
        raise EnvironmentFailure(
            f"no container engine answers at {engine_host()}: {problem}",
            hint="start it, set DOCKER_HOST, or use `--runner local`, which needs no engine",
        ) from problem
    except (ValueError, TypeError, AttributeError) as problem:
        raise InputRefused(
            "Docker's client cannot read its settings: an entry of `auths` in its config.json, or"
            " DOCKER_HOST, is damaged",
            hint="repair the entry, or run `docker login` again for that registry",
        ) from problem


def _passes_gpus(info: Mapping[str, Any]) -> bool:
    return "nvidia" in (info.get("Runtimes") or {}) or any(
        "nvidia.com/gpu" in str(device.get("ID", ""))
        for device in info.get("DiscoveredDevices") or ()
    )


LAST_SECONDS = 15.0
"""Seconds that an interrupted command waits for an engine that is already unpacking."""

_NOT_UNPACKED = "Error unpacking image"


def load_in_order(
    connect: Callable[[], docker.DockerClient],
    archives: Iterable[Iterator[bytes]],
    reference: str,
    parallel: int = 1,
) -> None:
    """Send archives, each based on the layers of the previous one; several at a time.

    `parallel` of them are sent while the engine unpacks one, as in a pull, so its disk holds only
    those at a time. Raises EnvironmentFailure if the engine refuses one.
    """
    # Docker unpacks an archive only when it has all of it, and keeps both on disk. So each large
    # layer is sent as an image of its own, based on the previous one: its archive leaves out the
    # lower layers, and its last bytes are held back until those are loaded. An interrupted load
    # goes on, since its intermediate images have names. A read-only registry on loopback to pull
    # from is no faster, and a remote engine cannot reach it.
    uploads: list[ArchiveUpload] = []
    try:
        for archive in archives:
            uploads.append(
                ArchiveUpload(connect, archive, reference, uploads[-1] if uploads else None)
            )
            if len(uploads) >= parallel:
                uploads[-parallel].sent.wait()
            for before in uploads[:-parallel]:
                before.finish()
            del uploads[:-parallel]
        for last in uploads:
            last.finish()
    except BaseException:
        for upload in uploads:
            upload.given_up.set()
        for upload in uploads:
            upload.give_up()
        raise


class ArchiveUpload(threading.Thread):
    """Sends an archive on its own thread, since Ctrl-C interrupts only the main thread.

    The engine starts with the last chunk, so that one is held back until `before` is done.
    """

    def __init__(
        self,
        connect: Callable[[], docker.DockerClient],
        archive: Iterator[bytes],
        reference: str,
        before: ArchiveUpload | None = None,
    ) -> None:
        super().__init__(daemon=True)
        self._connect, self._archive, self._reference = connect, archive, reference
        self._before = before
        self.given_up = threading.Event()
        self.sent = threading.Event()
        """Set once all but the last chunk is sent, or it failed."""
        self._ended = threading.Event()
        """Set at the end: an interrupted `join` treats the thread as ended (Python 3.11, 3.12)."""
        self._problem: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Send the archive and read the engine's reply."""
        try:
            with contextlib.closing(self._connect()) as client:
                api: Any = client.api
                for line in api.load_image(self._chunks()):
                    # Docker 28 with containerd's image store names an image even if unpacking
                    # failed, and reports that among its other lines
                    # (daemon/containerd/image_exporter.go).
                    output = line.get("stream", "").strip()
                    said = output if output.startswith(_NOT_UNPACKED) else ""
                    if failed := line.get("error") or said:
                        raise EnvironmentFailure(
                            f"the container engine did not load {self._reference}: {failed}",
                            hint="check its free disk space with `docker system df`",
                        )
        except BaseException as problem:  # noqa: BLE001 - raised again by `finish`
            self._problem = problem
        finally:
            self._before = None  # else each would keep all previous ones in memory
            self.sent.set()
            self._ended.set()

    def _chunks(self) -> Iterator[bytes]:
        kept = b""
        for chunk in self._archive:
            if self.given_up.is_set():
                raise ConnectionError("given up")  # the engine drops incomplete archives
            if self._before is None:
                yield chunk
                continue
            if kept:
                yield kept
            kept = chunk
        self.sent.set()
        if self._before is not None:
            self._before.finish()
            if self.given_up.is_set():
                raise ConnectionError("given up")
            yield kept

    def finish(self) -> None:
        """Wait for the end; raises the error, if any."""
        self._ended.wait()
        if self._problem is not None:
            raise self._problem

    def give_up(self) -> None:
        """Send no more, and wait until the engine has dropped the image or finished loading it."""
        self.given_up.set()
        self._ended.wait(LAST_SECONDS)


GONE = (DockerException, RequestException, OSError)
"""What the client library raises if the engine is not running or stops."""
ANSWER_SECONDS = 120
"""After which an engine that says nothing counts as gone."""


def remove(container: Container) -> None:
    """Remove a container, running or not; ignores one that is gone, even with its engine."""
    with contextlib.suppress(*GONE):
        container.remove(force=True, v=True)
