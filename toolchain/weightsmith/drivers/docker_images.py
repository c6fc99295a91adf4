"""Builds the builder images: what `docker build` is good at."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from weightsmith.drivers import process
from weightsmith.drivers.bases import base
from weightsmith.drivers.docker_requests import build_command
from weightsmith.drivers.downloading import persistently
from weightsmith.drivers.environment import Pins
from weightsmith.drivers.pip_settings import pip_setting
from weightsmith.drivers.toolset import toolset_folder
from weightsmith.drivers.wheels import configured_wheels, pick_wheels
from weightsmith.drivers.wire import open_log
from weightsmith.errors import EnvironmentFailure, UsageError
from weightsmith.ports import Progress
from weightsmith.resources import builder_pins, compiled_engines, containerfile, images
from weightsmith.values import key_of

_STEP = re.compile(r"#\d+ \[[^\]]*?(\d+)/(\d+)\] ")
_SAID = re.compile(r"#\d+ +[\d.]+ (.*)")
"""A line that a program printed inside the build."""
_PLATFORMS = {"x86_64": "linux/amd64", "aarch64": "linux/arm64", "arm64": "linux/arm64"}


def base_reference(flavour: str) -> str:
    """Return the image that builders start from: `WEIGHTSMITH_BUILDER_BASE` or the lock's."""
    override = os.environ.get("WEIGHTSMITH_BUILDER_BASE")
    machine = platform.machine()
    return override or base(f"builder-{flavour}").pinned(_PLATFORMS.get(machine, machine))


def image_tag(builder: str, flavour: str) -> str:
    """Return the builder image's name: it changes with all that the image is made from."""
    made_from = key_of([builder_pins(builder), flavour, base_reference(flavour)])
    return f"weightsmith-builder-{builder}:{made_from.short}"


def build_image(builder: str, flavour: str, host: str, cache: Path, progress: Progress) -> None:
    """Build a builder's image under its tag; raises EnvironmentFailure with the build's end."""
    _require_buildx(host)
    reference = base_reference(flavour)
    progress.note(f"building the {flavour} image of the builder {builder!r} on {reference}, once")
    with (
        open_log(cache, f"image-{builder}") as log,
        tempfile.TemporaryDirectory(prefix="weightsmith-wheels-") as wheels,
    ):
        command = build_command(
            containerfile=containerfile(builder),
            context=images(),
            tag=image_tag(builder, flavour),
            arguments={"BUILDER": builder, **_arguments(flavour, reference)},
            secrets=_secrets(),
            contexts=_contexts(builder, cache, Path(wheels)),
        )

        def hear(line: str) -> None:
            log.write(line + "\n")
            if step := _STEP.match(line):
                progress.advance(int(step[1]), int(step[2]), "steps")

        # What was built stays: only the step that failed is done again.
        done = persistently(
            lambda: process.run(command, env=_environment(host), on_line=hear), progress
        )
        _only_said(done).require(
            f"building the image of the builder {builder!r}",
            hint="a base that cannot be pulled: WEIGHTSMITH_BUILDER_BASE names another; a package "
            "index behind certificates of your own: WEIGHTSMITH_CA_BUNDLE names their file; wheels "
            f"that no index has: WEIGHTSMITH_WHEELS names their folder; log: {log.name}",
        )


def _only_said(done: process.Completed) -> process.Completed:
    """Leave of a failed build's output what its programs printed, without BuildKit's frame."""
    said = tuple(match[1] for line in done.tail if (match := _SAID.match(line)))
    errors = tuple(line for line in done.tail if line.startswith("ERROR"))
    return dataclasses.replace(done, tail=said[-8:] or errors or done.tail[-3:])


def _require_buildx(host: str) -> None:
    hint = "install the docker command and its buildx plugin (Debian: docker-cli docker-buildx)"
    if shutil.which("docker") is None:
        raise EnvironmentFailure("the docker command is not there", hint=hint)
    asked = process.run(["docker", "buildx", "version"], env=_environment(host), timeout=30)
    if asked.returncode != 0:
        raise EnvironmentFailure("the docker command has no buildx", hint=hint)


def _arguments(flavour: str, reference: str) -> dict[str, str]:
    arguments = {"BASE": reference, "FLAVOUR": flavour}
    index = pip_setting("index-url")
    # An argument is readable in the image's history, so an index with a password is not passed.
    if index and "@" not in index:
        arguments["PIP_INDEX_URL"] = index
    if os.environ.get("PIP_NO_INDEX"):
        arguments["PIP_NO_INDEX"] = "1"
    return arguments


def _secrets() -> dict[str, Path]:
    """Return the certificates to trust while building.

    Somebody who sets SSL_CERT_FILE trusts more than a plain base image does, so it is used where
    WEIGHTSMITH_CA_BUNDLE does not say otherwise. It is a secret of the build: nothing of it stays.
    """
    named = os.environ.get("WEIGHTSMITH_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
    if not named:
        return {}
    if not Path(named).is_file():
        raise UsageError(
            f"the certificate file {named} is not there",
            hint="correct WEIGHTSMITH_CA_BUNDLE or SSL_CERT_FILE",
        )
    return {"ca_bundle": Path(named)}


def _contexts(builder: str, cache: Path, wheels: Path) -> Mapping[str, Path]:
    """Return the named contexts: wheels that no index has, and tools compiled here already."""
    contexts = {}
    if named := os.environ.get("WEIGHTSMITH_WHEELS"):
        contexts["wheels"] = Path(named)
    elif pick_wheels(configured_wheels(), Pins(name=builder, flavour="cpu"), wheels):
        contexts["wheels"] = wheels
    for engine in compiled_engines(builder):
        tools = toolset_folder(cache, engine)
        if tools.is_dir():
            contexts[engine] = tools
    return contexts


def _environment(host: str) -> dict[str, str]:
    return process.scrubbed(
        {"DOCKER_HOST": host}, network=True, prefixes=("DOCKER_", "BUILDX_", "BUILDKIT_", "XDG_")
    )
