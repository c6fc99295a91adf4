"""Builds the builder images with `docker build`."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure, UsageError
from weightsmith.core.files import path_in
from weightsmith.core.platforms import host_platform
from weightsmith.core.ports import Progress
from weightsmith.core.resources import builder_pins, compiled_engines, containerfile, images
from weightsmith.core.values import Digest, key_of
from weightsmith.outside import process
from weightsmith.outside.downloading import PipSettings, persistently
from weightsmith.outside.environment import Pins
from weightsmith.outside.toolset import toolset_folder
from weightsmith.outside.worker_protocol import logged_steps, open_log

_STEP = re.compile(r"#\d+ \[[^\]]*?(\d+)/(\d+)\] ")
_SAID = re.compile(r"#\d+ +[\d.]+ (.*)")
"""A line printed by a program inside the build."""


def base_reference(flavour: str) -> str:
    """Return the builders' base image: `WEIGHTSMITH_BUILDER_BASE`, or the lock's."""
    override = os.environ.get("WEIGHTSMITH_BUILDER_BASE")
    return override or base(f"builder-{flavour}").pinned(host_platform())


def image_tag(builder: str, flavour: str) -> str:
    """Return the builder image's name; it changes with everything the image is made from."""
    made_from = key_of([builder_pins(builder), flavour, base_reference(flavour)])
    return f"weightsmith-builder-{builder}:{made_from.short}"


def build_command(
    *,
    containerfile: Path,
    context: Path,
    tag: str,
    arguments: Mapping[str, str],
    secrets: Mapping[str, Path],
    contexts: Mapping[str, Path],
) -> list[str]:
    """Return the command that builds a builder image."""
    command = ["docker", "buildx", "build", "--load", "--progress=plain", "--provenance=false"]
    command += ["--file", str(containerfile), "--tag", tag]
    for name, value in sorted(arguments.items()):
        command += ["--build-arg", f"{name}={value}"]
    for name, file in sorted(secrets.items()):
        command += ["--secret", f"id={name},src={file}"]
    for name, folder in sorted(contexts.items()):
        command += ["--build-context", f"{name}={folder}"]
    return [*command, str(context)]


def build_image(builder: str, flavour: str, host: str, cache: Path, progress: Progress) -> None:
    """Build a builder's image; EnvironmentFailure has the end of the build's output."""
    _require_buildx(host)
    reference = base_reference(flavour)
    progress.note(f"building the {flavour} image of the builder {builder!r} on {reference}, once")
    with (
        open_log(cache, f"image-{builder}") as log,
        tempfile.TemporaryDirectory(prefix="weightsmith-wheels-") as wheels,
    ):
        contexts = {}
        if named := path_in("WEIGHTSMITH_WHEELS"):
            contexts["wheels"] = named
        elif pick_wheels(configured_wheels(), Pins(name=builder, flavour="cpu"), Path(wheels)):
            contexts["wheels"] = Path(wheels)
        folders = {name: toolset_folder(cache, name) for name in compiled_engines(builder)}
        contexts |= {name: folder for name, folder in folders.items() if folder.is_dir()}
        command = build_command(
            containerfile=containerfile(builder),
            context=images(),
            tag=image_tag(builder, flavour),
            arguments={"BUILDER": builder, **_arguments(flavour, reference)},
            secrets=_secrets(),
            contexts=contexts,
        )
        on_line = logged_steps(log, progress, _STEP, "steps")
        # Finished steps are cached: only the failed one is repeated.
        done = persistently(
            lambda: process.run(command, env=_environment(host), on_line=on_line), progress
        )
        _only_said(done).require(
            f"building the image of the builder {builder!r}",
            hint="if the base cannot be pulled, use `--runner local`, which needs no image, or set "
            "WEIGHTSMITH_BUILDER_BASE to one that can; set WEIGHTSMITH_CA_BUNDLE to a private CA's "
            "certificates, WEIGHTSMITH_WHEELS to a folder of wheels that the package index lacks; "
            f"log: {log.name}",
        )


def _only_said(done: process.Completed) -> process.Completed:
    # Of a failed build, what programs printed, without BuildKit's own lines.
    said = tuple(match[1] for line in done.tail if (match := _SAID.match(line)))
    errors = tuple(line for line in done.tail if line.startswith("ERROR"))
    return dataclasses.replace(done, tail=said[-8:] or errors or done.tail[-3:])


def _require_buildx(host: str) -> None:
    hint = "install the docker command and its buildx plugin (Debian: docker-cli docker-buildx)"
    if shutil.which("docker") is None:
        raise EnvironmentFailure("the docker command was not found", hint=hint)
    asked = process.run(["docker", "buildx", "version"], env=_environment(host), timeout=30)
    if asked.returncode != 0:
        raise EnvironmentFailure("the docker command has no buildx plugin", hint=hint)


def _arguments(flavour: str, reference: str) -> dict[str, str]:
    arguments = {"BASE": reference, "FLAVOUR": flavour}
    index = PipSettings().get("index-url")
    # Build arguments are visible in the image's history, so an index with a password is not passed.
    if index and "@" not in index:
        arguments["PIP_INDEX_URL"] = index
    if os.environ.get("PIP_NO_INDEX"):
        arguments["PIP_NO_INDEX"] = "1"
    return arguments


def _secrets() -> dict[str, Path]:
    """Return the certificates to trust during the build, as a build secret.

    WEIGHTSMITH_CA_BUNDLE, else SSL_CERT_FILE: whoever sets that trusts CAs that the base image does
    not. A build secret leaves nothing in the image.
    """
    named = path_in("WEIGHTSMITH_CA_BUNDLE") or path_in("SSL_CERT_FILE")
    if not named:
        return {}
    if not named.is_file():
        raise UsageError(
            f"no such certificate file: {named}",
            hint="correct WEIGHTSMITH_CA_BUNDLE or SSL_CERT_FILE",
        )
    return {"ca_bundle": named}


def _environment(host: str) -> dict[str, str]:
    return process.scrubbed(
        {"DOCKER_HOST": host}, network=True, prefixes=("DOCKER_", "BUILDX_", "BUILDKIT_", "XDG_")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseImage:
    """An upstream image: its tag, and its digest per platform if pinned."""

    reference: str
    digests: Mapping[str, Digest | None]
    """Platform (`linux/amd64`) -> digest; None if not pinned."""

    def pinned(self, platform: str) -> str:
        """Return the reference by digest if the lock has one for the platform, else by tag."""
        digest = self.digests.get(platform)
        return f"{self.reference}@{digest}" if digest else self.reference


def read_bases(path: Path | None = None) -> dict[str, BaseImage]:
    """Return all bases in the lock file by purpose; raises UsageError if it is damaged."""
    file = images() / "bases.lock" if path is None else path
    bases = {}
    try:
        for purpose, entry in json.loads(file.read_text("utf-8")).items():
            if not isinstance(entry["digests"], dict):
                raise TypeError(f"the digests of {purpose} are not an object")
            bases[purpose] = BaseImage(
                reference=str(entry["reference"]),
                digests={
                    name: Digest(digest) if digest else None
                    for name, digest in sorted(entry["digests"].items())
                },
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UsageError(
            f"{file} cannot be read: {problem}", hint="restore it from version control"
        ) from problem
    return bases


def base(purpose: str) -> BaseImage:
    """Return the base for a purpose such as `builder-cpu`; raises UsageError if unknown."""
    bases = read_bases()
    if purpose not in bases:
        raise UsageError(
            f"no base image for {purpose!r} in images/bases.lock",
            hint=f"it has {', '.join(sorted(bases))}",
        )
    return bases[purpose]


_PIN = re.compile(r"([A-Za-z0-9._-]+)==([^\s;\\]+)")


def configured_wheels() -> tuple[Path, ...]:
    """Return the local folders in pip's `find-links` configuration."""
    links = [link for value in PipSettings().every("find-links") for link in value.split()]
    folders = [Path(link.removeprefix("file://")) for link in links]
    return tuple(dict.fromkeys(folder for folder in folders if folder.is_dir()))


def pick_wheels(folders: Iterable[Path], pins: Pins, target: Path) -> bool:
    """Put the builder's pinned wheels from the folders into `target`; say whether there were any.

    Only those: a folder of wheels may have many gigabytes, and all of it would be sent.
    """
    texts = [file.read_text("utf-8") for file in (pins.light, pins.torch) if file is not None]
    wanted = {(_normal(name), version) for text in texts for name, version in _PIN.findall(text)}
    found = False
    for wheel in (wheel for folder in folders for wheel in sorted(folder.glob("*.whl"))):
        name, version = wheel.name.split("-")[:2]
        place = target / wheel.name
        # A pin without a local part such as `+cpu` matches every build of the version.
        names = {(_normal(name), version), (_normal(name), version.partition("+")[0])}
        if names & wanted and not place.exists():
            found = True
            try:
                os.link(wheel, place)
            except OSError:
                shutil.copyfile(wheel, place)
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
