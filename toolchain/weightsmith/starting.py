"""Image -> a session with its server; weightsmith starts every image here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from weightsmith.cpus import idle
from weightsmith.evaluating.client import wait_until_healthy
from weightsmith.evaluating.session import ServerSession, SessionLimits
from weightsmith.evaluating.smoke import Smoke
from weightsmith.oci.image import Image
from weightsmith.oci.index import is_own
from weightsmith.ports import StartSpec
from weightsmith.provenance.labels import plan_of
from weightsmith.tools import Tools


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


def idle_cpus(variable: str) -> Mapping[str, str]:
    """Return the environment that gives an engine a thread for each idle CPU.

    `variable` sets its threads; {} without one.
    """
    if not variable:
        return {}
    return {variable: str(idle())}


def why_not_started(image: Image, tools: Tools) -> str:
    """Return why this machine cannot start a built image; "" if it can."""
    if not is_own(image):
        return f"the image is for {image.platform}: it was not started"
    if not has_device(plan_of(image.labels).device, tools):
        return "the image is for a GPU and none is here: it was not started"
    return ""


def has_device(device: str, tools: Tools) -> bool:
    """Return whether this machine has a planned device; any GPU counts."""
    return device == "cpu" or bool(tools.engine.describe().get("gpu"))
