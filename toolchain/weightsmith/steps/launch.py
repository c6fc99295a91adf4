"""Image -> a session with its server; weightsmith starts every image here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from weightsmith.core.cpus import idle
from weightsmith.core.ports import StartSpec
from weightsmith.evaluating.client import wait_until_healthy
from weightsmith.evaluating.session import ServerSession, SessionLimits
from weightsmith.evaluating.smoke import Smoke
from weightsmith.oci.image import Image, is_for_host
from weightsmith.provenance.labels import plan_of
from weightsmith.serving.devices import AMX, AMX_FLAGS, is_cpu
from weightsmith.serving.engine import Engine
from weightsmith.serving.plan import ServingConfig
from weightsmith.steps.tools import Tools

_START_SECONDS = 600.0
_SLOWEST_DISK = 50_000_000
"""Read speed of the slowest supported disk, in bytes per second."""


@contextmanager
def start(
    reference: str,
    spec: StartSpec,
    tools: Tools,
    *,
    health_path: str,
    seconds: float,
    limits: SessionLimits | None = None,
    smoke: Smoke | None = None,
) -> Iterator[ServerSession]:
    """Start an image, wait until it is healthy, and yield a session; stop the server afterwards.

    `reference` is a name in the container engine or `oci:DIR`; `smoke` records the health check.
    Raises CheckFailed, with the server's last lines, if it is not healthy after `seconds`.
    """
    with (
        tools.launcher.serve(reference, spec) as endpoint,
        ServerSession(endpoint, limits) as session,
    ):

        def healthy() -> str:
            waited = wait_until_healthy(endpoint, health_path, seconds)
            confinement = ", ".join(endpoint.confinement)
            return f"ready after {waited:.1f} s" + (f"; {confinement}" if confinement else "")

        (smoke or Smoke()).check("health", session, healthy)
        yield session


def started_by(config: ServingConfig, engine: Engine) -> StartSpec:
    """Return how a built image is started, as its users would."""
    return StartSpec(
        port=config.port,
        env=idle_cpus(engine.threads_variable),
        port_variable=engine.port_variable,
        host_variable=engine.host_variable,
        memory_bytes=config.plan.memory_limit_bytes,
        shm_bytes=config.plan.shm_bytes,
        use_gpu=not is_cpu(config.plan.device),
    )


def start_seconds(size: int) -> float:
    """Return how long an image with weights of so many bytes may take to be healthy."""
    return max(_START_SECONDS, size / _SLOWEST_DISK)


def idle_cpus(variable: str) -> Mapping[str, str]:
    """Return the environment that gives an engine a thread for each idle CPU.

    `variable` sets its threads; {} without one.
    """
    return {variable: str(idle())} if variable else {}


def why_not_started(image: Image, tools: Tools) -> str:
    """Return why this machine cannot start a built image; "" if it can."""
    found = what_is_missing(image, tools)
    return f"the image is {found}: it was not started" if found else ""


def what_is_missing(image: Image, tools: Tools) -> str:
    """Return what a built image is for that this machine is not or has not; "" for nothing."""
    if not is_for_host(image):
        return f"for {image.platform}"
    return missing_device(plan_of(image.labels).device, tools)


def missing_device(device: str, tools: Tools) -> str:
    """Return the same of a planned device, such as `for a GPU and none is here`; any GPU counts."""
    if device == AMX:
        flags = tools.launcher.cpu_flags()
        if flags is None:
            return (
                "for a CPU with AMX and the container engine does not say that its machine has one"
            )
        return "" if flags >= AMX_FLAGS else "for a CPU with AMX and this machine has none"
    if is_cpu(device) or tools.engine.describe().get("gpu"):
        return ""
    # Without an engine, a layout is started here, with this machine's own GPUs.
    here = None if tools.engine.answers() else tools.launcher.devices("")
    return "" if here and here.gpus else "for a GPU and none is here"
