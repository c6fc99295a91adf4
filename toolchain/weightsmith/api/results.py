"""What the functions of the public interface return: frozen values, sizes in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from weightsmith.core.json_objects import JsonObject
from weightsmith.core.values import Digest, Json, Score
from weightsmith.evaluating.build_record import StageRecord
from weightsmith.provenance.chain import Check
from weightsmith.provenance.recall import AffectedImage as AffectedImage
from weightsmith.validating.result import Validation as Validation

StageTime: TypeAlias = StageRecord
"""How long a stage of a build took; `cached` if its result was already in the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One safetensors file of a merged checkpoint."""

    path: Path
    size: int
    sha256: str
    """64 hexadecimal digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """A merged checkpoint on disk."""

    path: Path
    tensors: Mapping[str, int]
    """Number of tensors `merged`, `copied` from the base, and `replaced` by an adapter's."""
    shards: tuple[Shard, ...]
    peak_rss_bytes: int
    """Peak memory of the job's process (resident set size)."""
    seconds: float
    findings: tuple[str, ...]
    """The merge's warnings, one sentence each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """Quantized weights on disk."""

    path: Path
    """The file or folder."""
    format: str
    bits_per_weight: float
    files: tuple[Path, ...]
    quality: Mapping[str, Json]
    """What was lost: `kl_mean` and `kl_p99` in nats per token, `top1` from 0 to 1,
    `perplexity_ratio`, `layer_error`, and the `limits` of each; or `skipped`, which says why."""
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A target's serving files on disk, and the memory plan that they follow."""

    files: tuple[Path, ...]
    plan: Mapping[str, Json]
    """As `weightsmith render --json` prints it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How a model answered questions."""

    score: float
    """From 0 to 1."""
    n: int
    """Number of questions."""
    metric: str
    interval: tuple[float, float]
    """Of 95 %."""
    per_item: tuple[Mapping[str, Json], ...]
    """Each question's `prompt`, `expected`, `answer` and `ok`; `value`, from 0 to 1, if it is more
    than right or wrong."""
    figures: Mapping[str, float]
    """Other measures of the same answers, such as macro-F1 or recall."""
    comparison: Mapping[str, Json]
    """With `against`, how it compares with the earlier result; else {}."""
    warnings: tuple[str, ...]

    def to_score(self) -> Score:
        """Return what a later result is compared with."""
        return Score(score=self.score, n=self.n, metric=self.metric, per_item=self.per_item)


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """An image that answers its replay set here as it was tested."""

    verdict: str
    """`proven`."""
    image: str
    """Its digest; empty for a set from a file."""
    device: str
    """The CPU's or GPU's name."""
    engine: str
    """With its version, if the image or the server says it."""
    questions: int
    by_tokens: int
    """How many of them were compared token by token; the others by their text."""
    explained: tuple[Mapping[str, Json], ...]
    """Answers that part where rounding explains it: `question`, `token`, `margin`, `excess`."""
    on: Mapping[str, Json]
    """All that is known of the device."""
    server: Mapping[str, Json]
    seconds: float
    tokens_per_s: float
    statement: str
    """The file with the statements; empty if none was asked for."""
    attached: bool
    """Whether a signed proof was attached to the image."""
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Baked:
    """An assembled image at its destination."""

    image: str
    """Its reference, or `oci:FOLDER`."""
    digest: Digest
    layers: tuple[Mapping[str, Json], ...]
    """`digest`, `size` and `file` of each layer, from the bottom up."""
    uploaded_bytes: int
    seconds: float
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    """An image in a registry, or a model on a hub."""

    image: str
    """Its reference, or `hf://OWNER/NAME`."""
    digest: str
    """The image's digest; of a hub, the commit, empty if nothing was committed."""
    uploaded_bytes: int
    mounted: int
    """Number of layers taken from another repository of the registry."""
    seconds: float
    warnings: tuple[str, ...]
    planned: Mapping[str, Json] = field(default_factory=dict)
    """Of a dry run: what would be done, as `push --dry-run --json` prints it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebased(Pushed):
    """An image that was moved to another engine base, in a registry."""

    rebased_from: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """One target of a build that passed and was published."""

    target: str
    image: str
    """Its reference, or `oci:FOLDER`."""
    digest: Digest
    forms: Mapping[str, str]
    """What else was published, by kind: its reference, or `oci:FOLDER`."""
    scores: Mapping[str, float]
    """`base`, `adapter`, `merged` and `image` on the recipe's task, from 0 to 1; {} without one."""
    verdict: str
    """`passed`, or `not proven` if the gate could not have failed."""
    sameness: Mapping[str, float]
    """Share of answers of `merged` and `image` that are the reference's text to the letter."""
    report: Path
    """Path of report.html; build.json is in the same folder."""
    stages: Mapping[str, StageTime]
    uploaded_bytes: int
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """An image that passed verification: no check failed."""

    image: str
    digest: Digest
    checks: tuple[Check, ...]
    """`name`, `found` and `ok`; `ok` is None if not checked, such as a signature without a key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unread(JsonObject):
    """What could not be read of a place, or is not what it says."""

    reference: str
    why: str
    unreachable: bool
    """Whether it was not read, so that the answer has a gap there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remade(JsonObject):
    """What became of an image that was to be made again."""

    source: str
    reference: str = ""
    """The new image; the fleet file that makes it, if that was written."""
    digest: str = ""
    error: str = ""
    """Why it was not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Affected(JsonObject):
    """What was made from something, in the places that were named."""

    by: str
    """What was asked for: `adapter`, `base`, `engine` and so on."""
    value: str
    images: tuple[AffectedImage, ...]
    """Signed: by a key that was given, or without keys by anyone."""
    unsigned: tuple[AffectedImage, ...]
    """What only says so; nobody whose key was given vouches for it."""
    problems: tuple[Unread, ...]
    others: tuple[str, ...]
    """References of what weightsmith did not make."""
    repositories: int
    looked_at: int
    """Number of manifests."""
    remade: tuple[Remade, ...] = ()
    """With `rebuild` or `rebase`: each image of `images`, but no other form of it."""
