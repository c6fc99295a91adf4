"""What the stages ask of the outside world, as Protocols."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from weightsmith.core.devices import Devices
from weightsmith.core.jobs import Job
from weightsmith.core.values import (
    Blob,
    Digest,
    FileEntry,
    Json,
    JsonValue,
    Snapshot,
    Tree,
    Writable,
    without_passwords,
)


class Progress(Protocol):
    """Shows progress to the user; never on stdout."""

    @property
    def warnings(self) -> Sequence[str]:
        """The warnings so far, each once."""

    def stage(self, name: str, detail: str) -> None:
        """Report the start of a stage."""

    def advance(self, done: int, total: int, unit: str) -> None:
        """Report work done so far in the current stage (`unit`: `bytes`, `items`, `steps`)."""

    def finish(self, name: str, seconds: float, cached: bool) -> None:
        """Report the end of a stage."""

    def note(self, text: str) -> None:
        """Print one line for the user."""

    def warn(self, text: str) -> None:
        """Print one warning line, which also goes into the report."""


class Silent:
    """A Progress that shows nothing, and remembers the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def stage(self, name: str, detail: str) -> None:
        """Do nothing."""

    def advance(self, done: int, total: int, unit: str) -> None:
        """Do nothing."""

    def finish(self, name: str, seconds: float, cached: bool) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""

    def warn(self, text: str) -> None:
        """Remember it."""
        if text not in self.warnings:
            self.warnings.append(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreEntry:
    """One finished result: its files and their metadata."""

    tree: Tree
    meta: Mapping[str, Json]
    cached: bool
    """True if it existed before this call."""
    where: str = ""
    """The address of the shared cache that has its files; empty if they are on this machine."""
    note: Mapping[str, Writable] = field(default_factory=dict)
    """What it was made of, as its maker says."""


Make: TypeAlias = Callable[[Path], Mapping[str, JsonValue]]
"""Fills a folder with a result; returns its metadata, with known digests under `sha256` (path ->
hex)."""


class Store(Protocol):
    """Content-addressed results: complete or absent, never half-written."""

    def find(self, key: Digest) -> StoreEntry | None:
        """Return the entry and mark it used, or None."""

    def produce(
        self, key: Digest, note: Mapping[str, Writable], make: Make, *, resume: bool = False
    ) -> StoreEntry:
        """Return the entry; if it does not exist, call `make(folder)` under the key's lock.

        With `resume`, the folder has the files that an interrupted run of the same key left. Raises
        EnvironmentFailure for a full or read-only disk.
        """

    def digest_file(self, path: Path, *, read: bool = True) -> FileEntry:
        """Return size and digest of a file; read it again only if it changed.

        Without `read`, large files are not read: an unknown one gets an UnreadDigest.
        """

    def require_room(self, needed: int, what: str) -> None:
        """Raise EnvironmentFailure unless `needed` bytes are free on the store's disk."""

    def memo(self, key: str, make: Callable[[], str]) -> str:
        """Return the small text cached under a key; make it if it is not cached."""

    def clean(self, keep_bytes: int) -> Mapping[str, int]:
        """Delete least recently used entries above the budget, except those in use by a build."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheUse:
    """One entry of a shared cache: its size in bytes, and when it was last used or written."""

    key: Digest
    size: int
    used: float
    """Seconds since 1970; 0 if it is not known."""


OpenedBlob: TypeAlias = tuple[Blob, Callable[[], Iterator[bytes]]]
"""A blob, and what yields its bytes."""


class Cache(Protocol):
    """A place that machines share: results by key, complete or absent; nothing there is trusted.

    Every method may raise EnvironmentFailure or OSError if the place cannot be used.
    """

    where: str
    """Its address, without passwords."""
    origin: tuple[str, str]
    """Registry and repository from which images can mount its blobs; empty for other places."""

    def find(self, key: Digest, *, use: bool = True) -> bytes | None:
        """Return the entry's document, or None; `use` marks it used, where a place keeps that."""

    def read(self, blob: Blob) -> Iterator[bytes]:
        """Yield a blob's bytes in chunks; they may be wrong or too few."""

    def write(self, key: Digest, document: bytes, blobs: Sequence[OpenedBlob]) -> int:
        """Write the missing blobs, then the document; return how many bytes were sent.

        Readers see the whole entry or none; several may write the same one. A blob counts as there
        by its name and size: who finds that its bytes are others discards it.
        """

    def discard(self, blob: Blob) -> None:
        """Delete a damaged blob, where a place allows that, so that `write` misses it."""

    def entries(self) -> Iterator[CacheUse]:
        """Yield every entry."""

    def remove(self, keys: Collection[Digest]) -> int:
        """Delete these entries, and the blobs that no other has; return the bytes freed."""


class SourceReader(Protocol):
    """Fetches one kind of source (`hf://`, `s3://`, a folder) to the local disk."""

    scheme: str

    def check(self, source: str) -> None:
        """Raise UsageError if a package that reads this kind of source is not installed."""

    def fetch(self, source: str, revision: str, sha256: str, progress: Progress) -> Snapshot:
        """Return the source's files by digest; raises InputRefused or EnvironmentFailure."""

    def known(self, source: str, revision: str, sha256: str) -> Snapshot | None:
        """Return the result of `fetch` if it needs no network and no copying, else None."""

    def glance(
        self, source: str, revision: str, sha256: str, progress: Progress
    ) -> Snapshot | None:
        """Return the source with the headers of its weights alone, None if this kind has no such.

        It lasts as long as the tools. Large files have an UnreadDigest. Raises as `fetch`.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class HubContent:
    """What a hub's repository holds."""

    commit: str
    """The newest commit; empty if there is none yet."""
    files: Mapping[str, str]
    """Path -> sha256 of a large file, git's id of a small one."""


class Hub(Protocol):
    """Publishes files on a model hub."""

    def check(self, repository: str) -> HubContent | None:
        """Return what a repository `owner/name` holds, None if it does not exist.

        Raises InputRefused for an impossible name, EnvironmentFailure if this user may not write
        there, as far as that is known, or the hub cannot be reached.
        """

    def create(self, repository: str, *, public: bool) -> HubContent:
        """Create a repository; raises as `commit` does."""

    def commit(
        self,
        repository: str,
        parent: str,
        files: Mapping[str, Path | bytes],
        deleted: Sequence[str],
        message: str,
    ) -> str:
        """Upload files and delete others in one commit after `parent`; return the commit.

        Raises EnvironmentFailure if the hub refuses it or cannot be reached; nothing of it is
        visible then.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class HubCommit:
    """One commit of a hub's repository, and some small files of it."""

    repository: str
    commit: str
    created: str
    """Time in UTC, as the hub says it."""
    files: Mapping[str, bytes]
    """Those of the names asked for that it has."""


class HubLister(Protocol):
    """Reads what is published on a model hub."""

    def repositories(self, owner: str) -> Sequence[str]:
        """Return an owner's repositories, as `owner/name`.

        Raises EnvironmentFailure if the hub cannot be reached, or refuses.
        """

    def commits(
        self, repository: str, names: Sequence[str], commit: str = ""
    ) -> Iterator[HubCommit]:
        """Yield a repository's commits, newest first, or those whose name begins with `commit`.

        Raises InputRefused without such a repository or commit, and for a file that is too large;
        EnvironmentFailure as `repositories`.
        """


class Runner(Protocol):
    """Runs jobs in a builder: a container or a virtual environment with the same pins."""

    name: str

    @property
    def networked(self) -> bool:
        """Whether any job has run with network access, because the user allowed it."""

    def prepare(self, builder: str, progress: Progress) -> None:
        """Make the builder ready; report what it does and how long it may take."""

    def check(self, builder: str) -> None:
        """Raise EnvironmentFailure if it is already certain that the builder cannot be made.

        Also if its jobs cannot be isolated from the network. The check is cheap.
        """

    def ready(self, builder: str) -> bool:
        """Return whether the builder already exists."""

    def run(self, job: Job, progress: Progress, *, stop: int | None = None) -> Mapping[str, Json]:
        """Run the job and return its result; raises the job's own error.

        The job is killed once the open file `stop` can be read, with InterruptedError: so another
        thread ends it.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A started server: its address and its log."""

    url: str
    logs: Callable[[int], str]
    """Return the last n lines of the log."""
    alive: Callable[[], bool]
    stop: Callable[[float], int | None] | None = None
    """Send SIGTERM and wait so many seconds; return the exit code, None if still running."""
    restart: Callable[[], Endpoint] | None = None
    """Restart the stopped server at the same address."""
    confinement: tuple[str, ...] = ()
    """How the server is isolated, as text: `no network`, `read-only root`, …"""

    @property
    def shown(self) -> str:
        """The address without any password in it."""
        return str(without_passwords(self.url))


class RunCommand(Protocol):
    """Runs the user's own program."""

    def __call__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        stdin: bytes,
        seconds: float,
    ) -> str:
        """Return its standard output; its standard error goes to ours.

        The user's environment is passed on, with these variables added. Raises CheckFailed for
        an exit code other than 0 or a timeout, EnvironmentFailure if the program does not exist.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class StartSpec:
    """How to start an image."""

    port: int
    """Where the server listens inside the image."""
    env: Mapping[str, str]
    port_variable: str = ""
    """Environment variable for the port, for launchers that share the host's network."""
    host_variable: str = ""
    """Environment variable that restricts the server to loopback there."""
    memory_bytes: int = 0
    shm_bytes: int = 0
    """Shared memory of the container; 0 for the launcher's default."""
    use_gpu: bool = False
    arguments: tuple[str, ...] = ()
    """Put after the image's own, for what only a test asks."""


class Launcher(Protocol):
    """Starts an image and stops it: a container engine, or the image's own root file system."""

    name: str

    def serve(self, image: str, spec: StartSpec) -> AbstractContextManager[Endpoint]:
        """Start `image` (an engine's reference, or `oci:DIR`), stop it when the context ends."""

    def cpu_flags(self) -> frozenset[str] | None:
        """Return what the CPU that it starts images on can do, in Linux's names; None if unknown.

        Of layouts, which it may start in another place than the engine's images, nothing is said.
        """

    def devices(self, image: str) -> Devices | None:
        """Return what `image` (as for `serve`; it need not exist) runs on; None if unknown."""


CANDIDATES = "weightsmith-candidate"
"""Repository of temporary images that exist only during a build.

Their tags are `KEY-OWNER`; loading an image removes those whose owner was killed.
"""


class ContainerEngine(Protocol):
    """The container engine's operations on images."""

    owner: str
    """Identifies this process in the tags of its temporary images."""

    def answers(self) -> bool:
        """Return whether a container engine is available."""

    def load(self, archives: Iterable[Iterator[bytes]], reference: str) -> str:
        """Load image archives, each based on the previous one; return the last one's id."""

    def chains_of(self, *repositories: str) -> tuple[tuple[str, ...], ...]:
        """Return the diff ids, bottom first, of those of these images that the engine has."""

    def inspect(self, reference: str) -> Mapping[str, Json]:
        """Return an image's `Id` (the engine's digest) and `Config`; {} if absent."""

    def read_file(self, reference: str, path: str, largest: int) -> bytes:
        """Return a file of an image, b"" if it has none; raises InputRefused for a larger one."""

    def untag(self, reference: str) -> None:
        """Remove a name, and the image with its last name; ignore a name that does not exist."""

    def describe(self) -> Mapping[str, JsonValue]:
        """Version, storage driver, GPU runtime: for `doctor`.

        `layerwise` says whether an archive may omit layers that are already loaded.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeTask:
    """One task of a fleet: what a node gets to read, and what it needs."""

    id: str
    name: str
    """For people."""
    text: str
    """The request, one JSON object."""
    cpus: int
    memory_bytes: int
    disk_bytes: int
    gpus: int
    avoid: frozenset[str] = frozenset()
    """Nodes that it failed on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """One task that has ended: with its reply, or lost with its node."""

    id: str
    node: str
    text: str
    """The reply, one JSON object; empty if there is none."""
    why: str = ""
    """Why there is none."""


class FleetEngine(Protocol):
    """Runs a fleet's tasks: it queues and places them, and says what became of each."""

    name: str
    remote: bool
    """Whether tasks run on other machines, which share only the cache."""

    def check(self, version: str) -> None:
        """Raise EnvironmentFailure if it does not answer, or a node has another version."""

    def submit(self, works: Sequence[NodeTask]) -> None:
        """Queue tasks; raises EnvironmentFailure if no node could ever run one of them."""

    def wait(self, seconds: float) -> Sequence[Ended]:
        """Return the tasks that have ended since; wait for one at most so many seconds."""

    def running(self) -> frozenset[str]:
        """Return the ids of the tasks that run now; others wait for a place."""

    def close(self) -> None:
        """End all tasks and what was started for them."""


SignatureFormat: TypeAlias = Literal["cosign", "bundle", "both"]
"""How signatures are kept: under cosign's tags, as Sigstore bundles, or as both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Signer:
    """Signs with the user's private key."""

    sign: Callable[[bytes], bytes]
    """Bytes -> signature, for example ECDSA over their SHA-256, depending on the key's type."""
    public: bytes
    """Its public key in PEM form, which identifies its own signatures."""
    format: SignatureFormat = "cosign"
    """How its signatures of images and their statements are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityCheck:
    """Says whether an identity made a Sigstore bundle: certificate, signature and log entry."""

    who: str
    """The identity and its provider, for people."""
    read: Callable[[bytes], tuple[bytes, str]]
    """Bundle -> the statement's text in it, and why it does not count; "" if it does."""

    def __call__(self, data: bytes, signature: bytes) -> bool:
        """Return False: a bare signature names no identity."""
        del data, signature
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentitySigner:
    """Signs as the identity that a provider vouches for, with a certificate of Sigstore's CA."""

    identity: str
    """The name in its certificates: the URL of a workflow, or an address."""
    issuer: str
    """The provider's URL."""
    bundle: Callable[[bytes], bytes]
    """Text of an in-toto statement -> Sigstore bundle, with an entry in a transparency log."""
    check: IdentityCheck
    """Recognizes its own bundles."""


AnySigner: TypeAlias = Signer | IdentitySigner
