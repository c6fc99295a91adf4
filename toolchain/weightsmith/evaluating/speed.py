"""How fast a started image is, with intervals, held against the limits of a recipe.

Requests of one round share what else the machine did meanwhile, so rounds are resampled, and then
the requests of each (Davison and Hinkley, Bootstrap Methods and their Application, 1997, section
3.8; the bootstrap and its percentile interval: Efron, Annals of Statistics 7, 1979).

Other work on a machine only slows a server, and comes and goes. So a limit counts as exceeded only
if the whole interval and every round are beyond it, and still are after as many rounds more. Where
rounds vary by 30 % about a limit that the server meets when nothing else runs, the interval of five
rounds alone is beyond it in 45 of 150 simulated builds, every round in 3, and both times in 1.
The five rounds of a small model may be over in a second, while other work lasts longer. So there is
a pause before each of the second rounds. Nothing is asked in it, so what uses the CPUs then is
other work; where that is much, nothing is refused. Without the pauses, 3 of 40 measurements of a
small model were refused beside programs that came and went.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice

from weightsmith.core.cpus import in_use
from weightsmith.core.devices import Devices, is_device
from weightsmith.core.json_objects import OMITTED, JsonObject
from weightsmith.core.ports import Progress
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import Json
from weightsmith.evaluating.client import Served
from weightsmith.evaluating.drafting import DraftSpeed
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.load import Sample, measure, measure_all
from weightsmith.evaluating.session import ServerSession, SessionLimits, died
from weightsmith.recipe.schema import Bench

ROUNDS, _FEWEST_ROUNDS = 5, 3
APART_SECONDS = 2.0
"""Before each round that confirms a refusal."""
_BUSY = 0.2
"""Share of the CPUs that other work may use; the loop of some idle servers takes one of eight."""
_SECONDS = 300.0
"""After so long, the fewest rounds are enough."""
_FEWEST_REQUESTS = 8
_RESAMPLES = 999
_SHARE = 0.95
FIGURES = {
    "ttft_p95_ms": ("first token, p95", "ms"),
    "itl_p95_ms": ("pause between pieces of text, p95", "ms"),
    "tokens_per_s": ("tokens per second", ""),
    "goodput": ("goodput", ""),
}
"""What is measured: its name for people, and its unit."""
_AT_MOST = frozenset({"ttft_p95_ms", "itl_p95_ms"})
MET, EXCEEDED, NOT_SHOWN, ELSEWHERE = "met", "exceeded", "not shown", "not shown here"
OTHER_LOAD = "another load"
_EXACT: Mapping[str, Json] = {"ignore_eos": True, "stream_options": {"include_usage": True}}
"""Every answer has all its tokens, and the server counts them: vLLM, SGLang, TensorRT-LLM and
llama.cpp know both fields."""
_WORDS = (
    "river", "table", "seven", "green", "morning", "paper", "under", "small", "house", "letter",
    "bread", "window", "slow", "garden", "after", "stone", "winter", "light", "road", "music",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedFigure(JsonObject):
    """One figure and its verdict; null stands for requests that were not answered."""

    name: str
    value: float | None
    limit: float | None = None
    """Null if the recipe has none."""
    interval: tuple[float | None, float | None] | None = field(default=None, metadata=OMITTED)
    """95 %, bootstrap."""
    verdict: str = ""
    """`met`, `exceeded`, `not shown` (the interval has the limit in it), `not shown here` (this is
    not the recipe's device), `another load` (of a results file); empty without a limit."""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedEvidence(JsonObject):
    """What another tool measured of the image, by its results file."""

    file: str
    sha256: str
    tool: str
    """`guidellm` or `aiperf`."""
    version: str
    model: str
    """The name that was asked for."""
    devices: tuple[str, ...]
    """GPUs that the tool saw; empty if it does not look."""
    concurrency: float
    requests: int
    errors: int
    prompt_tokens: float
    """Mean."""
    output_tokens: float
    """Mean."""
    figures: tuple[SpeedFigure, ...]
    image: str = field(default="", metadata=OMITTED)
    """The digest in the file's name: the tools write none into the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed(JsonObject):
    """What is recorded of an image's speed."""

    image: str
    """Digest of this platform's image, which all figures are of."""
    device: str = ""
    """Where the recipe's limits hold."""
    here: bool = False
    """Whether that is this machine."""
    machine: str = ""
    """What the image ran on here."""
    cpus: int = 0
    concurrency: int = 0
    prompt_tokens: int = 0
    """Of a prompt, as the server counts them; 0 if it does not say."""
    output_tokens: int = 0
    rounds: int = 0
    requests: int = 0
    errors: int = 0
    failures: tuple[str, ...] = ()
    """Why requests failed."""
    skipped: str = ""
    """Why nothing was measured; empty if something was."""
    figures: tuple[SpeedFigure, ...] = ()
    evidence: tuple[SpeedEvidence, ...] = ()
    drafts: DraftSpeed | None = field(default=None, metadata=OMITTED)
    """Whether speculative decoding pays on the build's questions."""

    @property
    def exceeded(self) -> tuple[str, ...]:
        """Why the image is too slow; empty if that is not shown."""
        return tuple(one.reason for one in self.figures if one.verdict == EXCEEDED)


@dataclass(frozen=True, slots=True)
class Round:
    """Requests that were sent at the same time, and how long all took in seconds."""

    samples: tuple[Sample, ...]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure with its 95 % interval, and each round's own."""

    value: float
    low: float
    high: float
    rounds: tuple[float, ...]


def session_limits(bench: Bench) -> SessionLimits:
    """Return limits of a request that a slow but working server keeps."""
    return SessionLimits(
        request_seconds=120 + bench.output_tokens + bench.prompt_tokens / 50,
        answer_bytes=(4 << 20) + 1024 * bench.output_tokens,
    )


class SpeedTest:
    """Measures a server in rounds, each with other prompts, after a first load that is not kept."""

    def __init__(
        self, session: ServerSession, served: Served, bench: Bench, progress: Progress
    ) -> None:
        self._served, self._bench, self._progress = served, bench, progress
        self.others = 0.0
        """Share of the CPUs that other work used between the last rounds, if they were apart."""
        self._words, self.prompt_tokens = _words_of_prompt(session, served, bench)
        self._numbers = iter(range(1, 1 << 62))
        self._session = session.adding(_EXACT)
        [first] = self._questions(1)
        if measure(self._session, served, first, bench.output_tokens).error:
            self._session = session  # it may not know these fields
        self._ask(min(bench.concurrency, _FEWEST_REQUESTS))

    def rounds(self, *, apart: bool = False) -> tuple[Round, ...]:
        """Return the times of a few rounds; if `apart`, look before each for other work.

        Raises CheckFailed if the server stops under them.
        """
        shares = list[float]()
        made: list[Round] = []
        began = time.monotonic()
        for _ in range(ROUNDS):
            shares += [in_use(APART_SECONDS)] if apart else []
            made.append(self._ask(max(_FEWEST_REQUESTS, 2 * self._bench.concurrency)))
            if len(made) >= _FEWEST_ROUNDS and time.monotonic() - began > _SECONDS:
                break
        if not (endpoint := self._session.endpoint).alive():
            raise died(endpoint, f"under a load of {self._bench.concurrency} requests at once")
        self.others = sum(shares) / len(shares) if shares else 0.0
        return tuple(made)

    def _ask(self, count: int) -> Round:
        asked, bench = self._questions(count), self._bench
        most, at_once = bench.output_tokens, bench.concurrency
        return Round(
            *measure_all(self._session, self._served, asked, at_once, most, self._progress)
        )

    def _questions(self, count: int) -> list[Item]:
        return [_question(number, self._words) for number in islice(self._numbers, count)]


def _question(number: int, words: int) -> Item:
    """Return a prompt of so many words; its first ones are its own, so that no cache has it."""
    chosen = random.Random(number).choices(_WORDS, k=words)  # noqa: S311 - words, no secret
    text = " ".join([str(number), *chosen[1:]])
    return Item(messages=({"role": "user", "content": text},), expected=(), line=number)


def _words_of_prompt(session: ServerSession, served: Served, bench: Bench) -> tuple[int, int]:
    """Return the words that give a prompt of about the wanted tokens, and how many it has then.

    The second is 0 for a server that does not count.
    """

    def tokens(words: int) -> int:
        body = served.body(_question(0, words), 1)
        try:
            found = parse(session.try_post(served.path, body).text)["usage"]["prompt_tokens"]
        except (ValueError, LookupError, TypeError):
            return 0
        return found if type(found) is int and found > 0 else 0

    wanted = bench.prompt_tokens
    few, many = max(1, wanted // 8), max(2, wanted // 2)
    low, high = tokens(few), tokens(many)
    if not low or high <= low:
        return wanted, 0
    words = max(1, few + round((wanted - low) * (many - few) / (high - low)))
    return words, tokens(words)


def estimates(
    rounds: Sequence[Round], bench: Bench, *, resamples: int = _RESAMPLES, seed: int = 0
) -> dict[str, Estimate]:
    """Return each figure over all rounds; the same rounds give the same intervals."""
    figures, chance = _Figures(rounds, bench), random.Random(seed)  # noqa: S311 - repeatable
    value = figures.over([1] * len(rounds), [1] * figures.requests)
    drawn = [figures.over(*figures.drawn(chance)) for _ in range(resamples)]
    alone = [_Figures([one], bench) for one in rounds]
    own = [one.over([1], [1] * one.requests) for one in alone]
    tail = round(0.025 * (resamples + 1))
    found = {}
    for name in value:
        values = sorted(one[name] for one in drawn)
        found[name] = Estimate(
            value=value[name],
            low=values[tail - 1],
            high=values[-tail],
            rounds=tuple(one[name] for one in own),
        )
    return found


class _Figures:
    """Computes the figures of rounds and requests that count once, several times or not at all."""

    def __init__(self, rounds: Sequence[Round], bench: Bench) -> None:
        samples = [*chain.from_iterable(one.samples for one in rounds)]
        self.requests = len(samples)
        self._sizes = [len(one.samples) for one in rounds]
        self._seconds = [one.seconds for one in rounds]
        self._tokens = [one.tokens for one in samples]
        self._good = [_is_good(one, bench) for one in samples]
        # A request without an answer was slower than any other.
        firsts = [math.inf if one.error else one.first for one in samples]
        self._firsts = sorted(((1000 * t, i) for i, t in enumerate(firsts)), reverse=True)
        gaps = ((1000 * gap, i) for i, one in enumerate(samples) for gap in one.gaps)
        self._gaps = sorted(gaps, reverse=True)
        self._gaps_of = [len(one.gaps) for one in samples]

    def drawn(self, chance: random.Random) -> tuple[list[int], list[int]]:
        """Return how often each round and each request counts in a resample."""
        times, counts = [0] * len(self._sizes), [0] * self.requests
        starts = [sum(self._sizes[:number]) for number in range(len(self._sizes))]
        for number in chance.choices(range(len(self._sizes)), k=len(self._sizes)):
            times[number] += 1
            first, size = starts[number], self._sizes[number]
            for request in chance.choices(range(first, first + size), k=size):
                counts[request] += 1
        return times, counts

    def over(self, times: Sequence[int], counts: Sequence[int]) -> dict[str, float]:
        """Return the figures where each round and each request counts so often."""
        seconds = _product(times, self._seconds)
        return {
            "ttft_p95_ms": _nearest_rank(self._firsts, counts, sum(counts)),
            "itl_p95_ms": _nearest_rank(self._gaps, counts, _product(counts, self._gaps_of)),
            "tokens_per_s": _product(counts, self._tokens) / seconds if seconds else 0.0,
            "goodput": _product(counts, self._good) / sum(counts),
        }


def _product(counts: Sequence[int], values: Sequence[float]) -> float:
    return sum(count * value for count, value in zip(counts, values, strict=True))


def _nearest_rank(
    largest_first: Sequence[tuple[float, int]], counts: Sequence[int], total: float
) -> float:
    """Return the 95th percentile of values of requests that count so often; inf of none."""
    above = total - math.ceil(_SHARE * total - 1e-9)
    for value, request in largest_first:
        above -= counts[request]
        if above < 0:
            return value
    return math.inf


def _is_good(sample: Sample, bench: Bench) -> bool:
    """Return whether a request meets the latency limits, as goodput counts them.

    Zhong et al., DistServe, OSDI 2024.
    """
    if sample.error:
        return False
    pause = sum(sample.gaps) / len(sample.gaps) if sample.gaps else 0.0
    held = ((sample.first, bench.max_ttft_p95_ms), (pause, bench.max_itl_p95_ms))
    return all(most is None or 1000 * seconds <= most for seconds, most in held)


def judged(
    found: Mapping[str, Estimate], bench: Bench, *, here: bool, machine: str, others: float = 0.0
) -> tuple[SpeedFigure, ...]:
    """Return each figure with its verdict; goodput only where the recipe asks for it.

    `others` is the share of the CPUs that other work used.
    """
    limits = bench.limits
    names = [name for name in FIGURES if name in limits or name != "goodput"]
    figures = (_judged(name, found[name], bench, here, machine) for name in names)
    return tuple(_beside(one, others) for one in figures)


def _beside(figure: SpeedFigure, others: float) -> SpeedFigure:
    """Return a figure that is not believed to exceed its limit where other work took the CPUs."""
    if figure.verdict != EXCEEDED or others <= _BUSY:
        return figure
    why = f"; other programs used {others:.0%} of the CPUs between the rounds"
    return replace(figure, verdict=NOT_SHOWN, reason=figure.reason + why)


def _judged(name: str, one: Estimate, bench: Bench, here: bool, machine: str) -> SpeedFigure:
    limit = bench.limits.get(name)
    ends = [_is_beyond(name, end, limit) for end in (one.low, one.high)]
    verdict = ""
    said = f"{_titled(name, one.value)}, {spelled(one.low)} to {spelled(one.high)}"
    if limit is not None:
        said += f"; {'at most' if name in _AT_MOST else 'at least'} {spelled(limit)}"
        if not here:
            verdict = ELSEWHERE
            said += f", on {bench.device}" if bench.device else "; the recipe names no device"
            said += f"; measured on {machine or 'an unknown device'}"
        elif all(ends) and all(_is_beyond(name, value, limit) for value in one.rounds):
            verdict = EXCEEDED
        else:
            verdict = NOT_SHOWN if any(ends) else MET
    return SpeedFigure(
        name=name,
        value=_finite(one.value),
        limit=limit,
        interval=(_finite(one.low), _finite(one.high)),
        verdict=verdict,
        reason=said,
    )


def of_file(
    name: str, value: float, bench: Bench | None, *, same_load: bool, tool: str
) -> SpeedFigure:
    """Return a figure of a results file: it has no rounds, so it refuses nothing."""
    limit = bench.limits.get(name) if bench else None
    verdict, said = "", f"{_titled(name, value)}, by {tool}"
    if limit is not None:
        said += f"; {'at most' if name in _AT_MOST else 'at least'} {spelled(limit)}"
        within = EXCEEDED if _is_beyond(name, value, limit) else MET
        verdict = within if same_load else OTHER_LOAD
    return SpeedFigure(name=name, value=_finite(value), limit=limit, verdict=verdict, reason=said)


def _is_beyond(name: str, value: float, limit: float | None) -> bool:
    if limit is None:
        return False
    return value > limit if name in _AT_MOST else value < limit


def _titled(name: str, value: float) -> str:
    title, unit = FIGURES[name]
    return f"{title} {spelled(value)} {unit}".rstrip()


def spelled(value: float | None) -> str:
    """Return a figure for people; None and infinity are of requests without an answer."""
    if value is None or math.isinf(value):
        return "unanswered"
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else round(value, 4)


def machine_of(devices: Devices | None, *, on_cpu: bool) -> str:
    """Return the name of what an image runs on; "" if it is not known."""
    if devices is None:
        return ""
    return devices.cpu if on_cpu else ", ".join(dict.fromkeys(devices.gpus))


def is_here(bench: Bench, devices: Devices | None, *, on_cpu: bool) -> bool:
    """Return whether an image runs here on the device that a recipe names; all GPUs must be it."""
    if devices is None:
        return False
    names = (devices.cpu,) if on_cpu else devices.gpus
    return bool(names) and all(is_device(bench.device, name) for name in names)
