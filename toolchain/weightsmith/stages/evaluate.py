"""Image -> scores: start the image as users do, check it, query it, and score its answers.

The image is tested under a candidate name, and gets its own when it has passed: an image that was
pushed can be pulled by digest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from weightsmith.core.errors import CheckFailed
from weightsmith.core.values import Artifact, Digest, JsonValue, StageInputs, canonical, key_of
from weightsmith.evaluating.acceptance import acceptance, drafted, last_length
from weightsmith.evaluating.candidacy import (
    Candidacy,
    LargerThanForeseen,
    SlowerThanForeseen,
    Unprovable,
    Watch,
    ask_in_sequence,
    require_proven,
    unprovable,
)
from weightsmith.evaluating.client import Served
from weightsmith.evaluating.decoding import decoding_speed
from weightsmith.evaluating.gate import foreign_faults
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.pooled_smoke import POOLING, check_pooling
from weightsmith.evaluating.replay import ReplaySet, read_replay
from weightsmith.evaluating.replaying import record, replay, tolerance_of
from weightsmith.evaluating.results import Result, named, scored
from weightsmith.evaluating.session import ServerSession
from weightsmith.evaluating.smoke import (
    PICTURE,
    REFUSED,
    Promise,
    Smoke,
    check_life,
    check_serving,
)
from weightsmith.evaluating.task import Answers, Task, ask_server, score_task
from weightsmith.models.facts import ModelFacts, read_facts
from weightsmith.models.templates import has_tools, takes_parts
from weightsmith.oci.image import Image, host_image, index_of
from weightsmith.provenance.attest import ImageInputs, ImageMaterials, index_of_materials
from weightsmith.provenance.labels import has_own_engine
from weightsmith.serving.engine import Engine, projector_in
from weightsmith.serving.memory import human
from weightsmith.serving.parsers import fitting, fitting_thoughts
from weightsmith.serving.plan import GRACE_SECONDS, ServingConfig
from weightsmith.serving.pooling import width_of
from weightsmith.steps.destinations import InStore
from weightsmith.steps.launch import (
    start,
    start_seconds,
    started_by,
    what_is_missing,
    why_not_started,
)
from weightsmith.steps.outputs import candidate
from weightsmith.steps.replays import ReplayRequest, replay_requests
from weightsmith.steps.served_adapters import chat_template, how_asked, served_checkpoint
from weightsmith.steps.stage_result import StageResult, Timer
from weightsmith.steps.step import Results, Step, Trial, UnforeseenStep
from weightsmith.steps.tools import Tools
from weightsmith.validating.result import Validation

RECIPE_NUMBER = 4
_REPLAY_NUMBER = 1
_SEQUENCE_NUMBER = 1
_SPEED_NUMBER = 1
_ANSWERS, _REPLAY, _DROPS, _SPEED = "answers.json", "replay.json", "drops.json", "speed.json"
_ENDS = frozenset({"stop", "tool_calls", "error"})
"""Why an answer is over that does not run on; what the server refused is judged as wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskInProgress:
    """A task with its result so far, and the adapter that answers it."""

    result: Result
    model: str = ""
    """The model's name in requests; "" for the image's served name."""
    fields: Mapping[str, JsonValue] = field(default_factory=dict)
    """Extra request fields, for engines that do not choose the adapter by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageEvaluation:
    """What an image's answers depend on, and its questions."""

    artifact: Artifact
    config: ServingConfig
    base: Digest
    """Digest of the image below the weights."""
    engine: Engine
    chat: bool
    """Whether the served model has a chat template."""
    parts: bool
    """Whether that template takes contents in parts, as a message with a picture has."""
    tools: bool
    """Whether it says which tools may be called."""
    model: ModelFacts
    """Of the served checkpoint."""
    questions: tuple[TaskInProgress, ...]
    replay: tuple[ReplayRequest, ...] = ()
    """What its replay set asks."""
    tolerance: float = 0.0
    """Of that set, in nats."""
    earlier: ReplaySet | None = None
    """A set of the same requests that another machine made, to be kept if it holds here."""
    drafts: bool = False
    """Whether something drafts tokens for it."""
    candidacy: Candidacy | None = None
    """Of an image that `auto` tries: its questions are asked in sequence."""
    machine: tuple[str, int] = ("", 0)
    """CPU and cores of the machine on which a candidate's speed is measured."""

    def replay_inputs(self) -> StageInputs:
        """Everything that the answers of the replay set depend on."""
        plan, neutral = self.config.plan, self.engine.neutral_settings
        return StageInputs(
            stage="replay",
            recipe_number=_REPLAY_NUMBER,
            inputs={
                "artifact": self.artifact.digest,
                "base": self.base,
                "settings": {k: v for k, v in plan.settings.items() if k not in neutral},
                "requests": key_of([[one.path, one.request] for one in self.replay]),
                "tolerance": self.tolerance,
                **(
                    {"references": key_of([one.reference for one in self.replay])}
                    if any(one.reference for one in self.replay)
                    else {}
                ),
                **({"earlier": self.earlier.digest} if self.earlier else {}),
            },
        )

    def inputs(self, question: TaskInProgress) -> StageInputs:
        """Everything that a task's answers depend on; not the image's names, labels and limits."""
        plan, task = self.config.plan, question.result.task.task
        model, fields = question.model, dict(question.fields)
        neutral = self.engine.neutral_settings
        settings = {k: v for k, v in plan.settings.items() if k not in neutral}
        longest = max((sum(len(m["content"]) for m in i.messages) for i in task.items), default=0)
        longest = (
            max(task.lengths) + sum(map(len, task.prompts(self.model.task)))
            if task.pooled
            else longest
        )
        return StageInputs(
            stage="trial",
            recipe_number=RECIPE_NUMBER,
            inputs={
                "artifact": self.artifact.digest,
                "base": self.base,
                "settings": settings,
                # If every question fits, a longer context changes nothing. A token has at least
                # one character, and a chat template adds a few tokens.
                "context": plan.max_model_len
                if task.pictures  # whose tokens are the model's own count
                else min(plan.max_model_len, longest + task.max_tokens + 256),
                "questions": task.digest,
                "max_tokens": task.max_tokens,
                "chat": self.chat,
                **({"prompts": task.prompts(self.model.task)} if task.pooled == "vectors" else {}),
                **({"of": [model, fields]} if model or fields else {}),
            },
        )

    def speed_inputs(self) -> StageInputs:
        """Everything that a candidate's speed depends on, but what else the machine does."""
        plan, neutral = self.config.plan, self.engine.neutral_settings
        return StageInputs(
            stage="decoding",
            recipe_number=_SPEED_NUMBER,
            inputs={
                "artifact": self.artifact.digest,
                "base": self.base,
                "settings": {k: v for k, v in plan.settings.items() if k not in neutral},
                "machine": [*self.machine],
            },
        )

    def left_inputs(self, question: TaskInProgress) -> StageInputs:
        """Everything on which it depends that a candidate was left before its last question."""
        result = question.result
        return StageInputs(
            stage="left",
            recipe_number=_SEQUENCE_NUMBER,
            inputs={
                **self.inputs(question).inputs,
                "level": self.candidacy.level if self.candidacy else 0.0,
                "rule": asdict(result.task.rule),
                "expected": [list(item.expected) for item in result.task.task.items],
                "before": [row["ok"] for row in result.reference.per_item]
                if result.reference
                else [],
            },
        )


def takes_pictures(artifact: Artifact) -> bool:
    """Return whether the started engine takes pictures: not of a GGUF file without a projector."""
    if projector_in(artifact.tree):
        return True
    folder = artifact.tree.texts
    return (folder / "config.json").is_file() and read_facts(folder).sees_images


def _require_size(artifact: Artifact, candidacy: Candidacy) -> None:
    """Raise CheckFailed if they are too large, LargerThanForeseen if another candidate is next."""
    size = artifact.tree.size
    if candidacy.at_most and size > candidacy.at_most:
        raise CheckFailed(
            f"its weights have {human(size)}, and auto.at_most is {human(candidacy.at_most)}",
            hint=f"set auto.at_most to {-(-size // 10**6)}MB",
            details={"asked": False},
        )
    if candidacy.next_price and size > candidacy.next_price:
        raise LargerThanForeseen(size)


def _require_speed(speed: float, candidacy: Candidacy) -> None:
    """Raise SlowerThanForeseen if it was measured now, and another candidate may be faster."""
    if not candidacy.speed and speed < candidacy.next_speed:
        raise SlowerThanForeseen(speed)


def _speed(evaluation: ImageEvaluation, session: ServerSession | None, tools: Tools) -> float:
    """Return a candidate's stored speed, or measure and store it; 0 for one that is not measured.

    Kept, so that a build that goes on has the same order. Without a session, 0 if none is stored.
    """
    candidacy, store = evaluation.candidacy, InStore(tools.store)
    if not (candidacy and candidacy.measured):
        return 0.0
    if candidacy.speed or not (session or store.find(evaluation.speed_inputs)):
        return candidacy.speed

    def measure(_: Path) -> float:
        if session is None:
            raise AssertionError("the image was not started")
        question = evaluation.questions[0]
        name = question.model or evaluation.config.served_name
        return decoding_speed(
            session.adding(question.fields),
            Served(name=name, chat=evaluation.chat),
            evaluation.config.plan.max_model_len,
            tools.clock,
        )

    return float(store.document(evaluation.speed_inputs, _SPEED, measure).value)


def _smoke_inputs(image: Digest) -> StageInputs:
    return StageInputs(stage="smoke", recipe_number=RECIPE_NUMBER, inputs={"image": image})


def checks_of(image: Digest, tools: Tools) -> Sequence[Mapping[str, JsonValue]]:
    """Return the results of the checks that an image passed; () if it was not started."""
    entry = tools.store.find(_smoke_inputs(image).key)
    return tuple(entry.meta.get("checks", ())) if entry else ()


def _ask(name: str, image: Image, evaluation: ImageEvaluation, tools: Tools) -> None:
    """Start the image, check it, and ask every question without a cached answer."""
    config, engine, smoke = evaluation.config, evaluation.engine, Smoke()
    spec, seconds = started_by(config, engine), start_seconds(evaluation.artifact.tree.size)
    promise = Promise(
        served=Served(name=config.served_name, chat=evaluation.chat),
        health_path=config.health_path,
        max_model_len=config.plan.max_model_len,
        max_num_seqs=config.plan.max_num_seqs,
        start_seconds=seconds,
        calls="tool-call-parser" in config.plan.settings
        or (engine.reads_calls and evaluation.tools),
        thinks="reasoning-parser" in config.plan.settings,
        sees=takes_pictures(evaluation.artifact),
        parts=evaluation.parts,
        task=evaluation.model.task,
        width=width_of(evaluation.model),
    )
    own = has_own_engine(image.labels)
    if engine.lets_requests_end(config.plan) or own:
        promise = replace(promise, grace_seconds=GRACE_SECONDS)
    named = {"tool-call-parser", "reasoning-parser"} & set(config.plan.settings)
    if own and engine.test_arguments and named:
        spec, model = replace(spec, arguments=engine.test_arguments), evaluation.model
        if "tool-call-parser" in named:
            promise = replace(promise, fitting=fitting(model, engine.name))
        if "reasoning-parser" in named:
            marked = fitting_thoughts(model, engine.name)
            promise = replace(promise, fitting_thoughts=marked)
    with start(
        name, spec, tools, health_path=config.health_path, seconds=seconds, smoke=smoke
    ) as session:
        pools = promise.task.kind != "generate"
        (check_pooling if pools else check_serving)(smoke, session, promise)
        # A question of the replay set is usually one of a suite, too.
        session.share((one.path, one.request) for one in evaluation.replay)
        if (speed := _speed(evaluation, session, tools)) and evaluation.candidacy:
            _require_speed(speed, evaluation.candidacy)
        counters = engine.draft_counters if evaluation.drafts else ()
        before = drafted(session, counters) if counters else None
        for question in evaluation.questions:
            _answers(evaluation, question, session, tools)
        if counters:
            smoke.check("drafts", session, lambda: acceptance(before, drafted(session, counters)))
        elif evaluation.drafts and engine.draft_length:
            smoke.check("drafts", session, lambda: last_length(session, engine.draft_length))
        _replay(evaluation, session, tools)
        check_life(smoke, session.endpoint, promise, POOLING if pools else None)
    InStore(tools.store).files(
        partial(_smoke_inputs, image.digest), lambda _: {"checks": smoke.checks}
    )


def _answers(
    evaluation: ImageEvaluation,
    question: TaskInProgress,
    session: ServerSession | None,
    tools: Tools,
) -> Answers:
    """Return the cached answers to a task, or ask the image and cache them.

    An earlier image with the same weights and engine gives the same answers. Raises CheckFailed if
    answers run on: at least half as many must end as the reference's do, because other weights may
    give longer answers.
    """

    def ask(_: Path) -> Answers:
        if session is None:
            raise AssertionError("the image was not queried")
        asked = partial(
            ask_server,
            session.adding(question.fields),
            Served(name=question.model or evaluation.config.served_name, chat=evaluation.chat),
            progress=tools.progress,
            model=evaluation.model.task,
        )
        if evaluation.candidacy:
            answers = _in_sequence(evaluation, question, asked, tools)
        else:
            answers = asked(question.result.task.task)
        ends = sum(answer.get("finish_reason") in _ENDS for answer in answers)
        if 2 * ends < (expected := question.result.ends):
            raise CheckFailed(
                f"only {ends} of {len(answers)} answers end before the length limit; the reference"
                f" has {expected}{session.log()}",
                hint="the end token may be lost: compare eos_token_id in generation_config.json"
                " and the chat template with the adapter's",
            )
        return answers

    inputs = partial(evaluation.inputs, question)
    return tuple(InStore(tools.store).document(inputs, _ANSWERS, ask).value)


def _in_sequence(
    evaluation: ImageEvaluation,
    question: TaskInProgress,
    asked: Callable[..., Answers],
    tools: Tools,
) -> Answers:
    """Return a candidate's answers; keep the drops of one that is left before its last question."""
    level = evaluation.candidacy.level if evaluation.candidacy else 0.0

    def ask(task: Task, watch: Watch | None) -> Answers:
        return asked(task, watch=watch)

    try:
        return ask_in_sequence(question.result, level, ask, tools.command)
    except Unprovable as left:
        drops = left.details["drops"]
        key = partial(evaluation.left_inputs, question)
        InStore(tools.store).document(key, _DROPS, lambda _: list(drops))
        speed = _speed(evaluation, None, tools)
        raise unprovable(question.result, level, drops, speed) from None


def _require_hope(evaluation: ImageEvaluation, candidacy: Candidacy, tools: Tools) -> None:
    """Raise Unprovable for a candidate that an earlier build left before its last question."""
    store = InStore(tools.store)
    for question in evaluation.questions:
        key = partial(evaluation.left_inputs, question)
        if store.find(key):
            drops = store.document(key, _DROPS, lambda _: []).value
            speed = _speed(evaluation, None, tools)
            raise unprovable(question.result, candidacy.level, drops, speed)


def _replay(
    evaluation: ImageEvaluation, session: ServerSession | None, tools: Tools
) -> ReplaySet | None:
    """Return the set of the image's own answers, stored or asked now; None if it gives none."""

    def ask(_: Path) -> Mapping[str, JsonValue]:
        if session is None:
            raise AssertionError("the image was not queried")
        if evaluation.earlier and _holds(evaluation.earlier, session, tools):
            return evaluation.earlier.to_json()
        asked = [(one.path, one.request) for one in evaluation.replay]
        name, progress = evaluation.config.served_name, tools.progress
        told = [one.reference for one in evaluation.replay]
        made = record(session, asked, name, evaluation.tolerance, progress, told)
        return made.to_json() if made else {}

    if not evaluation.replay:
        return None
    found = InStore(tools.store).document(evaluation.replay_inputs, _REPLAY, ask).value
    if not found:
        tools.progress.note(
            "the image has no replay set: the server lists no log-probabilities, or the model is"
            " sure of no token"
        )
        return None
    return read_replay(canonical(found), "the stored replay set")


def _holds(earlier: ReplaySet, session: ServerSession, tools: Tools) -> bool:
    """Return whether an earlier image's answers are given here too, so that its set is kept.

    So the image has one digest on machines whose last bits differ.
    """
    return replay(session, earlier, tools.progress).verdict == "proven"


@dataclass(frozen=True, eq=False, kw_only=True)
class EvaluateStep(UnforeseenStep[Trial]):
    """Starts the image for this machine and asks it the recipe's questions."""

    name = "evaluate"
    proves = True
    asks = True

    image: Step[tuple[ImageMaterials, ...], Mapping[str, str]]
    expected: Step[tuple[Result, ...], None]
    validation: Step[Validation | None, None]
    replay: tuple[Item, ...]
    """The recipe's own questions of a replay set; () for some of its suites'."""
    earlier: ReplaySet | None = None
    """Of an image that was made of this recipe before."""
    candidacy: Candidacy | None = None
    """If `auto` tries it."""

    def run(self, have: Results, tools: Tools) -> StageResult[Trial]:
        """Start the image, check it and score its answers, unless all results are cached.

        If the image cannot be started on this machine, warns and returns the results unchanged.
        Raises CheckFailed, with the server's last lines, if the image does not start, does not
        answer, or does not meet its plan.
        """
        made = have[self.image]
        image = host_image(index_of_materials(made))
        evaluation = self._evaluation(made[0].inputs, have[self.expected], have[self.validation])
        questions, store = evaluation.questions, InStore(tools.store)
        if self.candidacy:
            _require_size(made[0].inputs.artifact, self.candidacy)
            evaluation = replace(evaluation, machine=self._machine(tools))
            if speed := _speed(evaluation, None, tools):
                _require_speed(speed, self.candidacy)
            _require_hope(evaluation, self.candidacy, tools)
        count = sum(len(question.result.task.task.items) for question in questions)
        timer = Timer(self.name, f"{count} questions to the started image", tools)
        if not evaluation.chat and evaluation.model.task.kind == "generate":
            tools.progress.warn(
                "the model has no chat template: the image is asked plain prompts at"
                " /v1/completions, as its users should do"
            )
        if missing := what_is_missing(image, tools):
            sees = takes_pictures(evaluation.artifact)
            pictures = "; no picture was tried either" if sees else ""
            tools.progress.warn(why_not_started(image, tools) + pictures)
            unasked = tuple(replace(question.result, not_started=missing) for question in questions)
            trial = Trial(
                results=unasked, requests=evaluation.replay, tolerance=evaluation.tolerance
            )
            return timer.done(trial, cached=False)
        needed = [partial(evaluation.inputs, question) for question in questions]
        needed += [partial(evaluation.replay_inputs)] if evaluation.replay else []
        if self.candidacy and self.candidacy.measured:
            needed.append(partial(evaluation.speed_inputs))
        cached = all(map(store.find, (partial(_smoke_inputs, image.digest), *needed)))
        if not cached:
            with candidate(image, self.of.candidate_layout, tools) as name:
                _ask(name, image, evaluation, tools)
        for check in checks_of(image.digest, tools):
            if check["name"] == PICTURE and str(check["seen"]).startswith(REFUSED):
                what = f"the model reads pictures, the image does not: {check['seen']}"
                tools.progress.warn(what)
        answers = [_answers(evaluation, question, None, tools) for question in questions]
        results = [question.result for question in questions]
        similarity = evaluation.model.task.sentence.similarity
        scores = [
            score_task(one.task.task, said, tools.command, similarity=similarity)
            for one, said in zip(results, answers, strict=True)
        ]
        for one, score in zip(results, scores, strict=True):
            for fault in foreign_faults(score):
                tools.progress.warn(named(one.task, f"the image: {fault}"))
        trial = Trial(
            results=scored(results, "image", scores),
            started=image.platform,
            replay=_replay(evaluation, None, tools),
            speed=_speed(evaluation, None, tools),
        )
        return timer.done(trial, cached=cached)

    def judge(self, have: Results) -> None:
        """Raise CheckFailed if `auto` tries the image and a suite is not proven."""
        if self.candidacy and have[self].started:
            require_proven(have[self].results, self.candidacy.level)

    def _machine(self, tools: Tools) -> tuple[str, int]:
        layout = self.of.candidate_layout
        found = tools.launcher.devices("" if layout is None else f"oci:{layout}")
        return (found.cpu, found.cpus) if found else ("", 0)

    def _evaluation(
        self, inputs: ImageInputs, results: Sequence[Result], validation: Validation | None
    ) -> ImageEvaluation:
        if inputs.config is None or inputs.sources is None or inputs.checkpoint is None:
            raise AssertionError("an image built from a recipe has a serving configuration")
        target, sources, questions = self.of.target, inputs.sources, []
        for result in results:
            model, fields = "", dict[str, JsonValue]()
            if (number := result.task.adapter) is not None:
                model, fields = how_asked(self.file, target, sources, number)
            questions.append(TaskInProgress(result=result, model=model, fields=fields))
        template = chat_template(target, sources, inputs.checkpoint)
        chat, name = template is not None, inputs.config.served_name
        facts = read_facts(served_checkpoint(target, sources, inputs.checkpoint).texts)
        by_result = {id(one.result): one for one in questions}

        def how(result: Result) -> tuple[Served, Mapping[str, JsonValue]]:
            one = by_result[id(result)]
            return Served(name=one.model or name, chat=chat), one.fields

        served, settings = Served(name=name, chat=chat), self.file.recipe.replay
        asked = replay_requests(results, settings, self.replay, served, how, facts.task)
        requests = [(one.path, dict(one.request)) for one in asked]
        earlier = self.earlier
        if earlier and [(one.path, dict(one.request)) for one in earlier.questions] != requests:
            earlier = None
        limits = validation.comparison.limits if validation and validation.comparison else None
        return ImageEvaluation(
            drafts=self.file.recipe.serve.speculative is not None,
            artifact=inputs.artifact,
            config=inputs.config,
            base=host_image(index_of(inputs.bases)).digest,
            engine=target.engine,
            chat=chat,
            parts=template is None or takes_parts(template),
            tools=template is not None and has_tools(template),
            model=facts,
            questions=tuple(questions),
            replay=asked,
            earlier=earlier,
            candidacy=self.candidacy,
            tolerance=tolerance_of(limits.max_abs if limits else None),
        )
