"""The target `auto`: candidates, smallest or fastest first, are built until one is proven.

A candidate is a build of one target like any other, with the recipe's whole gate. Merge, reference
answers, importance and losses have the same keys for all, so the store gives them to the next one.
What was left for good, such as a file over its limits or a suite that cannot be proven any more, is
stored too: a build that was interrupted goes on with the candidate at which it stopped.

Where speed is preferred, a candidate's price is the time of a token. For each token of one request,
a decoder reads its weights once, so it writes at most bandwidth / bytes tokens per second (the
memory roof of Williams, Waterman and Patterson, Roofline, CACM 52, 2009; weights that fit the CPU's
cache are read faster). By that bound candidates are ordered. A started one is measured, and waits
behind all that may still be faster, as in best-first branch and bound; so the first that is proven
is the fastest. No order changes an error rate, since it knows no answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from weightsmith.building.checks import check_assembly, check_places
from weightsmith.building.graph import BuildRun, foresee
from weightsmith.building.pipeline import steps_of
from weightsmith.building.record import BuiltTarget
from weightsmith.building.request import Attempt, BuildRequest
from weightsmith.building.targets import AUTO, all_targets, can_make
from weightsmith.core.errors import (
    CheckFailed,
    EnvironmentFailure,
    InputRefused,
    UsageError,
    WeightsmithError,
)
from weightsmith.core.values import JsonValue, Sources
from weightsmith.evaluating.build_record import AutoRecord, CandidateRecord
from weightsmith.evaluating.candidacy import (
    Candidacy,
    LargerThanForeseen,
    SlowerThanForeseen,
)
from weightsmith.evaluating.results import RecipeTask, named, tasks_of
from weightsmith.evaluating.sequential import (
    ERROR,
    candidates_testable,
    limit_of,
    questions_needed,
)
from weightsmith.models.facts import ModelFacts
from weightsmith.quantizers import formats, of_format
from weightsmith.recipe.schema import Auto
from weightsmith.serving import engines
from weightsmith.serving.devices import is_cpu
from weightsmith.serving.memory import human, parse_size
from weightsmith.serving.parameters import is_tied
from weightsmith.serving.targets import Target
from weightsmith.stages.resolve import NotHere
from weightsmith.steps.launch import missing_device
from weightsmith.steps.tools import Tools

_FIXED = ("bits", "size", "fit", "mix", "tensor_types")
"""Keys of `quantize` that say what `auto` is to find out."""
_ALIKE = 1.04
"""Of candidates whose sizes differ by less, one is tried."""
_TOO_LARGE = "larger than auto.at_most"
_CHEAPER = {
    "size": "not tried: a smaller one is proven",
    "speed": "not tried: a faster one is proven",
}
Build = Callable[[BuildRequest], Iterator[BuiltTarget]]


class CandidateLeft(Exception):
    """A candidate was refused by a step of its own, and is not the one."""

    def __init__(self, row: CandidateRecord, error: WeightsmithError, *, tested: bool) -> None:
        super().__init__(row.left)
        self.row, self.error, self.tested = row, error, tested


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One image that may be chosen."""

    request: BuildRequest
    """Its build, of one target."""
    options: Mapping[str, JsonValue]
    price: int
    """Bytes of its weights, as they are foreseen, or as they were made."""
    foreseen_speed: float = 0.0
    """Tokens per second that the memory's bandwidth allows; 0 if size is preferred."""
    speed: float = 0.0
    """Tokens per second as measured; 0 if it was not."""
    why_not: str = ""
    """Why it is not tried."""

    @property
    def target(self) -> Target:
        """The target that it is."""
        return self.request.targets[0]

    @property
    def shown(self) -> str:
        """Its name with its options, and its price."""
        fast = f" and {self.row.fast}" if self.row.fast else ""
        return f"{self.row.name}, {human(self.price)}{fast}"

    @property
    def rank(self) -> tuple[float, str, str]:
        """What it is ordered by: the time of a token if speed is preferred, else its bytes."""
        fast = self.speed or self.foreseen_speed
        return 1 / fast if fast else self.price, self.target.name, str(self.options)

    @property
    def row(self) -> CandidateRecord:
        """What is recorded of it before it was tried."""
        return CandidateRecord(
            target=self.target.name,
            options=self.options,
            price=self.price,
            left=self.why_not,
            foreseen_speed=self.foreseen_speed,
            speed=self.speed,
        )


def settings_of(request: BuildRequest) -> Auto:
    """Return the recipe's `auto`; raises UsageError for what contradicts it."""
    recipe = request.file.recipe
    if (auto := recipe.auto) is None:
        raise UsageError(
            f"the target {AUTO} needs `auto` in the recipe, with at least an engine",
            hint=f"as in auto: {{engine: NAME, at_most: 6GB}}; engines: {', '.join(engines())}",
        )
    if unknown := [name for name in auto.engine if name not in engines()]:
        raise UsageError(
            f"auto.engine: unknown engine {unknown[0]!r}",
            hint=f"engines: {', '.join(engines())}",
        )
    if fixed := [key for key in _FIXED if getattr(recipe.quantize, key)]:
        raise UsageError(
            f"quantize.{fixed[0]} fixes what the target {AUTO} is to find out",
            hint=f"leave it out, or name a target instead of {AUTO}",
        )
    if auto.at_most and not parse_size(auto.at_most):
        raise UsageError(
            f"auto.at_most: no weights have {auto.at_most}",
            hint="set it to what an image may have, such as 6GB, or leave it out for any size",
        )
    return auto


def check_questions(tasks: Sequence[RecipeTask]) -> None:
    """Raise InputRefused if the questions cannot prove anything, and say how many could."""
    if not tasks:
        raise InputRefused(
            f"the target {AUTO} is chosen by questions, and the recipe has no `evaluate`",
            hint="give the recipe questions: docs/how-to/evaluate-and-compare.md",
        )
    suites = [(len(one.task.items), limit_of(one.rule)) for one in tasks]
    for one, (n, limit) in zip(tasks, suites, strict=True):
        if limit >= 1 or 0 < (needed := questions_needed(limit, ERROR)) <= n:
            continue
        if not needed:
            said = f"no number of questions proves that the drop is at most {limit:g}"
            hint = "allow a loss with evaluate.max_drop"
        else:
            least = -(-(1 - ERROR ** (1 / n)) * 1000 // 1) / 1000
            said = (
                f"nothing can be proven: {n} questions are too few to show that the drop is at most"
                f" {limit:g}; even if no answer changes, {needed} are needed"
            )
            hint = f"ask {needed} questions or more, or set max_drop to {least:g}"
        raise InputRefused(
            named(one, said), hint=hint, details={"questions": n, "questions_needed": needed}
        )


def candidates_of(
    request: BuildRequest, tools: Tools, sources: Sources | None = None, bandwidth: float = 0.0
) -> tuple[Candidate, ...]:
    """Return every candidate, those to try first, cheapest first, and then the others.

    Sources are those that were resolved; without, those that are here. `bandwidth` is the memory's,
    in bytes per second, if speed is preferred. Raises InputRefused if none
    is left, and NotHere, and what building each of them would raise.
    """
    auto = settings_of(request)
    most = parse_size(auto.at_most) if auto.at_most else 0
    found, refused = [], dict[str, WeightsmithError]()
    for one in _all_of(request, auto):
        try:
            found.append(_priced(one, tools, sources, bandwidth))
        except (UsageError, InputRefused, EnvironmentFailure) as error:
            refused[one.target.name] = error
            found.append(replace(one, why_not=error.message))
    made = sorted((one for one in found if not one.why_not), key=lambda one: one.rank)
    if not made:
        first = next(iter(refused.values()))
        raise type(first)(
            f"{AUTO}: no format of {' or '.join(auto.engine)} can be built; the first of"
            f" {len(refused)} reasons: {first.message}",
            hint=first.hint,
        )
    small = [one for one in made if not most or one.price <= most]
    if not small:
        least = min(made, key=lambda one: one.price)
        raise InputRefused(
            f"auto.at_most: the smallest candidate, {least.target.name}, has about"
            f" {human(least.price)}, more than {human(most)}",
            hint=f"set auto.at_most to {-(-least.price // 10**6)}MB or more",
        )
    tried: list[Candidate] = []
    others = [one for one in found if one.why_not]
    others += [replace(one, why_not=_TOO_LARGE) for one in made if one not in small]
    while small:
        group = [one for one in small if _alike(one, small[0])]
        best = _loses_least(group)
        tried.append(best)
        why = f"about as large as {best.target.name}, which is tried"
        others += [replace(one, why_not=why) for one in group if one is not best]
        small = [one for one in small if one not in group]
    return (*tried, *others)


def _loses_least(alike: Sequence[Candidate]) -> Candidate:
    """Return the largest of candidates of about one size, or its engine's AWQ or GPTQ.

    At equal size, AWQ loses less than vLLM's mix, and a mix of 4 bits alone is GPTQ
    (benchmarks/README.md).
    """
    largest = max(alike, key=lambda one: one.price)
    moving = [
        one
        for one in alike
        if one.target.engine == largest.target.engine
        and (name := one.target.format.name) in formats()
        and of_format(name).compensated
        and one.target.format.kind != "mix"
    ]
    return max(moving, key=lambda one: one.price, default=largest)


def _alike(one: Candidate, cheapest: Candidate) -> bool:
    """Return whether trying one of both is enough: engines differ in speed at the same size."""
    others = one.foreseen_speed and one.target.engine.name != cheapest.target.engine.name
    return not others and one.rank[0] <= cheapest.rank[0] * _ALIKE


def _all_of(request: BuildRequest, auto: Auto) -> Iterator[Candidate]:
    """Yield a build for each target of the engines, and for each of its variants."""
    recipe = request.file.recipe
    wanted = recipe.quantize.model_dump()
    proven = tuple(one.changed(require="proven") for one in recipe.evaluate)
    adapters = tuple(
        one.changed(evaluate=tuple(each.changed(require="proven") for each in one.evaluate))
        if one.evaluate
        else one
        for one in recipe.adapters
    )
    for target in all_targets().values():
        format_ = target.format
        if target.engine.name not in auto.engine or format_.unmerged or not can_make(format_):
            continue
        if format_.instead_of and target.engine.layouts:
            continue  # the same numbers in the layout that this engine prefers are another target
        variants: Sequence[Mapping[str, JsonValue]] = ({},)
        if format_.name in formats():
            variants = of_format(format_.name).variants(format_, wanted)
        for options in variants:
            changed = recipe.changed(
                targets=(target.name,),
                auto=None,
                evaluate=proven,
                adapters=adapters,
                quantize=recipe.quantize.changed(**options),
            )
            file = replace(request.file, recipe=changed)
            beside = bool(request.targets)
            alone = replace(request, file=file, targets=(target,), auto=False, beside=beside)
            yield Candidate(request=alone, options=options, price=0)


def _priced(one: Candidate, tools: Tools, sources: Sources | None, bandwidth: float) -> Candidate:
    """Return a candidate with its price; raises what its build would before any work.

    The price is that of the plan also where the weights exist, and rounded, since a merged
    checkpoint is some bytes smaller than foreseen: a build that goes on has the same order.
    """
    check_places(one.request)
    request = one.request.pinned()
    steps = steps_of(request)
    seen = foresee(steps, tools, sources)
    check_assembly(request, steps, seen)
    (own,) = steps.targets
    planned = seen[own.weights].planned or seen[own.weights].weight_bytes
    price = int(float(f"{planned:.3g}"))
    if price > seen[steps.checkpoint].weight_bytes * _ALIKE:
        raise InputRefused(
            "larger than the checkpoint that it would be made of", hint="name the target itself"
        )
    for step in own.steps:
        for builder in step.builders():
            tools.runner.check(builder)
    if missing := missing_device(seen[own.config].device, tools):
        raise EnvironmentFailure(
            f"its image is {missing}, so it cannot be asked",
            hint="build on a machine that can start it, or name another auto.engine",
        )
    if not bandwidth:
        return replace(one, price=price)
    if not is_cpu(device := seen[own.config].device):
        raise EnvironmentFailure(
            f"its speed is measured on CPUs, and it is for {device}",
            hint="set auto.prefer: size; of one engine's formats, smaller ones usually read faster",
        )
    model = seen[steps.checkpoint].model
    if model.task.kind != "generate":
        raise InputRefused(
            "its model writes no tokens, so auto.prefer: speed has nothing to measure",
            hint="leave auto.prefer out, and give `bench` limits instead",
        )
    weights = seen[steps.checkpoint].weight_bytes // (4 if model.stated_dtype == "float32" else 2)
    read = max(1.0, price * (1 - _unread(model) / max(1, weights)))
    return replace(one, price=price, foreseen_speed=float(f"{bandwidth / read:.3g}"))


def _unread(model: ModelFacts) -> int:
    """Return how many weights a decoder does not read for each token, at most.

    Of an input embedding of its own, it reads a row; of experts, at least one; of a vision tower,
    nothing.
    """
    shape, more = model.shape, model.matrices
    embedding = 0 if is_tied(model) else shape.vocab * shape.hidden
    expert = 3 * shape.hidden * (more.expert_width or shape.intermediate)
    experts = more.sparse_layers * max(0, more.experts - 1) * expert
    return embedding + experts + more.vision.weights


def check_choice(request: BuildRequest) -> AutoRecord:
    """Return how candidates will be tested, without any; reads the recipe and the questions alone.

    Raises what `settings_of` and `check_questions` raise.
    """
    auto = settings_of(request)
    check_questions(tasks_of(request.file))
    return AutoRecord(
        engines=auto.engine,
        at_most=parse_size(auto.at_most) if auto.at_most else 0,
        error=ERROR,
        tests=1,
        level=ERROR,
        candidates=(),
        prefer=auto.prefer,
    )


def foreseen_choice(request: BuildRequest, tools: Tools) -> tuple[AutoRecord, BuildRequest]:
    """Return the candidates in the order of trying, and the build of the first.

    Their prices are 0, and their order is that of their names, if sources are not on this machine.
    Raises what `choose` would raise before any work.
    """
    tried, every = check_choice(request), _all_of(request, settings_of(request))
    tried = _with_bandwidth(tried, tools)
    try:
        found = candidates_of(request, tools, bandwidth=tried.bandwidth)
    except NotHere:
        found = tuple(every)
    tried = _tests(tried, request, sum(not one.why_not for one in found))
    return replace(tried, candidates=tuple(one.row for one in found)), found[0].request


def _with_bandwidth(tried: AutoRecord, tools: Tools) -> AutoRecord:
    if tried.prefer == "size":
        return tried
    return replace(tried, bandwidth=float(f"{tools.bandwidth():.3g}"))


def choose(request: BuildRequest, tools: Tools, build: Build) -> Iterator[BuiltTarget]:
    """Yield the image of the cheapest candidate that is proven, built by `build`.

    Raises CheckFailed if none is, with the table of what was tried, and what `settings_of`,
    `check_questions` and `candidates_of` raise.
    """
    tried = _with_bandwidth(check_choice(request), tools)
    check_places(next(_all_of(request, settings_of(request))).request)
    found = candidates_of(request, tools, _resolved(request, tools), tried.bandwidth)
    others = [one.row for one in found if one.why_not]
    queue = [one for one in found if not one.why_not]
    tried = _tests(tried, request, len(queue))
    tests, errors = tried.tests, list[WeightsmithError]()
    queue, skipped = _spread(queue, tests)
    others = [*skipped, *others]
    while queue and tests:
        one = queue.pop(0)
        tools.progress.note(f"{AUTO}: trying {one.shown}")
        choice = _attempt(one, queue, others, tried, tools)
        try:
            yield from build(replace(one.request, choice=choice))
        except LargerThanForeseen as larger:
            queue = sorted([*queue, replace(one, price=larger.size)], key=lambda each: each.rank)
        except SlowerThanForeseen as slower:
            tools.progress.note(f"{AUTO}: {one.row.name} has {slower.speed:.3g} tokens/s")
            queue = sorted([*queue, replace(one, speed=slower.speed)], key=lambda each: each.rank)
        except CandidateLeft as left:
            tools.progress.note(f"{AUTO}: left {one.row.name}: {left.row.left}")
            errors.append(left.error)
            tried = replace(tried, candidates=(*tried.candidates, left.row))
            if left.tested:
                tests -= 1
                queue, skipped = _spread(queue, tests)
                others = [*skipped, *others]
        else:
            return
    raise _none_proven(tried, queue, others, errors)


def _attempt(
    one: Candidate,
    queue: Sequence[Candidate],
    others: Sequence[CandidateRecord],
    tried: AutoRecord,
    tools: Tools,
) -> Attempt:
    """Return the attempt at a candidate, of which a queue and others are left."""
    fast = tried.prefer == "speed"
    candidacy = Candidacy(
        level=tried.level,
        at_most=tried.at_most,
        next_price=queue[0].price if queue and not fast else 0,
        measured=fast,
        speed=one.speed,
        next_speed=queue[0].speed or queue[0].foreseen_speed if queue else 0.0,
    )
    return Attempt(
        candidacy=candidacy,
        price=one.price,
        foreseen_speed=one.foreseen_speed,
        options=one.options,
        began=tools.clock(),
        tried=tried,
        rest=(*(replace(each.row, left=_CHEAPER[tried.prefer]) for each in queue), *others),
    )


def _tests(tried: AutoRecord, request: BuildRequest, candidates: int) -> AutoRecord:
    """Return it with the number of tests, and their level, for so many candidates."""
    suites = [(len(one.task.items), limit_of(one.rule)) for one in tasks_of(request.file)]
    tests = candidates_testable(suites, candidates)
    return replace(tried, tests=tests, level=ERROR / tests)


def _spread(
    queue: Sequence[Candidate], tests: int
) -> tuple[list[Candidate], list[CandidateRecord]]:
    """Return the candidates from the next one to test on, and those before, which are skipped.

    Fewer tests than candidates are spread over the sizes: the smallest ones alone would most likely
    all lose too much.
    """
    skip = max(0, len(queue) - tests) // (tests + 1) if tests else 0
    why = f"skipped: the questions can test {tests} of {len(queue)} candidates, so sizes are spread"
    return [*queue[skip:]], [replace(one.row, left=why) for one in queue[:skip]]


def _resolved(request: BuildRequest, tools: Tools) -> Sources:
    """Return the sources, fetched and pinned, so that candidates can be foreseen."""
    steps = steps_of(replace(request, targets=(), auto=False).pinned())
    with BuildRun(steps, tools) as run:
        return run.perform(steps.sources)


def _none_proven(
    tried: AutoRecord,
    queue: Sequence[Candidate],
    others: Sequence[CandidateRecord],
    errors: Sequence[WeightsmithError],
) -> CheckFailed:
    last = errors[-1]
    hint, _, report = last.hint.partition("\n")
    if queue:
        hint = (
            f"the questions can test {tried.tests} candidates: ask more of them, to try"
            f" {queue[0].row.name} and larger ones; or name a target"
        )
    elif (
        tried.candidates[-1].sequence or not hint
    ):  # "a format that loses less" is none of those that are left
        larger = "raise auto.at_most, " if any(one.left == _TOO_LARGE for one in others) else ""
        hint = f"{larger}train the adapter further, or allow a larger drop with evaluate.max_drop"
    untried = (replace(one.row, left="not tried") for one in queue)
    table = replace(tried, candidates=(*tried.candidates, *untried, *others))
    count = len(tried.candidates)
    return CheckFailed(
        f"{count} candidates were tried, and none is proven; the last, {tried.candidates[-1].name}:"
        f" {last.message}",
        hint=f"{hint}\n{report}" if report else hint,
        details={"auto": table.to_json()},
    )
