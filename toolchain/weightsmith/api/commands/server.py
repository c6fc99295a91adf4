"""The server that a command queries: a started image, or a server that is already running."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from urllib.parse import urlsplit

import httpx

from weightsmith.building.targets import all_targets
from weightsmith.core.errors import CheckFailed, InputRefused, UsageError
from weightsmith.core.ports import Endpoint, StartSpec
from weightsmith.core.values import Json, without_passwords
from weightsmith.evaluating.client import Served, check_served_name, find_served, first_name
from weightsmith.evaluating.session import ServerSession, SessionLimits
from weightsmith.oci import connections
from weightsmith.oci.image import Image
from weightsmith.oci.layout import is_layout, locate, read_layout
from weightsmith.oci.references import DOCKER_HUB, Reference
from weightsmith.oci.registry import reference_of
from weightsmith.provenance.labels import plan_of
from weightsmith.steps.launch import idle_cpus, start
from weightsmith.steps.outputs import candidate, discard_candidate
from weightsmith.steps.tools import Tools

_START_SECONDS = 900.0


@contextmanager
def session_with(
    tools: Tools,
    limits: SessionLimits | None = None,
    *,
    image: str = "",
    url: str = "",
    modest: bool = False,
) -> Iterator[ServerSession]:
    """Yield a session with a ready server; stops the server afterwards if we started it.

    `image` is a reference or a layout's folder; without one, a server runs at `url`. `modest`
    leaves busy CPUs alone if the engine's number of threads can be set. The key in
    WEIGHTSMITH_API_KEY is sent only to a server at a URL.
    Raises UsageError for a missing image, or a malformed URL or key, CheckFailed for an image that
    does not become ready.
    """
    if url:
        if not _is_address(url):
            raise UsageError(
                f"--url {without_passwords(url)}: invalid URL",
                hint="for example --url http://127.0.0.1:8000",
            )
        address = url.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
        running = Endpoint(url=address, logs=lambda _: "", alive=lambda: True)
        trusted = connections.trusted()
        with ServerSession(running, limits, key=api_key(), trusted=trusted) as session:
            yield session
        return
    with _startable(image, tools) as (startable, config):
        labels = config.get("Labels") or {}
        target = all_targets().get(labels.get("dev.weightsmith.target", ""))
        named = (port.partition("/")[0] for port in config.get("ExposedPorts") or ())
        ports = [int(port) for port in named if port.isdecimal() and 0 < int(port) < 1 << 16]
        spec = StartSpec(
            port=min(ports, default=8000),
            env=idle_cpus(target.engine.threads_variable) if target and modest else {},
            port_variable=target.engine.port_variable if target else "",
            host_variable=target.engine.host_variable if target else "",
            shm_bytes=plan_of(labels).shm_bytes,
            use_gpu=True,
        )
        path = target.engine.health_path if target else "/health"
        started = start(
            startable, spec, tools, health_path=path, seconds=_START_SECONDS, limits=limits
        )
        with started as session:
            yield session


def api_key() -> str:
    """Return the key in WEIGHTSMITH_API_KEY, or ""; a line end after it, as files have, is none.

    Raises UsageError, without the key, if it cannot be sent: the HTTP library would print it.
    """
    key = os.environ.get("WEIGHTSMITH_API_KEY", "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise UsageError(
            "WEIGHTSMITH_API_KEY has a space, a line end or another character that no key has",
            hint="set it to the key alone",
        )
    return key


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        httpx.URL(url).host.encode("idna")  # as the resolver does
        known = parts.port is None or parts.port > 0
    except (ValueError, httpx.InvalidURL):
        return False
    plain = not (parts.query or parts.fragment)
    return known and plain and parts.scheme in ("http", "https") and bool(parts.hostname)


@contextmanager
def _startable(image: str, tools: Tools) -> Iterator[tuple[str, Mapping[str, Json]]]:
    """Yield what the launcher starts, and the image's configuration.

    A layout is started where it is, and an image of the container engine there. Any other is read
    from its registry into the engine, or without one into a layout, and deleted afterwards.
    """
    folder, name = locate(image) if is_layout(image) else (None, None)
    named = None if folder else reference_of(image)
    held = tools.engine.inspect(image) if named and tools.engine.answers() else {}
    if held:
        yield image, held.get("Config") or {}
        return
    found = read_layout(folder, name) if folder else _pulled(image, tools)
    if found.has_files:
        raise UsageError(
            f"{image} holds a model's files and no program to start",
            hint="give an image of the kind `image`",
        )
    if folder and not name:
        yield f"oci:{folder}", found.config
        return
    with tools.scratch() as scratch:
        layout = None if tools.images_in_engine else scratch / "image"
        try:
            with candidate(found, layout, tools) as place:
                yield place, found.config
        finally:
            discard_candidate(found, layout, tools)


def _pulled(image: str, tools: Tools) -> Image:
    place, why = Reference.parse(image), ""
    # As in `inspect`: a name without a registry, such as `support-bot`, is not on Docker Hub.
    if place.registry != DOCKER_HUB or image.startswith(DOCKER_HUB):
        tools.progress.note(f"{image} is read from its registry")
        try:
            return tools.registry.pull(place)
        except InputRefused as error:
            why = f", and {error.message}"
    raise UsageError(
        f"the container engine has no image {image}{why}",
        hint="load or push it first, or give a layout as oci:DIR",
    )


def served_model(session: ServerSession, requested: str, *, may_ask: bool) -> Served:
    """Return the server's model: `requested`, or the first that it lists.

    A server of somebody else's (not `may_ask`) is sent no request that the user did not ask for.

    Raises
    ------
    CheckFailed if the server does not list `requested`, or lists no model.

    """
    # Short time limits: a server that cannot list its models hangs.
    patient = session.limits
    session.limits = replace(patient, request_seconds=min(30.0, patient.request_seconds), tries=2)
    name = requested
    try:
        if requested:
            check_served_name(session, requested)
        else:
            name = first_name(session)
    except CheckFailed as error:
        if not requested or "HTTP 404" not in error.message:
            raise
    finally:
        session.limits = patient
    return find_served(session, name, may_ask=may_ask)
