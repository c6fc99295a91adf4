"""Where a command works and what it may use there: flags that most commands share.

A field is a flag and a keyword of the Python functions; its metadata have the flag's help.

One frozen value from the edge on: each option was named four times between a flag and its use. It
is no section of the recipe, because where a build runs is no property of the image.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TypeVar

from weightsmith.core.values import JsonValue

_T = TypeVar("_T")


def _option(default: _T, description: str) -> _T:
    return field(default=default, metadata={"description": description})


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a command is run; empty texts stand for what environment and configuration say."""

    runner: str = _option("auto", "where heavy stages run: auto, docker or local")
    allow_network_in_jobs: bool = _option(
        False, "run jobs even if this machine cannot isolate them from the network"
    )
    memory: str = _option("", "most memory that a job may use, such as 6GiB; default: what is free")
    insecure: bool = _option(False, "allow registries without HTTPS or with untrusted certificates")
    sign_key: str = _option(
        "",
        "private key to sign with: a PEM or cosign key file, or a reference such as awskms://…",
    )
    cache: str = _option(
        "",
        "cache that machines share, read and written: oci://REGISTRY/REPOSITORY, "
        "s3://BUCKET/PREFIX or a folder; off for none",
    )
    cache_from: str = _option("", "a second cache that is only read")

    def given(self) -> dict[str, JsonValue]:
        """Return the options that are set, for a request to another process."""
        return {name: value for name, value in asdict(self).items() if value}
