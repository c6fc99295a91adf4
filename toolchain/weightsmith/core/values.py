"""The frozen values that stages exchange."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias, overload

Json: TypeAlias = Any
"""What was parsed; its reader checks it, or it is our own file."""
if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    JsonValue: TypeAlias = (
        bool | int | float | str | Sequence["JsonValue"] | Mapping[str, "JsonValue"] | None
    )
    """What JSON can write; its reader narrows it before use."""
    Writable: TypeAlias = (
        JsonValue | DataclassInstance | Path | Iterable["Writable"] | Mapping[str, "Writable"]
    )
    """What has a JSON form, by `plain`."""
else:  # Records are read by their fields' types, and a recursive one has no end.
    JsonValue = Writable = Any

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
    """Placeholder for the digest of a file that was not read; no file has this digest."""

    __slots__ = ()


def canonical(value: Writable) -> bytes:
    """Return the one JSON spelling of a value: sorted keys, no spaces, UTF-8."""
    return json.dumps(
        plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    ).encode()


def key_of(value: Writable) -> Digest:
    """Return the digest of a value's canonical JSON: the store's key."""
    return Digest.of(canonical(value))


_PLAIN = frozenset({str, int, float, bool, type(None)})


def plain(value: Writable) -> Json:
    """Turn dataclasses, paths and tuples into plain JSON values; TypeError for what has none."""
    kind = type(value)
    if kind in _PLAIN:  # a fast path for most values: a key may cover 20,000 files
        return value
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Digest | Path):
        return str(value)
    if isinstance(value, str | bool | int | float) or value is None:
        return value
    if isinstance(value, set | frozenset):
        return sorted(plain(v) for v in value)
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        return [plain(v) for v in value]
    raise TypeError(f"{type(value).__name__} has no JSON form")


_USER = re.compile(r'(https?)?://([^/?#\s"<>]+)@')
"""The user part of a URL. It has no quotes, so a match ends at the end of a JSON string.
It is searched once after each `://`, so that the time is linear in the length.
"""


@overload
def without_passwords(value: str) -> str: ...


@overload
def without_passwords(value: JsonValue) -> JsonValue: ...


def without_passwords(value: JsonValue) -> JsonValue:
    """Return a JSON value or text with user names and passwords removed from URLs.

    A plain user name such as `ssh://git@` stays; `user:password@` and tokens do not.
    """
    if isinstance(value, str):
        return _USER.sub(
            lambda m: f"{m[1] or ''}://" if m[1] or ":" in m[2] else m[0],
            value,
        )
    if isinstance(value, Mapping):
        return {key: without_passwords(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_passwords(inner) for inner in value]
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One regular file of a tree: its relative POSIX path, size in bytes and digest."""

    path: str
    size: int
    digest: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A part of a file on disk, by offset and size in bytes."""

    path: Path
    offset: int
    size: int


Pieces: TypeAlias = tuple[bytes | Slice, ...]
"""File content that is not stored as one file on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """File content that is on another machine until it is read."""

    open: Callable[[], Iterator[bytes]]
    """Yields verified bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """A folder with known content: the files in `root`, sorted by path."""

    root: Path
    files: tuple[FileEntry, ...]
    places: Mapping[str, Path] = field(default_factory=dict)
    """Files stored outside `root`."""

    @property
    def digest(self) -> Digest:
        """Digest of the content: sha256 of the sorted `sha256sum` list, whatever the folder."""
        return tree_digest(self.files)

    @property
    def size(self) -> int:
        """Total size in bytes."""
        return sum(entry.size for entry in self.files)

    @property
    def weight_bytes(self) -> int:
        """Total size in bytes of the weight files that a server loads."""
        weights = (".safetensors", ".gguf")
        return sum(entry.size for entry in self.files if entry.path.endswith(weights))

    @property
    def texts(self) -> Path:
        """A folder with all files but the weights: configuration, vocabulary, model card.

        Files of a shared cache are fetched when they are read, so this is cheap where `root`
        may fetch the weights.
        """
        return self.root

    def path(self, name: str) -> Path:
        """Return the file's location on disk."""
        return self.places.get(name, self.root / name)

    def source(self, name: str) -> Path | Stream:
        """Return where the file's bytes come from, without fetching them."""
        return self.path(name)

    def header(self, name: str) -> Path:
        """Return a file with the weights file's header and size; its tensors may be missing."""
        return self.path(name)

    def mode(self, name: str) -> int:
        """Return the file's mode; only the owner's execute bit counts."""
        return self.path(name).stat().st_mode

    def has(self, name: str) -> bool:
        """Return whether the tree has a file with this relative path."""
        return any(entry.path == name for entry in self.files)


def tree_digest(files: Iterable[FileEntry]) -> Digest:
    """Return the digest of a sorted `sha256sum` list: independent of place, order and packing."""
    lines = sorted(f"{entry.digest.hex}  {entry.path}\n" for entry in files)
    return Digest.of("".join(lines).encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A resolved source: a tree on disk and its immutable pin."""

    tree: Tree
    source: str
    """As the user wrote it."""
    pin: str
    """Source with revision or hash, which always gets the same bytes."""
    pinned: bool
    """False if the user gave no pin and the build added one."""
    made_from: tuple[Digest, ...] = ()

    @property
    def digest(self) -> Digest:
        """The tree's digest."""
        return self.tree.digest


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSnapshot:
    """One adapter of a merge: its files, weight, version and run id."""

    snapshot: Snapshot
    weight: float = 1.0
    version: str = ""
    run_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """All inputs of a build, resolved to digests."""

    base: Snapshot
    adapters: tuple[AdapterSnapshot, ...] = ()
    draft: Snapshot | None = None
    """The model that drafts tokens for the merged one; it changes no other result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VirtualWeights:
    """What computes the weights of a checkpoint whose files have none."""

    tree: Tree
    """The files that are there."""
    sources: Sources
    merge: Mapping[str, Json]
    """The fields of `merge_options.Merge`."""
    largest: Mapping[str, float] = field(default_factory=dict)
    """Matrix -> its largest magnitude, where the merge has recorded it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A plain Hugging Face checkpoint in a folder."""

    tree: Tree
    details: Mapping[str, Json] = field(default_factory=dict)
    computed: VirtualWeights | None = None
    """What computes its weights, if the files have none; sizes and digests in `tree` are then those
    of files that have them."""

    @property
    def digest(self) -> Digest:
        """The tree's digest."""
        return self.tree.digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A weight format that an engine may load, such as `q4_k_m` or `safetensors`."""

    name: str
    kind: str
    """The kind that engines support: `safetensors`, `gguf`, `awq`, `gptq`, `fp8`, `nvfp4` …"""
    bits_per_weight: float
    """Nominal bits per weight, used to plan disk and memory before the file exists."""
    layout: str = ""
    """compressed-tensors' name of how its matrices are packed, for engines that read that; empty
    for a layout that `kind` names."""
    instead_of: str = ""
    """The format that this one stands in for, by its name, on engines that lack that one's layout.
    """
    base: Format | None = None
    """Of unmerged adapters, the format of the base beside them; None for 16 bits."""

    @property
    def unmerged(self) -> bool:
        """Whether it is a base and adapters that are applied at run time."""
        return self.kind == "lora"

    @property
    def without_adapters(self) -> Format:
        """The format of the weights that adapters may lie beside."""
        return self.base or self

    @property
    def packed(self) -> bool:
        """Whether a quantizer makes it from the checkpoint."""
        return self.kind not in {"safetensors", "lora"}

    @property
    def suffix(self) -> str:
        """Suffix of its weight files; of unmerged adapters, of their base's."""
        return ".gguf" if self.without_adapters.kind == "gguf" else ".safetensors"


SAFETENSORS = Format(name="safetensors", kind="safetensors", bits_per_weight=16.0)
"""The unchanged merged checkpoint, which a target without a suffix serves."""

# Checkpoints with packed weights, which can be planned and served without our quantizers: four
# bits, with a 16-bit scale and a 4-bit zero point per 128 weights; eight bits.
PACKED = "pack-quantized"
AWQ = Format(name="awq", kind="awq", bits_per_weight=4.16, layout=PACKED)
GPTQ = Format(name="gptq", kind="gptq", bits_per_weight=4.16, layout=PACKED)
# In the layouts of AutoAWQ and AutoGPTQ, which vLLM means to drop (github.com/vllm-project/vllm
# /issues/30136), and which are all that TGI reads.
AWQ_GEMM = Format(name="awq-gemm", kind="awq", bits_per_weight=4.16, instead_of="awq")
GPTQ_V1 = Format(name="gptq-v1", kind="gptq", bits_per_weight=4.16, instead_of="gptq")
FP8 = Format(name="fp8", kind="fp8", bits_per_weight=8.0)
LORA = Format(name="lora", kind="lora", bits_per_weight=16.0)
"""The base in 16 bits and its unmerged adapters, which are applied at run time."""


def beside(base: Format) -> Format:
    """Return the format of unmerged adapters beside a base in that format."""
    name, bits = f"{base.name}-{LORA.name}", base.bits_per_weight
    return Format(name=name, kind=LORA.kind, bits_per_weight=bits, base=base)


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """What an engine loads: a checkpoint or a quantized file, in one format."""

    format: Format
    tree: Tree
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
    figures: Mapping[str, float] = field(default_factory=dict)
    """Other measures of the same answers, such as macro-F1, which nothing is judged by."""
    vectors: tuple[str, ...] = ()
    """Of texts, float32 in base64, to compare with those of another model; not recorded."""

    @property
    def graded(self) -> bool:
        """Whether items are more than right or wrong: they have a `value` from 0 to 1."""
        return any("value" in row for row in self.per_item)

    @property
    def values(self) -> list[float]:
        """Each item's score."""
        return [value_of(row) for row in self.per_item]


def value_of(row: Mapping[str, Json]) -> float:
    """Return an item's score, from 0 to 1."""
    return float(row.get("value", bool(row["ok"])))


Scores: TypeAlias = Mapping[str, Score]
"""Who was asked (`base`, `adapter`, `merged`, `image`) -> the score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """The descriptor of a blob in a registry or a layout."""

    digest: Digest
    size: int
    media_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLayer:
    """One layer of a published image: size in bytes, and the file or purpose it holds."""

    digest: Digest
    size: int
    file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Where an image was published, and how many bytes were transferred."""

    reference: str
    digest: Digest
    layers: tuple[ImageLayer, ...]
    uploaded_bytes: int = 0
    mounted: int = 0
    seconds: float = 0.0
    platforms: Mapping[str, Digest] = field(default_factory=dict)
    """Platform -> its image; of an artifact for any platform, {}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Uploaded:
    """Where files were published on a hub, and how many bytes of them it did not have."""

    reference: str
    """`hf://owner/name`."""
    digest: str
    """The commit."""
    layers: tuple[ImageLayer, ...] = ()
    uploaded_bytes: int = 0
    mounted: int = 0
    seconds: float = 0.0


Form: TypeAlias = Published | Uploaded
"""One form in which weights were published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageInputs:
    """Everything that a stage's result depends on; its digest is the store's key."""

    stage: str
    recipe_number: int
    """Version, increased whenever the same inputs would give different bytes."""
    inputs: Mapping[str, Writable]

    @property
    def key(self) -> Digest:
        """The store's key."""
        return key_of(self)

    @property
    def note(self) -> Mapping[str, Writable]:
        """What the store keeps beside a result: the key is the digest of exactly this."""
        return {"stage": self.stage, "recipe_number": self.recipe_number, "inputs": self.inputs}

    def changed_since(self, earlier: Mapping[str, JsonValue] | None) -> str:
        """Return as text which inputs differ from an earlier build's; "" if none do."""
        if not earlier:
            return "never built here"
        now = plain(self.inputs)
        changed = [k for k in sorted(now | earlier) if now.get(k) != earlier.get(k)]
        return ", ".join(changed)
