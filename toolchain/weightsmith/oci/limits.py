"""Limits of registries: sizes, times and upload methods, each with its source.

The figures come from the registries' own pages and were not tested here. An unknown limit is 0
and is not checked.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from weightsmith.core.errors import UsageError
from weightsmith.oci.image import Opener

GB, MIB, GIB = 10**9, 1 << 20, 1 << 30
_SURE = 1 / 20
"""Fraction of the time limit after which the rate is reliable: half a minute of ten."""
_SPARE = 0.8
"""Fraction of the size that would just fit, as advice: rates vary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryLimits:
    """One kind of registry."""

    name: str
    hosts: str
    """Regular expression of hosts that are certainly of this kind; empty if there are none."""
    largest_layer: int = 0
    """Bytes."""
    upload_seconds: int = 0
    most_layers: int = 0
    in_one_piece: bool = False
    """It refuses chunked uploads."""
    note: str = ""
    """Other known limits, for people."""
    source: str


REGISTRIES = (
    RegistryLimits(
        name="Amazon ECR, private",
        hosts=r"\d+\.dkr[.-]ecr(-fips)?\..*\.(amazonaws\.com(\.cn)?|on\.aws)",
        largest_layer=52_000 * MIB,
        most_layers=4200,
        source="https://docs.aws.amazon.com/AmazonECR/latest/userguide/service-quotas.html",
    ),
    RegistryLimits(
        name="Amazon ECR Public",
        hosts=r"public\.ecr\.aws",
        largest_layer=10_000 * MIB,
        source="https://docs.aws.amazon.com/AmazonECR/latest/public/public-service-quotas.html",
    ),
    RegistryLimits(
        name="GitHub Container Registry",
        hosts=r"ghcr\.io",
        largest_layer=10 * GB,
        upload_seconds=600,
        in_one_piece=True,
        source="https://docs.github.com/en/packages/working-with-a-github-packages-registry/"
        "working-with-the-container-registry",
    ),
    RegistryLimits(
        name="Google Artifact Registry",
        hosts=r"[a-z0-9-]+-docker\.pkg\.dev|([a-z]+\.)?gcr\.io",
        in_one_piece=True,
        source="https://cloud.google.com/artifact-registry/docs/docker/pushing-and-pulling",
    ),
    RegistryLimits(
        name="Azure Container Registry",
        hosts=r"[a-z0-9]+\.azurecr\.(io|cn|us)",
        largest_layer=200 * GIB,
        source="https://learn.microsoft.com/azure/container-registry/container-registry-skus",
    ),
    RegistryLimits(
        name="Docker Hub",
        hosts=r"docker\.io",
        note="none published",
        source="https://docs.docker.com/docker-hub/usage/",
    ),
    RegistryLimits(
        name="GitLab",
        hosts=r"registry\.gitlab\.com",
        note="self-hosted on S3, versions of 2023 accepted no layers above 10 GB",
        source="https://gitlab.com/gitlab-org/container-registry/-/issues/1062",
    ),
    RegistryLimits(
        name="Harbor",
        hosts="",
        note="layers above 32 GiB need 2.9.2",
        source="https://github.com/goharbor/harbor/issues/19573",
    ),
    RegistryLimits(
        name="distribution",
        hosts="",
        source="https://distribution.github.io/distribution/about/configuration/",
    ),
)


def limits_of(host: str) -> RegistryLimits | None:
    """Return the known limits of a registry by its host, or None."""
    return next((r for r in REGISTRIES if r.hosts and re.fullmatch(r.hosts, host.lower())), None)


def check_layers(layers: Iterable[tuple[str, int]], host: str) -> None:
    """Refuse, before anything is sent, a layer above the registry's known limit.

    `layers` are names and sizes. Raises UsageError.
    """
    limits = limits_of(host)
    if limits is None or not limits.largest_layer:
        return
    for name, size in layers:
        if size > limits.largest_layer:
            raise UsageError(
                f"{limits.name} accepts layers of up to {limits.largest_layer} bytes, and {name} "
                f"has {size}",
                hint="split it: --max-layer-size for safetensors, `quantize --split-max-size` for "
                f"GGUF; the limit is from {limits.source}",
            )


class UploadDeadline:
    """Warns once per push, well before the registry's time limit, about a slow layer.

    A warning and no abort, since the rate rises when other layers are done. Splitting layers here
    would make the digest depend on the network.
    """

    def __init__(
        self, limits: RegistryLimits | None, warn: Callable[[str], None], clock: Callable[[], float]
    ) -> None:
        self._name = limits.name if limits else ""
        self._limit = limits.upload_seconds if limits else 0
        self._warn = warn
        self._clock = clock
        self._warned = not self._limit
        self._lock = threading.Lock()

    def over(self, opener: Opener, size: int, file: str = "") -> Opener:
        """Return an opener of the same layer of `size` bytes that watches the upload rate."""

        def watched() -> Iterator[bytes]:
            began, done = self._clock(), 0
            for chunk in opener():
                yield chunk
                done += len(chunk)
                if not self._warned:
                    self._look(done, size, self._clock() - began, file)

        return watched

    def _look(self, done: int, size: int, seconds: float, file: str) -> None:
        if seconds < self._limit * _SURE or seconds * size <= self._limit * done:
            return
        with self._lock:
            if self._warned:
                return
            self._warned = True
        rate = done / seconds
        fits = rate * self._limit * _SPARE
        advice = f"{fits // 1e8 / 10:g}GB" if fits >= 1e9 else f"{max(1, fits // 1e6):.0f}MB"
        self._warn(
            f"{file or 'a layer'} will take about {size / rate / 60:.0f} minutes at "
            f"{rate / 1e6:.1f} MB/s, and {self._name} ends uploads after {self._limit / 60:.0f}: "
            f"bake it with --max-layer-size {advice} (for GGUF, `quantize --split-max-size`)"
        )
