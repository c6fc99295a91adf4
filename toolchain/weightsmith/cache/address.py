"""Addresses of shared caches, and the settings of the one that a user has."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from weightsmith.core.errors import UsageError
from weightsmith.core.values import JsonValue
from weightsmith.oci.references import Reference
from weightsmith.recipe.user_config import TRUSTED, CacheSettings, RunOptions

_VARIABLE = "WEIGHTSMITH_CACHE"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_FORMS = "oci://REGISTRY/REPOSITORY, s3://BUCKET/PREFIX, or a folder"
OFF = "off"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a cache is."""

    kind: Literal["folder", "oci", "s3"]
    place: str
    """The folder, the repository with its registry, or bucket and prefix."""

    def __str__(self) -> str:
        """Return it as a user gives it."""
        return self.place if self.kind == "folder" else f"{self.kind}://{self.place}"

    @property
    def folder(self) -> Path:
        """The folder; only for the kind `folder`."""
        return Path(self.place)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """The caches of a command; None for none."""

    both: Address | None
    """It is read and written."""
    read: Address | None
    """It is only read."""
    settings: CacheSettings


def parse_address(text: str, flag: str) -> Address:
    """Return the address; raises UsageError if it is none. `flag` says where it was given."""
    scheme, separator, rest = text.partition("://")
    match scheme if separator else "file":
        case "file":
            folder = Path(rest if separator else text).expanduser().absolute()
            if folder.exists() and not folder.is_dir():
                raise _refused(flag, text, "it is not a folder")
            return Address("folder", str(folder))
        case "oci":
            try:
                found = Reference.parse(rest)
            except UsageError as error:
                raise UsageError(
                    f"{flag}: {error.message}",
                    hint="for example oci://registry.example.com/team/cache",
                ) from None
            if ":" in rest.rpartition("/")[2] or "@" in rest or "/" not in rest:
                raise _refused(flag, text, "it needs a registry and a repository, without a tag")
            return Address("oci", found.name)
        case "s3":
            bucket, _, prefix = rest.partition("/")
            parts = [part for part in prefix.split("/") if part]
            if not _BUCKET.fullmatch(bucket) or ".." in parts:
                raise _refused(flag, text, "it needs a bucket, and a prefix if you like")
            return Address("s3", "/".join([bucket, *parts]))
        case _:
            raise _refused(flag, text, f"{scheme}:// is not a kind of cache")


def chosen(cache: str, cache_from: str, settings: CacheSettings) -> Sharing:
    """Return the caches of a command: by its flags, else by environment, else by configuration.

    `off` switches the cache off. Raises UsageError, also for a folder without `file://` in
    WEIGHTSMITH_CACHE, which in other tools is a machine's own.
    """
    named, flag = cache, "--cache"
    if not named and (variable := os.environ.get(_VARIABLE, "").strip()):
        named, flag = variable, _VARIABLE
        if named != OFF and "://" not in named:
            raise UsageError(
                f"{flag} {named!r}: it is the address of a shared cache, and has no scheme",
                hint=f"write file://{Path(named).absolute()}, or name this machine's own folder"
                " in WEIGHTSMITH_HOME",
            )
    if not named:
        named, flag = settings.where, "cache.where in the configuration"
    source, source_flag = cache_from, "--cache-from"
    if not source:
        source, source_flag = settings.read_from, "cache.from in the configuration"
    return Sharing(
        both=None if named in ("", OFF) else parse_address(named, flag),
        read=None if source in ("", OFF) or cache == OFF else parse_address(source, source_flag),
        settings=settings,
    )


def required(cache: str, settings: CacheSettings) -> Sharing:
    """Return the cache that a command is about; raises UsageError if none is named."""
    found = chosen(cache, "", settings)
    if found.both is None:
        raise UsageError("no cache is named", hint=f"give --cache: {_FORMS}")
    return replace(found, read=None)


def of_nodes(on: str, run: RunOptions, settings: CacheSettings) -> Mapping[str, JsonValue]:
    """Return how a fleet's nodes run: as its command, with its caches and whom they trust.

    Raises UsageError if nodes on other machines would share none, or have no identity to sign with.
    """
    if on != "local" and run.keyless:
        raise UsageError(
            f"--keyless is not for --on {on}: its nodes do not have this job's identity",
            hint="sign with a key that each node has, or run `push --keyless` for each image",
        )
    found = chosen(run.cache, run.cache_from, settings)
    if on != "local" and found.both is None:
        raise UsageError(
            f"--on {on} needs a shared cache: it is all that the nodes have in common",
            hint=f"give --cache: {_FORMS} that all nodes see",
        )
    # A node must not take from its own configuration what was switched off here.
    options = replace(
        run,
        cache=OFF if run.cache == OFF else str(found.both or ""),
        cache_from=OFF if run.cache_from == OFF else str(found.read or ""),
    )
    trusted, key = dict[str, str](), settings.verify_key
    if found.both or found.read:
        named = {name: str(getattr(settings, name)) for name in TRUSTED}
        trusted = {name: value for name, value in named.items() if value}
    if key and (found.both or found.read):
        # As text, because its file is on this machine only: nodes check the cache's results as it
        # does. A file that cannot be read is refused where it is used.
        with suppress(OSError, ValueError):
            trusted["verify_key"] = Path(key).read_text("utf-8")
    return {**options.given(), **trusted}


def _refused(flag: str, text: str, why: str) -> UsageError:
    shown = re.sub(r"//[^/@]*@", "//…@", text)
    return UsageError(f"{flag} {shown!r}: {why}", hint=f"give {_FORMS}")
