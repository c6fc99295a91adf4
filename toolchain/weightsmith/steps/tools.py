"""Everything outside this process that a build uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from weightsmith.core.errors import EnvironmentFailure, UsageError
from weightsmith.core.ports import (
    AnySigner,
    ContainerEngine,
    Hub,
    Launcher,
    Progress,
    RunCommand,
    Runner,
    SourceReader,
    Store,
    StoreEntry,
)
from weightsmith.core.values import Digest, Writable
from weightsmith.oci.registry import Registry
from weightsmith.steps.merge_plans import MergePlans


def _makes_none(engine: str, platform: str, _folder: Path, _progress: Progress) -> None:
    raise EnvironmentFailure(
        f"the engine {engine} cannot be made for {platform} here", hint="give another base image"
    )


class UploadEntry(Protocol):
    """Puts a result of the store into the shared cache now, unless it is there."""

    def __call__(
        self, key: Digest, note: Mapping[str, Writable], entry: StoreEntry, *, again: bool = False
    ) -> None:
        """Upload the entry; with `again`, look anew for all of it, since it may have been lost."""


def shares_nothing(
    key: Digest, note: Mapping[str, Writable], entry: StoreEntry, *, again: bool = False
) -> None:
    """Raise UsageError: there is no shared cache."""
    del key, note, entry, again
    raise UsageError(
        "other machines need a shared cache, and none is named",
        hint="give --cache: oci://REGISTRY/REPOSITORY, s3://BUCKET/PREFIX, or a folder that all "
        "of them see",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class JobMemory:
    """What one job may use, in bytes; 0 where nothing is known or limited."""

    limit: int = 0
    """A job that uses more is ended: `--memory`, else what is free when the command starts."""
    budget: int = 0
    """What a job that can choose fills: `--memory`, else half of what is free."""

    @classmethod
    def of(cls, chosen: int, free: int) -> JobMemory:
        """Return the memory that a user chose, 0 for no choice, of what is free."""
        return cls(limit=chosen or free, budget=chosen or free // 2)


NO_LIMIT = JobMemory()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """The external tools of one build, assembled in `wiring`."""

    store: Store
    readers: Mapping[str, SourceReader]
    """Scheme -> reader; the empty scheme reads folders."""
    runner: Runner
    engine: ContainerEngine
    launcher: Launcher
    registry: Registry
    hub: Hub
    """Where `hf://` is published to."""
    progress: Progress
    scratch: Callable[[], AbstractContextManager[Path]]
    """Creates a folder for a job's output, and deletes it afterwards."""
    make_engine_files: Callable[[str, str, Path, Progress], None] = _makes_none
    """(engine, platform, empty folder, progress): fills the folder with the engine's files.

    For engines made of packages, and for platforms that are not this machine's."""
    check_engine_files: Callable[[str, str], None] = lambda _engine, _platform: None
    """(engine, platform): raises EnvironmentFailure if it is known that they cannot be made."""
    command: RunCommand
    """Runs the user's own evaluation program."""
    signer: AnySigner | None = None
    """Signs with the user's key; None without a key."""
    clock: Callable[[], float] = time.monotonic
    """Monotonic clock in seconds, used to time stages."""
    memory: JobMemory = NO_LIMIT
    share: UploadEntry = shares_nothing
    moved: Callable[[], int] = lambda: 0
    """Returns the bytes that have come from the shared caches and gone to them so far."""
    two_at_once: Callable[[], bool] = lambda: False
    """Returns whether a job of a later stage may run beside another one."""
    bandwidth: Callable[[], float] = lambda: 0.0
    """Measures how many bytes per second this machine reads from its memory."""
    images_in_engine: bool = False
    """Whether built images are started in the container engine or from an OCI layout."""
    merges: MergePlans = field(default_factory=MergePlans)
