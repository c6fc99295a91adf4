"""An image's configuration: what one adds to its base's, and checks of those from outside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from weightsmith.core.values import Json, JsonValue
from weightsmith.oci import manifests

OWN_LABELS = "dev.weightsmith."
_ITS_OWN = ("org.opencontainers.image.version", OWN_LABELS)
"""Beginnings of labels that are not inherited: a base's are of its own version and weights."""
_SECOND = 1_000_000_000
"""Nanoseconds, in which Docker keeps times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Healthcheck:
    """A command that exits with 0 when the server is ready; times in seconds."""

    command: tuple[str, ...]
    interval: int = 10
    timeout: int = 5
    start_period: int = 900
    """Loading weights takes minutes; earlier failures do not count."""
    retries: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """What an image adds to its base's configuration; None or empty keeps the base's."""

    user: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    ports: tuple[int, ...] = ()
    healthcheck: Healthcheck | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    working_dir: str | None = None


def merged(base: Mapping[str, Json], added: ImageConfig) -> dict[str, JsonValue]:
    """Return a base's configuration with what is added."""
    both = dict(base)
    env = dict(pair.partition("=")[::2] for pair in base.get("Env") or ())
    env.update(added.env)
    both["Env"] = [f"{key}={value}" for key, value in env.items()]
    labels = base.get("Labels") or {}
    inherited = {k: v for k, v in labels.items() if not k.startswith(_ITS_OWN)}
    both["Labels"] = {**inherited, **added.labels}
    both.pop("OnBuild", None)  # as Docker does: it is for builds on top of the base itself
    if added.user is not None:
        both["User"] = added.user
    if added.entrypoint is not None:
        # As Docker does: a base's command was meant for the base's entrypoint.
        both["Entrypoint"] = list(added.entrypoint)
        both.pop("Cmd", None)
    if added.cmd is not None:
        both["Cmd"] = list(added.cmd)
    if added.working_dir is not None:
        both["WorkingDir"] = added.working_dir
    if added.ports:
        ports: dict[str, JsonValue] = {f"{port}/tcp": {} for port in added.ports}
        both["ExposedPorts"] = {**(base.get("ExposedPorts") or {}), **ports}
    if added.healthcheck:
        # Docker's extension of OCI's: https://github.com/moby/docker-image-spec spec.md
        check = added.healthcheck
        both["Healthcheck"] = {
            "Test": ["CMD", *check.command],
            "Interval": check.interval * _SECOND,
            "Timeout": check.timeout * _SECOND,
            "StartPeriod": check.start_period * _SECOND,
            "Retries": check.retries,
        }
    return {key: value for key, value in both.items() if value not in (None, [], {})}


def checked(settings: Mapping[str, JsonValue], where: str) -> Mapping[str, JsonValue]:
    """Return a configuration from outside; raises InputRefused if a field has the wrong type."""
    config = settings.get("config") or {}
    if not isinstance(config, dict):
        raise manifests.damaged(f"{where}: the configuration's 'config' is not an object")
    kinds: Mapping[str, type] = {
        **dict.fromkeys(("Env", "Entrypoint", "Cmd"), list),
        **dict.fromkeys(("Labels", "ExposedPorts", "Volumes"), dict),
        **dict.fromkeys(("User", "WorkingDir"), str),
    }
    for name, kind in kinds.items():
        value = config.get(name)
        wrong = value is not None and not isinstance(value, kind)
        inner = value if isinstance(value, list) else []
        if wrong or any(not isinstance(item, str) for item in inner):
            raise manifests.damaged(f"{where}: the configuration's {name!r} is malformed")
    texts(config.get("Labels"), where)
    return settings


def texts(value: JsonValue, where: str) -> dict[str, str]:
    """Return annotations or labels; raises InputRefused if they are no strings."""
    found = {} if value is None else value
    if not isinstance(found, dict) or any(not isinstance(text, str) for text in found.values()):
        raise manifests.damaged(f"{where}: annotations and labels must be strings")
    return dict(found)
