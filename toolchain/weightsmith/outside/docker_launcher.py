"""Starts an image in the container engine as its users will, but isolated."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from docker.errors import APIError
from docker.models.containers import Container
from docker.models.networks import Network
from requests.exceptions import RequestException

from weightsmith.core.cpus import flags
from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.ports import Endpoint, StartSpec
from weightsmith.core.values import Json
from weightsmith.outside.docker import GONE, DockerEngine, engine_errors, engine_host, remove
from weightsmith.outside.docker_requests import LABEL_OWNER, server_request
from weightsmith.outside.ownership import owner_token
from weightsmith.outside.start_errors import from_engine_message


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
            request = server_request(image, spec, owner_token(), gpu=gpu, network=name)
            containers: Any = self._engine.client.containers
            with _starting(image):
                container = containers.create(**request)
            try:
                yield self._started(container, image, spec, name)
            finally:
                remove(container)

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
    """Turn the client library's exceptions into an error of the image or of the engine."""
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
