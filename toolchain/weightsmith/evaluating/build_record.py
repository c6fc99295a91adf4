"""build.json: what is recorded of one target of a build, passed or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from weightsmith.core.json_objects import INLINE, OMITTED, JsonObject
from weightsmith.core.merge_options import Merge
from weightsmith.core.safe_parse import RECORD, content, parse
from weightsmith.core.values import FileEntry, Json, JsonValue
from weightsmith.evaluating.speed import Speed
from weightsmith.models.reshard import WeightBytes
from weightsmith.quantizers.quality.result import QualityResult
from weightsmith.validating.result import Validation

FILE = "build.json"
LABELS = {
    "base": "base",
    "adapter": "base + adapter",
    "merged": "merged",
    "dequantized": "dequantized weights, in transformers",
    "image": "image",
}
"""Who is asked, in the order of a build -> what a page calls it."""
GRADED = frozenset({"embedding", "rerank"})
"""Metrics by which a question is more than right or wrong."""
_KEPT = 4 << 20
"""Bytes of a record that stays in memory for who asks next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRecord(JsonObject):
    """The base: as the user wrote it, its pin, and the digest of its files."""

    source: str
    pin: str
    digest: str
    files: tuple[FileEntry, ...] = ()
    license: str = field(default="", metadata=OMITTED)
    """By its model card, or by the recipe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRecord(SourceRecord):
    """An adapter: the same, and the user's names for it."""

    version: str = ""
    run_id: str = ""
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRecord(Merge, JsonObject):
    """How the adapters were merged, and what became of the tensors."""

    digest: str = ""
    """Of the merged checkpoint."""
    tensors: Mapping[str, int] = field(default_factory=dict)
    """How many were merged, copied and replaced."""
    findings: tuple[str, ...] = ()
    """One sentence each."""
    repairs: Mapping[str, int] = field(default_factory=dict)
    """How many elements were decided in float64 and with exact integers."""
    shards: tuple[Mapping[str, Json], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactRecord(JsonObject):
    """The served weights; `size` in bytes."""

    format: str
    size: int
    bits_per_weight: float
    file: str
    """The largest of them."""
    digest: str
    files: tuple[FileEntry, ...] = ()
    details: Mapping[str, Json] = field(default_factory=dict)
    """What the quantizer read back from them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord(JsonObject):
    """One layer of the image: size in bytes, and the file or purpose it holds."""

    digest: str
    size: int
    file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord(JsonObject):
    """The image by digest."""

    reference: str
    """Empty if it was not published."""
    digest: str
    layers: tuple[LayerRecord, ...]
    """Bottom first."""
    uploaded_bytes: int = 0
    mounted: int = 0
    """Layers that the registry took from another repository."""
    platforms: Mapping[str, str] = field(default_factory=dict)
    """Platform -> its image's digest."""
    started: str = ""
    """The platform whose image was started and tested; empty if none was."""
    takes_pictures: bool = field(default=False, metadata=OMITTED)
    """Whether its server takes pictures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRecord(JsonObject):
    """What was asked, and what may be lost."""

    name: str
    metric: str
    max_drop: float
    against: str = field(default="adapter", metadata=OMITTED)
    """`base` where what the base could do must stay; empty where `min_score` alone counts."""
    min_score: float = field(default=0.0, metadata=OMITTED)
    sample_of: int = field(default=0, metadata=OMITTED)
    """Questions in the data, if only a sample of them was asked."""
    benchmark: str = field(default="", metadata=OMITTED)
    """The hub's benchmark that they are, `OWNER/DATASET[@COMMIT]:TASK`."""


NO_TASK = TaskRecord(name="", metric="", max_drop=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRecord(JsonObject):
    """A score from 0 to 1 over n questions."""

    score: float
    n: int
    metric: str
    interval: tuple[float, float] | None = field(default=None, metadata=OMITTED)
    """95 %: Wilson's, or Agresti and Coull's of a `graded` score."""
    graded: bool = field(default=False, metadata=OMITTED)
    """Whether questions are more than right or wrong, as with nDCG."""
    figures: Mapping[str, float] = field(default_factory=dict, metadata=OMITTED)
    """Other measures of the same answers, such as macro-F1 or recall."""
    carried: int = field(default=0, metadata=OMITTED)
    """Answers of the merged model that were not asked: those of base and adapter, of which each
    token was likelier than any other by more than `bound`."""
    bound: float = field(default=0.0, metadata=OMITTED)
    """Nats by which a margin of the merged model may be another, by validation."""

    @property
    def right(self) -> int | None:
        """Number of right answers; None if there is no such number."""
        return round(self.score * self.n) if self.n and not self.graded else None

    @property
    def asked(self) -> str:
        """How many questions were asked, and how many answers were carried over, if any were."""
        if not self.carried:
            return ""
        return (
            f"{self.n - self.carried} asked, {self.carried} carried over from base + adapter by"
            f" margin (each token likelier than any other by more than {self.bound:.2g} nats)"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DropRecord(JsonObject):
    """A paired comparison over the same questions."""

    drop: float
    interval: tuple[float, float]
    """95 %, Bonett and Price."""
    lost: int
    """Answers that were right and are wrong now, or are worse."""
    won: int
    n: int
    p: float
    """McNemar's exact test; of graded scores, Fisher's randomization test."""
    p_adjusted: float | None = field(default=None, metadata=OMITTED)
    """The same, adjusted by Holm's method for the other suites."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictRecord(JsonObject):
    """One comparison, judged."""

    subject: str
    against: str
    passed: bool
    binding: bool
    """Whether it decides."""
    reason: str
    comparison: DropRecord | None = field(default=None, metadata=INLINE)
    items_needed: int = field(default=0, metadata=OMITTED)
    """Questions that could show the allowed drop, if these are too few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DifferenceRecord(JsonObject):
    """Where an answer first differs from the reference's."""

    question: int
    """Its number, from 1."""
    token: str
    """The reference's text from there to the end of its token."""
    margin: float | None
    """Nats by which the reference preferred that token; null if it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamenessRecord(JsonObject):
    """How many of a subject's answers are the reference's to the letter."""

    share: float
    same: int
    n: int
    differences: tuple[DifferenceRecord, ...] = ()
    cosine: tuple[float, float] | None = field(default=None, metadata=OMITTED)
    """Of vectors, with the reference's of the same texts: the mean and the smallest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteRecord(JsonObject):
    """A suite: what was asked, how it was answered, and its own verdict."""

    name: str
    task: TaskRecord
    scores: Mapping[str, ScoreRecord]
    verdicts: tuple[VerdictRecord, ...]
    verdict: str
    """`passed`, `not proven` or `failed`."""
    unproven: tuple[str, ...] = ()
    sameness: Mapping[str, SamenessRecord] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRecord(JsonObject):
    """One check that the started image passed."""

    name: str
    seen: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord(JsonObject):
    """How long a stage took, and whether nothing was fetched, made or sent."""

    cached: bool
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayRecord(JsonObject):
    """The replay set that the image carries."""

    digest: str
    questions: int
    reference: str
    """Whose answers it has: the started image's, or what stands for one that was not."""
    secret: bool = False
    """Whether the image has digests only; the set is then beside the record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRecord(JsonObject):
    """A suite whose questions were asked one by one until it was clear what they show."""

    suite: str
    limit: float
    """The drop that must be refuted."""
    questions: int
    """How many there are."""
    asked: int
    lost: int
    won: int
    drop: float
    """Of those that were asked."""
    interval: tuple[float, float]
    """Holds after every question at once."""
    proven_at: int
    """After which question the drop was proven to be below the limit; 0 if it was not."""
    score: float
    """The reference's score less the drop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateRecord(JsonObject):
    """An image that `auto` could choose."""

    target: str
    options: Mapping[str, Json]
    """What it has of `quantize` beside the recipe's own."""
    price: int
    """Foreseen bytes of its weights."""
    size: int = 0
    """Their real bytes; 0 if they were not made."""
    stage: str = ""
    """The stage at which it was left; empty if none was begun, or if it was chosen."""
    left: str = ""
    """Why it was left; empty for the one that was chosen."""
    seconds: float = 0.0
    sequence: tuple[SequenceRecord, ...] = ()
    """Suites in the order of asking; () if nothing was asked."""
    foreseen_speed: float = field(default=0.0, metadata=OMITTED)
    """Tokens per second that the memory's bandwidth allows; 0 if size is preferred."""
    speed: float = field(default=0.0, metadata=OMITTED)
    """Tokens per second of one request, as measured; 0 if it was not."""

    @property
    def name(self) -> str:
        """The target, with its options."""
        return ", ".join([self.target, *(f"{key} {value}" for key, value in self.options.items())])

    @property
    def fast(self) -> str:
        """Its tokens per second, measured or at most; "" if nothing is known of them."""
        if self.speed:
            return f"{self.speed:.3g} tokens/s"
        return f"at most {self.foreseen_speed:.3g} tokens/s" if self.foreseen_speed else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoRecord(JsonObject):
    """What the target `auto` chose from, in the order of trying."""

    engines: tuple[str, ...]
    at_most: int
    """Bytes of the weights; 0 for any."""
    error: float
    """The largest chance that the chosen image drops by more than a limit."""
    tests: int
    """How many candidates may be asked."""
    level: float
    """The part of `error` that each of them has."""
    candidates: tuple[CandidateRecord, ...]
    prefer: str = field(default="size", metadata=OMITTED)
    """`size` or `speed`."""
    bandwidth: float = field(default=0.0, metadata=OMITTED)
    """Bytes per second that this machine reads from its memory; 0 if size is preferred."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRecord(JsonObject):
    """All that is recorded of one target; what came after a refusal is None or empty."""

    schema: int = 1
    """Raised when a key changes its meaning."""
    name: str
    version: str
    target: str
    """Engine and format; empty if a merge was refused."""
    created: str
    """When this was written, ISO 8601, UTC; empty on a hub."""
    made_by: str = field(default="", metadata=OMITTED)
    """On a hub: the version of weightsmith that made it."""
    base: SourceRecord
    adapters: tuple[AdapterRecord, ...] = ()
    """In the order of the merge."""
    draft: SourceRecord | None = field(default=None, metadata=OMITTED)
    """The model that drafts tokens for the merged one."""
    merge: MergeRecord | None = None
    validation: Validation | None = None
    artifact: ArtifactRecord | None = None
    quality: QualityResult | None = None
    plan: Mapping[str, Json] | None = None
    """The serving plan, sizes in bytes."""
    image: ImageRecord | None = None
    sharing: WeightBytes | None = field(default=None, metadata=OMITTED)
    replay: ReplayRecord | None = field(default=None, metadata=OMITTED)
    """How many bytes of its weights other images of the base have too."""
    forms: Mapping[str, ImageRecord] = field(default_factory=dict)
    """What else was published of the same weights, by kind: volume, modelpack, hub and so on."""
    task: TaskRecord = NO_TASK
    """The first suite, as are `scores`, `verdicts` and `sameness`."""
    scores: Mapping[str, ScoreRecord] = field(default_factory=dict)
    """`base`, `adapter` (base with adapters, unmerged), `merged`, and `image` or, where it was not
    started, `dequantized`: its weights in transformers."""
    verdicts: tuple[VerdictRecord, ...] = ()
    items: tuple[Mapping[str, Json], ...] = ()
    """Each question of each suite: the suite's name, if it has one (`suite`), expected answers,
    every model's answer, and which are right (`ok`)."""
    sameness: Mapping[str, SamenessRecord] = field(default_factory=dict)
    """`merged` and `image`: how many answers are the reference's to the letter."""
    suites: tuple[SuiteRecord, ...] = ()
    """Every suite, the first one and the adapters' own too."""
    checks: tuple[CheckRecord, ...] = ()
    bench: Speed | None = field(default=None, metadata=OMITTED)
    """How fast the started image was, and what other tools measured of it."""
    auto: AutoRecord | None = field(default=None, metadata=OMITTED)
    """What else was tried, if the target is the one that `auto` chose or tried."""
    stages: Mapping[str, StageRecord] = field(default_factory=dict)
    inputs: Mapping[str, Json] = field(default_factory=dict)
    """What each cached stage depended on; `plan` compares it to say what changed."""
    verdict: str = ""
    """`passed`, `not proven` (published, but the gate could not have failed) or `failed`."""
    unproven: tuple[str, ...] = ()
    """Why passing shows nothing; empty if it shows that at most `max_drop` was lost."""
    refused: str = ""
    """Why it was not published; empty if it was."""
    warnings: tuple[str, ...] = ()
    network_in_jobs: bool = False
    """Whether a job that made any of it could reach the machine's network."""
    memory_bytes: int = 0
    """Most that each of its jobs was allowed to use; 0 for no limit."""
    recipe: Mapping[str, Json] = field(default_factory=dict)
    """Without values that equal the default."""
    reproduce: tuple[str, ...] = ()
    """The command that gives the same digest, with the pins."""
    next: tuple[str, ...] = ()
    """Suggested next commands."""

    @property
    def title(self) -> str:
        """Name, version and target."""
        return f"{self.name} {self.version} {self.target}".strip()

    @property
    def tasks(self) -> tuple[SuiteRecord, ...]:
        """Every suite; the first alone of a record without `suites`."""
        if self.suites or not self.scores:
            return self.suites
        first = SuiteRecord(
            name=self.task.name,
            task=self.task,
            scores=self.scores,
            verdicts=self.verdicts,
            verdict=self.verdict,
            unproven=self.unproven,
            sameness=self.sameness,
        )
        return (first,)

    def items_of(self, suite: SuiteRecord) -> tuple[Mapping[str, Json], ...]:
        """Return a suite's questions."""
        return tuple(item for item in self.items if item.get("suite", "") == suite.name)


def read_build(folder: Path) -> BuildRecord:
    """Read a folder's build.json; raises OSError, and ValueError for a damaged one."""
    return _read(folder)[1]


def recorded(folder: Path, made: BuildRecord) -> BuildRecord | None:
    """Return a folder's record if a build that ran nothing would only write it again, else None.

    That is if the two differ in no more than when they were written, how long finding each result
    took, and the memory that no job used.
    """
    try:
        text, earlier = _read(folder)
    except (OSError, ValueError):
        return None
    if not all(stage.cached for stage in made.stages.values()):
        return None
    same = replace(
        made,
        created=earlier.created,
        auto=earlier.auto if _alike(made.auto, earlier.auto) else made.auto,
        memory_bytes=earlier.memory_bytes,
        stages={
            name: replace(stage, seconds=earlier.stages[name].seconds)
            for name, stage in made.stages.items()
            if name in earlier.stages
        },
    )
    return earlier if same.to_json() == text else None


def _alike(made: AutoRecord | None, earlier: AutoRecord | None) -> bool:
    """Return whether two choices differ in no more than how long they took, and the bandwidth."""

    def timeless(auto: AutoRecord | None) -> AutoRecord | None:
        if auto is None:
            return None
        rows = tuple(replace(one, seconds=0.0, foreseen_speed=0.0) for one in auto.candidates)
        return replace(auto, candidates=rows, bandwidth=0.0)

    return timeless(made) == timeless(earlier)


def _read(folder: Path) -> tuple[JsonValue, BuildRecord]:
    data = content(folder / FILE, RECORD)
    return _parsed(data) if len(data) <= _KEPT else _parsed.__wrapped__(data)


@lru_cache(maxsize=1)
def _parsed(data: bytes) -> tuple[JsonValue, BuildRecord]:
    """Return a record as JSON and read; a build asks for it four times."""
    value = parse(data, largest=RECORD)
    return value, BuildRecord.from_json(value)
