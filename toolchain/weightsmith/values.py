"""The frozen values that flow between stages; each knows what it was made from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

Json: TypeAlias = Any
"""A JSON value; narrowed where it is read."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class Digest(str):
    """A content digest in OCI form, `sha256:` and 64 hexadecimal digits."""

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        """Raise ValueError for anything that is not a sha256 digest."""
        if not _DIGEST.fullmatch(text):
            raise ValueError(f"not a sha256 digest: {text!r}")
        return super().__new__(cls, text)

    @classmethod
    def of(cls, data: bytes) -> Self:
        """Return the digest of bytes in memory."""
        return cls("sha256:" + hashlib.sha256(data).hexdigest())

    @property
    def hex(self) -> str:
        """The 64 digits alone."""
        return self[7:]

    @property
    def short(self) -> str:
        """The first 12 digits, for people."""
        return self[7:19]


class UnreadDigest(Digest):
    """Stands for the digest of a file that was not read; no file has it."""

    __slots__ = ()


def canonical(value: Json) -> bytes:
    """Return the one JSON spelling of a value: sorted keys, no spaces, UTF-8."""
    return json.dumps(
        plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    ).encode()


def key_of(value: Json) -> Digest:
    """Return the digest of a value's canonical JSON: the store's key."""
    return Digest.of(canonical(value))


_PLAIN = frozenset({str, int, float, bool, type(None)})


def plain(value: Json) -> Json:
    """Turn dataclasses, paths and tuples into plain JSON values."""
    kind = type(value)
    if kind in _PLAIN:  # most values by far: a list of 20,000 files is asked for its key
        return value
    if kind is tuple or kind is list:
        return [plain(v) for v in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Digest | Path):
        return str(value)
    if isinstance(value, str | bytes | bool | int | float) or value is None:
        return value
    if isinstance(value, set | frozenset):
        return sorted(plain(v) for v in value)
    if isinstance(value, Iterable):
        return [plain(v) for v in value]
    raise TypeError(f"{type(value).__name__} has no JSON form")


_USER = re.compile(r'(https?)?://([^/?#\s"<>]+)@')
"""What stands before the host in an address, which no address holds quotes in: a JSON text's end
one. It is looked for once after each `://`, so that the time is in proportion to the length.
"""


def without_passwords(value: Json) -> Json:
    """Return a JSON value, or a text, without the names and passwords of addresses in it."""
    if isinstance(value, str):
        return _USER.sub(_without_user, value)
    if isinstance(value, Mapping):
        return {key: without_passwords(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_passwords(inner) for inner in value]
    return value


def _without_user(found: re.Match[str]) -> str:
    """Leave out a name with its password, or a token alone; `ssh://git@` is neither."""
    scheme, user = found.groups()
    return f"{scheme or ''}://" if scheme or ":" in user else found[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One regular file of a tree: its relative POSIX path, size in bytes and digest."""

    path: str
    size: int
    digest: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A part of a file on disk, by its place in bytes."""

    path: Path
    offset: int
    size: int


Pieces: TypeAlias = tuple[bytes | Slice, ...]
"""A file's content that is not on disk as one file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """A folder whose content is known: the files under `root`, sorted by path."""

    root: Path
    files: tuple[FileEntry, ...]
    places: Mapping[str, Path] = field(default_factory=dict)
    """Files that lie elsewhere than below `root`."""

    @property
    def digest(self) -> Digest:
        """The content's identity: sha256 over the sorted `sha256sum` list, whatever the folder."""
        return tree_digest(self.files)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the files that hold weights, as a server loads them."""
        weights = (".safetensors", ".gguf")
        return sum(entry.size for entry in self.files if entry.path.endswith(weights))

    def path(self, name: str) -> Path:
        """Return the file's place on disk."""
        return self.places.get(name, self.root / name)

    def has(self, name: str) -> bool:
        """Say whether the tree holds a file of that relative path."""
        return any(entry.path == name for entry in self.files)


def tree_digest(files: Iterable[FileEntry]) -> Digest:
    """Return the digest of a sorted `sha256sum` list: independent of place, order and packing."""
    lines = sorted(f"{entry.digest.hex}  {entry.path}\n" for entry in files)
    return Digest.of("".join(lines).encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A resolved source: a tree on disk and the pin that names it for ever."""

    tree: Tree
    source: str
    """As the user wrote it."""
    pin: str
    """Source with revision or hash: enough to get the same bytes again."""
    pinned: bool
    """False where the user gave no pin and the build found one."""
    made_from: tuple[Digest, ...] = ()

    @property
    def digest(self) -> Digest:
        """The tree's digest."""
        return self.tree.digest


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSnapshot:
    """One adapter of a merge: its files, weight, and the user's names for it."""

    snapshot: Snapshot
    weight: float = 1.0
    version: str = ""
    run_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """All inputs of a build, resolved to digests."""

    base: Snapshot
    adapters: tuple[AdapterSnapshot, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A plain Hugging Face checkpoint in a folder."""

    tree: Tree
    made_from: tuple[Digest, ...]
    details: Mapping[str, Json] = field(default_factory=dict)

    @property
    def digest(self) -> Digest:
        """The tree's digest."""
        return self.tree.digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A weight format that an engine may load, such as `q4_k_m` or `safetensors`."""

    name: str
    kind: str
    """What engines match on: `safetensors`, `gguf`, `awq`, `gptq`, `fp8`."""
    bits_per_weight: float
    """Nominal; used to plan disk and memory before the file exists."""

    @property
    def packed(self) -> bool:
        """Whether a quantizer makes it from the checkpoint."""
        return self.kind not in {"safetensors", "lora"}

    @property
    def suffix(self) -> str:
        """The ending of its weight files."""
        return ".gguf" if self.kind == "gguf" else ".safetensors"


SAFETENSORS = Format(name="safetensors", kind="safetensors", bits_per_weight=16.0)
"""The merged checkpoint as it is: what a target without a suffix serves."""

# Checkpoints with packed weights, which need no quantizer of ours to be planned and served: four
# bits, with a 16-bit scale and a 4-bit zero point per 128 weights; eight bits.
AWQ = Format(name="awq", kind="awq", bits_per_weight=4.16)
GPTQ = Format(name="gptq", kind="gptq", bits_per_weight=4.16)
FP8 = Format(name="fp8", kind="fp8", bits_per_weight=8.0)
LORA = Format(name="lora", kind="lora", bits_per_weight=16.0)
"""The base with its adapters beside it, added when requests come and never merged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """What an engine loads: a checkpoint or a quantized file, in one format."""

    format: Format
    tree: Tree
    made_from: tuple[Digest, ...]
    details: Mapping[str, Json] = field(default_factory=dict)

    @property
    def digest(self) -> Digest:
        """The tree's digest."""
        return self.tree.digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A task score over a data file."""

    score: float
    n: int
    metric: str
    per_item: tuple[Mapping[str, Json], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """A blob that a registry or a layout holds, by its descriptor alone."""

    digest: Digest
    size: int
    media_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Where an image went, and what it cost to bring it there."""

    reference: str
    digest: Digest
    layers: Sequence[Mapping[str, Json]]
    uploaded_bytes: int = 0
    mounted: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInputs:
    """All that a stage's result depends on; its digest is the store's key."""

    stage: str
    recipe_number: int
    """Raised whenever the same inputs would give other bytes."""
    inputs: Mapping[str, Json]

    @property
    def key(self) -> Digest:
        """The store's key."""
        return key_of(self)

    def changed_since(self, earlier: Mapping[str, Json] | None) -> str:
        """Say which inputs differ from an earlier build's, for people; empty when none do."""
        if not earlier:
            return "never built here"
        now = plain(self.inputs)
        changed = [k for k in sorted(now | earlier) if now.get(k) != earlier.get(k)]
        return ", ".join(changed)
