"""The gates of a build: whether a score is good enough, and what passing does not show.

A gate shows nothing if it could not have failed, or if not the same was asked. A gain is as odd as
a loss: if merged model or image are significantly better than base + adapter, they were probably
asked something else. It is no failure, because the fault may be the reference's, and chance gives
one in forty such gains.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from weightsmith.core.errors import CheckFailed
from weightsmith.core.values import JsonValue, Score, Scores, value_of
from weightsmith.evaluating.tool_calls import ANOTHER_PARSER

_Z = 1.96
"""Standard normal quantile of a two-sided 95 % interval."""
_CHANCE = 0.05
_ONE_SIDED = math.erfc(_Z / math.sqrt(2)) / 2
"""The same confidence for one end of an interval: 0.025."""
_NEAR_ZERO = 0.05
"""A reference's score up to which there is next to nothing to lose."""
_NEAR = 0.95
"""A mean cosine of vectors from which on they are the same but for rounding."""
_EXACT = 16
"""Differences whose signs are all tried."""
_MOST_SHOWN = 3
_SHOWN_LENGTH = 120
_NEXT = "train the adapter further, choose a format that loses less, or allow a lower score"
NAMES = {
    "base": "the base",
    "adapter": "base + adapter",
    "merged": "the merged model",
    "dequantized": "the dequantized model in transformers",
    "image": "the image",
    "this": "the subject",
    "other": "the other run",
    "guess": "who has not read the texts",
}
"""Subject of a comparison -> its name in sentences."""
_JUDGED = ("merged", "dequantized", "image")


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share; (0, 1) for n = 0.

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if n == 0:
        return 0.0, 1.0
    share = right / n
    middle = (share + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
    half = _Z / (1 + _Z * _Z / n) * math.sqrt(share * (1 - share) / n + _Z * _Z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(lost: int, won: int) -> float:
    """Return the two-sided p value of McNemar's exact test.

    Twice the binomial tail of the smaller count: McNemar, "Note on the sampling error of the
    difference between correlated proportions", 1947, in its exact form.
    """
    n = lost + won
    tail = term = 1
    # Each coefficient from the one before: from scratch, 50,000 changed answers took minutes.
    for k in range(min(lost, won)):
        term = term * (n - k) // (k + 1)
        tail += term
    # Integer division, because floats would overflow.
    return min(1.0, 2 * tail / (1 << n))


def sign_flips(changes: Sequence[float]) -> float:
    """Return the two-sided p value of Fisher's randomization test of paired differences.

    The share of all signs under which their sum is as far from zero. Smucker, Allan and Carterette,
    "A comparison of statistical significance tests for information retrieval evaluation", 2007,
    recommend it for measures such as nDCG. If all differences are equal, it is McNemar's exact
    test. Of many differences it is the normal distribution that it tends to.
    """
    size = [abs(change) for change in changes if change]
    seen = abs(math.fsum(changes))
    if len(size) > _EXACT:
        return 2 * _tail(seen / math.sqrt(math.fsum(one * one for one in size)))
    sums = [0.0]
    for one in size:
        sums = [each + sign for each in sums for sign in (one, -one)]
    return sum(abs(each) >= seen - 1e-9 for each in sums) / len(sums)


def paired_interval(lost: int, won: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of (lost - won) / n, the drop of a score over the same n items.

    Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions
    based on paired data", 2012; (-1, 1) for n = 0.
    """
    return _interval(*_paired(lost - won, lost + won, n))


def _interval(middle: float, error: float) -> tuple[float, float]:
    return max(-1.0, middle - _Z * error), min(1.0, middle + _Z * error)


def _paired(total: float, squares: float, n: int) -> tuple[float, float]:
    """Return the middle of a drop's 95 % interval and its standard error, from sums over n items.

    Bonett and Price's interval is Wald's, with one more item lost and one more won. So it is for
    scores between right and wrong: an interval of what was seen alone has no width if nothing
    changed, and misses losses that are rare. Where 3 % of 10 to 200 queries lose half of their
    score or more, it held the drop in 98 to 100 % of 1,000 simulations, Student's interval in 27 to
    91 %, and the bootstrap's percentiles in 27 to 79 % of up to 50 queries.
    """
    middle = total / (n + 2)
    return middle, math.sqrt(max(0.0, (squares + 2) / (n + 2) - middle**2) / (n + 2))


def holm(chances: Sequence[float]) -> tuple[float, ...]:
    """Return p values of hypotheses that are tested together, adjusted, in the same order.

    Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    adjusted, largest = [1.0] * len(chances), 0.0
    for rank, place in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        largest = max(largest, min(1.0, (len(chances) - rank) * chances[place]))
        adjusted[place] = largest
    return tuple(adjusted)


def items_needed(max_drop: float) -> int:
    """Return the number of items needed to show a drop of at most `max_drop` if no answer changes.

    The n at which the upper end of `paired_interval(0, 0, n)` reaches it; 0 for a `max_drop` of 0,
    which no number of items can show.
    """
    if max_drop <= 0:
        return 0
    return max(1, math.ceil(_Z * math.sqrt(2) / max_drop - 2 - 1e-9))


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedComparison:
    """A paired comparison over the same items."""

    changes: tuple[float, ...]
    """The decrease of each item that changed, negative where it rose; 1 is from right to wrong."""
    n: int

    @property
    def lost(self) -> int:
        """Number of items that are worse now."""
        return sum(change > 0 for change in self.changes)

    @property
    def won(self) -> int:
        """Number of items that are better now."""
        return sum(change < 0 for change in self.changes)

    @property
    def drop(self) -> float:
        """Decrease of the score; negative if it rose."""
        return math.fsum(self.changes) / self.n if self.n else 0.0

    @property
    def adjusted(self) -> tuple[float, float]:
        """The middle of the drop's interval and its standard error."""
        squares = math.fsum(change * change for change in self.changes)
        return _paired(math.fsum(self.changes), squares, self.n)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the drop."""
        return _interval(*self.adjusted)

    @property
    def p(self) -> float:
        """McNemar's exact p value; of scores between right and wrong, the randomization test's."""
        if all(abs(change) == 1 for change in self.changes):
            return mcnemar(self.lost, self.won)
        return sign_flips(self.changes)


def compare(now: Sequence[float], before: Sequence[float]) -> PairedComparison:
    """Compare two subjects' scores of each item, from 0 (wrong) to 1 (right), in order.

    Raises ValueError for different numbers of items.
    """
    pairs = zip(now, before, strict=True)
    changes = tuple(float(was) - float(is_) for is_, was in pairs)
    return PairedComparison(changes=tuple(filter(None, changes)), n=len(changes))


def comparison_of(now: Score, before: Score | None) -> PairedComparison | None:
    """Return the paired comparison of two scores; None if there is no result per item."""
    if before is None or not now.per_item or len(now.per_item) != len(before.per_item):
        return None
    return compare(now.values, before.values)


def score_interval(score: Score) -> tuple[float, float]:
    """Return a score's 95 % interval: Wilson's, or that of `_mean` between right and wrong."""
    if not score.graded:
        return wilson(round(score.score * score.n), score.n)
    middle, error = _mean(score.values)
    return max(0.0, middle - _Z * error), min(1.0, middle + _Z * error)


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Return the middle of a mean's interval and its standard error; values are from 0 to 1.

    As Agresti and Coull's of a share, with two more items of 0 and two of 1: "Approximate is better
    than exact for interval estimation of binomial proportions", 1998.
    """
    n = len(values) + 4
    middle = (math.fsum(values) + 2) / n
    return middle, math.sqrt(((math.fsum(v * v for v in values) + 2) / n - middle**2) / n)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How much worse than its reference a subject may score; scores are from 0 to 1."""

    max_drop: float
    min_score: float = 0.0
    against: str = "adapter"
    """Whose score it is held against: base + adapter's (the base's without any), the base's (what
    it could do must stay), or nobody's (empty): then `min_score` alone counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The result of one comparison."""

    subject: str
    against: str
    """Empty if there is nothing to compare with; then only `min_score` applies."""
    passed: bool
    reason: str
    """One sentence for users."""
    hint: str = ""
    """Up to three lost items; "" if a score has none, such as a harness's."""
    comparison: PairedComparison | None = None
    p: float | None = None
    """The comparison's p value if it is adjusted, because several suites are judged together."""
    needed: int = 0
    """Number of items needed to show the requested `max_drop`; 0 if there are enough."""
    binding: bool = True
    """False if the comparison is only reported."""

    @property
    def facts(self) -> Mapping[str, JsonValue]:
        """The verdict as JSON, for build.json and `--json`."""
        facts: dict[str, JsonValue] = {
            "subject": self.subject,
            "against": self.against,
            "passed": self.passed,
            "binding": self.binding,
            "reason": self.reason,
        }
        if self.comparison is not None:
            facts |= {
                "drop": round(self.comparison.drop, 6),
                "interval": [round(end, 6) for end in self.comparison.interval],
                "lost": self.comparison.lost,
                "won": self.comparison.won,
                "n": self.comparison.n,
                "p": round(self.comparison.p, 6),
            }
            if self.p is not None:
                facts["p_adjusted"] = round(self.p, 6)
        if self.needed:
            facts["items_needed"] = self.needed
        return facts

    def require(self) -> None:
        """Raise CheckFailed unless it passed."""
        if self.binding and not self.passed:
            raise CheckFailed(self.reason, hint=self.hint or _NEXT)


def judge_drop(
    subject: str,
    now: Score,
    against: str,
    before: Score | None,
    rule: Rule,
    p: float | None = None,
) -> Verdict:
    """Judge a score by `min_score` and by its drop from another score.

    Scores without items, such as a harness's, are compared without an interval. A drop of exactly
    `max_drop` passes. `p` is the comparison's p value if it is adjusted for other suites. What was
    a server's or the metric's fault, and not the model's, is said.
    """
    found = _judged(subject, now, against, before, rule, p)
    faults, parsed = foreign_faults(now), any("parser" in row for row in now.per_item)
    hints = (ANOTHER_PARSER if parsed else "", found.hint)
    return replace(
        found,
        reason="; ".join((found.reason, *faults)),
        hint=found.hint if found.passed else "; ".join(filter(None, hints)),
    )


def foreign_faults(score: Score) -> tuple[str, ...]:
    """Return what a server or the metric is to blame for; one text a kind, with a count."""
    found = []
    unjudged = [str(row["unjudged"]) for row in score.per_item if "unjudged" in row]
    parsed = sum("parser" in row for row in score.per_item)
    refused = [str(row["error"]) for row in score.per_item if "error" in row]
    if parsed:
        found.append(
            f"in {parsed} of {score.n} questions the server's parser left a call in the text or"
            " gave arguments that are no JSON"
        )
    if refused:
        found.append(
            f"{len(refused)} of {score.n} questions got no answer, the first: {refused[0]}"
        )
    if unjudged:
        found.append(
            f"{len(unjudged)} of {score.n} questions count as wrong, since they could not be"
            f" judged, the first: {unjudged[0]}"
        )
    return tuple(found)


def _judged(
    subject: str,
    now: Score,
    against: str,
    before: Score | None,
    rule: Rule,
    p: float | None,
) -> Verdict:
    comparison = comparison_of(now, before)
    reason = f"{NAMES[subject]} scores {shown(now)}"
    if now.score < rule.min_score:
        return Verdict(
            subject=subject,
            against=against if before else "",
            passed=False,
            reason=f"{reason}, below the minimum score of {rule.min_score:.3f}",
            hint=changed(now, before) or changed(now, None),
            comparison=comparison,
            p=p,
        )
    if before is None:
        return Verdict(subject=subject, against="", passed=True, reason=reason)
    drop = before.score - now.score
    # A drop of exactly max_drop passes, despite rounding of floats.
    passed = drop <= rule.max_drop + 1e-9
    loss = f"{drop:.3f} below" if drop > 0 else f"{-drop:.3f} above" if drop < 0 else "the same as"
    reason += f", {loss} {NAMES[against]}, {shown(before)}"
    needed = 0
    if comparison:
        low, high = comparison.interval
        reason += f"; the drop is {low:.3f} to {high:.3f} with 95 % confidence"
        if drop > 0:
            chance = comparison.p if p is None else p
            might = "may be" if chance > _CHANCE else "is not"
            reason += f" and {might} chance (p={chance:.2g})"
        needed = items_needed(rule.max_drop)
    return Verdict(
        subject=subject,
        against=against,
        passed=passed,
        reason=reason if passed else f"{reason}; at most {rule.max_drop:.3f} is allowed",
        hint="" if passed else changed(now, before),
        comparison=comparison,
        p=p,
        needed=needed if comparison and needed > comparison.n else 0,
    )


def shown(score: Score) -> str:
    """Return a score with its interval, as text."""
    if not score.n:
        return f"{score.score:.3f}"
    low, high = score_interval(score)
    return f"{score.score:.3f} ({low:.2f} to {high:.2f}, n={score.n})"


def changed(now: Score, before: Score | None) -> str:
    """Describe up to three wrong items; if known, only those that were right before."""
    earlier = before.per_item if before else ()
    lines = []
    for position, row in enumerate(now.per_item):
        was_row = earlier[position] if position < len(earlier) else None
        if row["ok"] or (was_row and value_of(was_row) <= value_of(row)):
            continue
        was = f", was {_short(_said(was_row))}" if was_row else ""
        lines.append(f"{_short(row['prompt'])} now gives {_short(_said(row))}{was}")
    return "; ".join(lines[:_MOST_SHOWN])


def _said(row: Mapping[str, JsonValue]) -> JsonValue:
    graded = f" ({row['value']:.3f})" if "value" in row else ""
    if "unjudged" in row:
        return f"{row['answer']} (not judged: {row['unjudged']})"
    return f"no answer: {row['error']}" if "error" in row else f"{row['answer']}{graded}"


def _short(text: JsonValue) -> str:
    flat = " ".join(str(text).split())
    return repr(flat if len(flat) <= _SHOWN_LENGTH else flat[: _SHOWN_LENGTH - 1] + "…")


def too_few(verdict: Verdict, max_drop: float) -> str:
    """Return a warning if there are too few items to show the requested `max_drop`, else ''."""
    if not verdict.needed or verdict.comparison is None:
        return ""
    return _few(verdict.comparison.n, max_drop, verdict.needed)


def _few(n: int, max_drop: float, needed: int) -> str:
    if not needed:
        return f"no number of questions can show that the drop is at most {max_drop:g}"
    return (
        f"{n} questions are too few to show that the drop is at most {max_drop:g}: even if no"
        f" answer changes, {needed} are needed"
    )


def sampled(n: int, of: int) -> str:
    """Return what a sample of n of so many questions can show: the bound if no answer changes."""
    return (
        f"{n} of {of} questions are asked: at best they show that the drop is at most"
        f" {paired_interval(0, 0, n)[1]:.3f}"
    )


def guess_of(score: Score) -> Score | None:
    """Return how one scores who has not read the texts: the commonest label, or any order.

    It stands for a base that lacks the head which an adapter brings. None for other metrics.
    """
    if not score.per_item or not all("guess" in row for row in score.per_item):
        return None
    rows = [{**row, "value": row["guess"]} for row in score.per_item]
    if not score.graded:
        rows = [{**row, "ok": bool(row["guess"])} for row in score.per_item]
    share = math.fsum(float(row["guess"]) for row in rows) / len(rows)
    return replace(score, score=share, per_item=tuple(rows))


def reference_of(against: str, asked: Container[str]) -> str:
    """Return who of those that were asked is held against; empty for nobody."""
    wanted = ("adapter", "base") if against == "adapter" else (against,)
    return next((who for who in wanted if who in asked), "")


Chances = Mapping[str, float]
"""What is tested of a suite -> its p value. `shown`: that no more was lost than its rule allows;
`learned`: that base + adapter is better than the base; a subject: that it is better than what it
was made of."""


def chances(scores: Scores, rule: Rule) -> Chances:
    """Return the p values of one suite's scores, those that there are."""
    reference, found = scores.get(reference_of(rule.against, scores)), dict[str, float]()
    if (last := scores.get("image") or scores.get("merged")) and last.n:
        if not rule.against:
            # The test that Wilson's interval inverts, or the mean's.
            middle, error = (
                last.score,
                math.sqrt(max(rule.min_score * (1 - rule.min_score), 1e-12) / last.n),
            )
            if last.graded:
                middle, error = _mean(last.values)
            found["shown"] = _tail((middle - rule.min_score) / error)
        elif change := comparison_of(last, reference):
            middle, error = change.adjusted
            found["shown"] = _tail((rule.max_drop - middle + 1e-9) / error)
    for who in _JUDGED:
        if who in scores and (change := comparison_of(scores[who], _made_of(scores, reference))):
            found[who] = change.p
    if "adapter" in scores:
        base = scores.get("base") or guess_of(scores["adapter"])
        if change := comparison_of(scores["adapter"], base):
            found["learned"] = change.p
    return found


def _tail(z: float) -> float:
    """Return the standard normal distribution's mass above z."""
    return math.erfc(z / math.sqrt(2)) / 2


def adjusted(suites: Sequence[Chances]) -> tuple[Chances, ...]:
    """Return the p values of suites that are judged together, each kind adjusted over them."""
    found: list[dict[str, float]] = [{} for _ in suites]
    for kind in {kind for one in suites for kind in one}:
        places = [place for place, one in enumerate(suites) if kind in one]
        for place, p in zip(places, holm([suites[n][kind] for n in places]), strict=True):
            found[place][kind] = p
    return tuple(found)


def inconclusive_reasons(scores: Scores, rule: Rule, p: Chances | None = None) -> tuple[str, ...]:
    """Return why these scores do not show that the image does what its rule asks.

    One sentence each; () if they show, with 95 % confidence, that at most `max_drop` was lost. Of a
    task that the image was not asked yet, what the other scores already say. `p` has the p values
    if they are adjusted for other suites.
    """
    p = chances(scores, rule) if p is None else p
    judged = {who: scores[who] for who in _JUDGED if who in scores}
    answered = scores.get("adapter", scores.get("base"))
    if answered is None:
        return ()
    asked = (*_asked_otherwise(answered, judged), *_other_vectors(answered, judged))
    if not rule.against:
        return (*asked, *_too_few_for_bar(judged, rule.min_score, p))
    reference = scores[reference_of(rule.against, scores)]
    return (
        *asked,
        *_nothing_to_lose(scores, reference, rule, p),
        *_gains(scores, reference, judged, p),
        *_too_few(reference, scores.get("image"), scores.get("merged"), rule.max_drop, p),
    )


def _asked_otherwise(reference: Score, judged: Scores) -> Iterator[str]:
    """Yield which subjects got other tokens than the reference for the same questions.

    Counts are compared, since servers return no token ids; answers without them are left out.
    """
    for who, score in judged.items():
        asked = zip(reference.per_item, score.per_item, strict=False)
        pairs = [(was.get("prompt_tokens"), now.get("prompt_tokens")) for was, now in asked]
        wrong = [(had, got) for had, got in pairs if had and got and had != got]
        if wrong:
            had, got = wrong[0]
            yield (
                f"{NAMES[who]} was asked otherwise than the reference in {len(wrong)} of"
                f" {score.n} questions: the first has {had} tokens for the reference and {got} for"
                f" {NAMES[who]}"
            )


def _other_vectors(reference: Score, judged: Scores) -> Iterator[str]:
    """Yield whose vectors point elsewhere, whatever documents they find.

    Four bits left 0.97 or more of small models here, and another pooling 0.81 and 0.94.
    """
    if not reference.vectors:
        return
    from weightsmith.evaluating.ranking import cosines_of  # with numpy

    for who, score in judged.items():
        if len(reference.vectors) != len(score.vectors):
            continue
        found = cosines_of(reference.vectors, score.vectors)
        if found and (mean := sum(found) / len(found)) < _NEAR:
            yield (
                f"{NAMES[who]} gives other vectors than the reference: their cosine is"
                f" {mean:.3f} on average; check pooling and prompts"
            )


def _nothing_to_lose(scores: Scores, reference: Score, rule: Rule, p: Chances) -> Iterator[str]:
    """Yield why the base, or an image that knows nothing, would pass too."""
    base, who = scores.get("base"), "the base alone"
    if base is None:
        base, who = guess_of(reference), NAMES["guess"]
    if reference.score <= max(_NEAR_ZERO, rule.max_drop):
        yield f"the reference scores {shown(reference)}: an image without a right answer would pass"
    elif base is None or base is reference:
        return
    elif base.score >= reference.score - rule.max_drop:
        yield (
            f"{who} scores {shown(base)} and would pass, because base + adapter scores"
            f" {shown(reference)}"
        )
    elif (chance := p.get("learned", 0.0)) > _CHANCE:
        yield (
            f"base + adapter scores {shown(reference)}, not significantly more than {who},"
            f" {shown(base)} (p={chance:.2g})"
        )


def _made_of(scores: Scores, reference: Score | None) -> Score | None:
    """Return the score of base + adapter: what it gained on the base is no wonder."""
    return scores.get("adapter", reference) if reference else None


def _gains(scores: Scores, reference: Score, judged: Scores, p: Chances) -> Iterator[str]:
    """Yield which subjects are better than what they were made of."""
    before = _made_of(scores, reference)
    than = NAMES["adapter" if "adapter" in scores else "base"]
    for who, score in judged.items():
        change = comparison_of(score, before)
        if before and change and change.won > change.lost and p[who] <= _CHANCE:
            yield (
                f"{NAMES[who]} scores {shown(score)}, significantly more than {than},"
                f" {shown(before)} (p={p[who]:.2g}): check whether it was asked the same"
            )


def _too_few(
    reference: Score, image: Score | None, merged: Score | None, max_drop: float, p: Chances
) -> Iterator[str]:
    """Yield that the questions do not show a drop of at most `max_drop`.

    Before the image was asked, only what no answer of it could change.
    """
    last = image or merged
    if last is None:
        return
    needed, change = items_needed(max_drop), comparison_of(last, reference)
    if change is None:
        yield "there is no result per question, so chance cannot be excluded"
    elif max_drop <= 0 or needed > change.n:
        yield _few(change.n, max_drop, needed)
    elif image is not None and p["shown"] > _ONE_SIDED:
        said = f"{change.n} questions do not show that the drop is at most {max_drop:g}"
        if change.interval[1] > max_drop + 1e-9:
            yield f"{said}: with 95 % confidence it is at most {change.interval[1]:.3f}"
        else:
            yield f"{said}, judged together with the other suites (p={p['shown']:.2g})"


def _too_few_for_bar(judged: Scores, min_score: float, p: Chances) -> Iterator[str]:
    image = judged.get("image")
    if image is not None and p.get("shown", 1.0) > _ONE_SIDED:
        low, _ = score_interval(image)
        yield (
            f"{image.n} questions do not show a score of at least {min_score:g}: with 95 %"
            f" confidence it is at least {low:.3f}"
        )
