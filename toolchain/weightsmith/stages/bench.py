"""Image -> its speed: start the image that passed once more, and put a load on it.

Nothing of it is kept for the next build: a time depends on what else the machine did, so what
another day or another machine measured shows nothing of this one. It is in no label either: labels
are part of the digest, and that must not depend on a clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

from weightsmith.core.devices import Devices
from weightsmith.core.errors import CheckFailed, InputRefused, UsageError
from weightsmith.evaluating.acceptance import Drafted, drafted
from weightsmith.evaluating.bench_files import ResultsFile
from weightsmith.evaluating.build_record import read_build
from weightsmith.evaluating.client import Served
from weightsmith.evaluating.drafting import QUESTIONS, draft_speed, question_speeds
from weightsmith.evaluating.session import ServerSession
from weightsmith.evaluating.speed import (
    EXCEEDED,
    Round,
    Speed,
    SpeedFigure,
    SpeedTest,
    estimates,
    is_here,
    judged,
    machine_of,
    session_limits,
)
from weightsmith.oci.image import host_image
from weightsmith.provenance.attest import ImageMaterials, index_of_materials
from weightsmith.recipe.schema import Bench
from weightsmith.serving.devices import is_cpu
from weightsmith.serving.plan import ServingConfig, ServingPlan
from weightsmith.steps.launch import start, start_seconds, started_by
from weightsmith.steps.outputs import candidate
from weightsmith.steps.served_adapters import chat_template, how_asked
from weightsmith.steps.stage_result import StageResult, Timer
from weightsmith.steps.step import Foreseen, Foresight, Results, State, Step, TargetStep, Trial
from weightsmith.steps.tools import Tools

Images = tuple[ImageMaterials, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Compared:
    """How fast a server answered the build's questions."""

    speeds: tuple[float, ...]
    questions: int
    steps: Drafted | None
    """What it counted meanwhile; None if it counts no drafts."""


@dataclass(frozen=True, eq=False, kw_only=True)
class BenchStep(TargetStep[Speed, None]):
    """Measures the image that passed, and takes what other tools measured of it."""

    name = "bench"
    proves = True
    before_publishing = True

    config: Step[ServingConfig, ServingPlan]
    image: Step[Images, Mapping[str, str]]
    labelled: Step[Images, None]
    """The same with its scores: what is published, and so what results are bound to."""
    trial: Step[Trial, None]
    results: tuple[ResultsFile, ...] = ()

    def foresee(self, seen: Foresight) -> Foreseen[None]:
        """Return its row, which says whether this machine can refuse anything.

        Raises UsageError for requests that are longer than the server takes.
        """
        bench, plan = self.file.recipe.bench, seen[self.config]
        if bench is None:
            why = "results files are taken, nothing is measured"
            return Foreseen(value=None, rows=(self.row(State(cached=False, why=why)),))
        if (tokens := bench.prompt_tokens + bench.output_tokens) > plan.max_model_len:
            raise UsageError(
                f"bench: prompt_tokens and output_tokens are {tokens} together, and a request of"
                f" {self.target} has at most {plan.max_model_len}",
                hint="make them smaller, or raise serve.max_model_len",
            )
        on_cpu, devices = is_cpu(plan.device), self._devices(seen.tools)
        why = "measured in each build"
        if bench.concurrency > plan.max_num_seqs:
            why += f"; the server answers {plan.max_num_seqs} at once, so the others wait"
        if self._compares:
            why += ", and once more without drafts"
        if bench.limits and not is_here(bench, devices, on_cpu=on_cpu):
            machine = machine_of(devices, on_cpu=on_cpu) or "an unknown device"
            what = f"the limits are for {bench.device}" if bench.device else "no device is named"
            why += f"; {what}, and this is {machine}: nothing is refused"
        return Foreseen(value=None, rows=(self.row(State(cached=False, why=why)),))

    def run(self, have: Results, tools: Tools) -> StageResult[Speed]:
        """Return the image's figures with their verdicts; say them where nothing is refused.

        Raises CheckFailed if the image cannot be started again, InputRefused for a results file
        that an earlier build took as another image's.
        """
        bench, config = self.file.recipe.bench, have[self.config]
        on_cpu, devices = is_cpu(config.plan.device), self._devices(tools)
        count = f"{bench.concurrency} requests at once" if bench else "results files"
        timer = Timer(self.name, count, tools)
        speed = Speed(
            image=host_image(index_of_materials(have[self.labelled])).digest,
            device=bench.device if bench else "",
            here=bool(bench and is_here(bench, devices, on_cpu=on_cpu)),
            machine=machine_of(devices, on_cpu=on_cpu),
            cpus=devices.cpus if devices else 0,
        )
        speed = replace(speed, evidence=tuple(one.evidence(bench) for one in self.results))
        self._check_bound(speed, str(index_of_materials(have[self.labelled]).digest), tools)
        if bench and not have[self.trial].started:
            speed = replace(speed, skipped="the image was not started")
        elif bench:
            speed = self._measured(bench, speed, have, tools)
        _say(speed, tools)
        return timer.done(speed, cached=False)

    def judge(self, have: Results) -> None:
        """Raise CheckFailed for an image that is too slow on the recipe's own device."""
        speed = have[self]
        if speed.exceeded:
            raise CheckFailed(
                f"the image is too slow on {speed.machine}: {'; '.join(speed.exceeded)}",
                hint="end what else runs here and build again (only this step is repeated), choose"
                " a smaller format or other `serve` options, or change the limits in `bench`",
            )

    def _devices(self, tools: Tools) -> Devices | None:
        layout = self.of.candidate_layout
        return tools.launcher.devices("" if layout is None else f"oci:{layout}")

    def _measured(self, bench: Bench, speed: Speed, have: Results, tools: Tools) -> Speed:
        """Return the figures; those beyond a limit are measured again before they are believed."""
        ask = partial(self._asked, bench, have, tools)
        with self._started(bench, have, tools) as (session, served):
            test = SpeedTest(session, served, bench, tools.progress)
            rounds = test.rounds()
            figures = self._judged(rounds, bench, speed)
            if any(one.verdict == EXCEEDED for one in figures):
                rounds += test.rounds(apart=True)
                figures = self._judged(rounds, bench, speed, others=test.others)
            with_drafts = ask(session, served) if self._compares else None
        if with_drafts:
            with self._started(bench, have, tools, drafts=False) as (session, served):
                without = ask(session, served)
            if without:
                count, steps = with_drafts.questions, with_drafts.steps
                found = draft_speed(with_drafts.speeds, without.speeds, count, steps)
                speed = replace(speed, drafts=found)
        samples = [sample for one in rounds for sample in one.samples]
        return replace(
            speed,
            concurrency=bench.concurrency,
            prompt_tokens=test.prompt_tokens,
            output_tokens=bench.output_tokens,
            rounds=len(rounds),
            requests=len(samples),
            errors=sum(bool(sample.error) for sample in samples),
            failures=tuple(sorted({sample.error[:200] for sample in samples if sample.error})[:5]),
            figures=figures,
        )

    def _judged(
        self, rounds: Sequence[Round], bench: Bench, speed: Speed, others: float = 0.0
    ) -> tuple[SpeedFigure, ...]:
        found = estimates(rounds, bench)
        return judged(found, bench, here=speed.here, machine=speed.machine, others=others)

    @property
    def _compares(self) -> bool:
        """Whether the image drafts tokens, and can be started without."""
        wanted = self.file.recipe.serve.speculative is not None
        return wanted and any(self.of.target.engine.undrafted)

    def _asked(
        self, bench: Bench, have: Results, tools: Tools, session: ServerSession, served: Served
    ) -> _Compared | None:
        """Ask a few of the build's questions several times; None if that cannot be done."""
        results, names = have[self.trial].results, self.of.target.engine.draft_counters
        questions = results[0].task.task.items[:QUESTIONS] if results else ()
        if not questions:
            tools.progress.warn("bench: the recipe has no questions to compare drafts with")
            return None
        before = drafted(session, names)
        most, at_once = bench.output_tokens, bench.concurrency
        speeds = question_speeds(session, served, questions, at_once, most, tools.progress)
        after = drafted(session, names)
        if not speeds:
            return None
        return _Compared(
            speeds=speeds,
            questions=len(questions),
            steps=after.since(before) if before and after else None,
        )

    @contextmanager
    def _started(
        self, bench: Bench, have: Results, tools: Tools, *, drafts: bool = True
    ) -> Iterator[tuple[ServerSession, Served]]:
        """Start the image, and yield a session and how it is asked.

        Of several adapters that it serves unmerged, the first answers, since the base alone would
        be faster.
        """
        made, config, target = have[self.image], have[self.config], self.of.target
        inputs = made[0].inputs
        if inputs.sources is None or inputs.checkpoint is None:
            raise AssertionError("an image built from a recipe has sources")
        name, fields = how_asked(self.file, target, inputs.sources, 0)
        chat = chat_template(target, inputs.sources, inputs.checkpoint) is not None
        image = host_image(index_of_materials(made))
        spec = started_by(config, target.engine)
        if not drafts:
            env, arguments = target.engine.undrafted
            spec = replace(spec, env={**spec.env, **env}, arguments=arguments)
        with (
            candidate(image, self.of.candidate_layout, tools) as reference,
            start(
                reference,
                spec,
                tools,
                health_path=config.health_path,
                seconds=start_seconds(inputs.artifact.tree.size),
                limits=session_limits(bench),
            ) as session,
        ):
            served = Served(name=name or config.served_name, chat=chat)
            yield session.adding(fields), served

    def _check_bound(self, speed: Speed, whole: str, tools: Tools) -> None:
        """Raise InputRefused for a results file that is another image's, by its name or a record.

        `whole` is the digest of all platforms. Warns of a file that names no image.
        """
        for one in speed.evidence:
            if not one.image:
                tools.progress.warn(
                    f"--bench-results {one.file}: nothing shows which image it is about; put the"
                    f" digest into its name, as NAME@{speed.image.replace(':', '-')}.json"
                )
            elif one.image not in (speed.image, whole):
                raise InputRefused(
                    f"--bench-results {one.file}: its name says {one.image}, and this build makes"
                    f" {speed.image}",
                    hint="measure this image, and name the file by its digest",
                )
        with suppress(OSError, ValueError):
            if (earlier := read_build(self.of.folder).bench) and earlier.image != speed.image:
                known = {one.sha256 for one in earlier.evidence}
                for one in speed.evidence:
                    if one.sha256 in known:
                        raise InputRefused(
                            f"--bench-results {one.file}: it was measured on the image"
                            f" {earlier.image}, and this build makes {speed.image}",
                            hint="build without it, measure the new image, and build again with"
                            " those results",
                        )


def _say(speed: Speed, tools: Tools) -> None:
    """Show every figure, and warn of what was not measured or exceeds a limit in a file."""
    if speed.skipped:
        tools.progress.warn(f"bench: nothing was measured: {speed.skipped}")
    for one in speed.figures:
        tools.progress.note(f"{one.verdict}: {one.reason}" if one.verdict else one.reason)
    if speed.drafts:
        tools.progress.note(speed.drafts.reason)
    if speed.errors:
        reasons = "; ".join(speed.failures)
        tools.progress.warn(f"bench: {speed.errors} of {speed.requests} requests failed: {reasons}")
    for file in speed.evidence:
        for one in file.figures:
            if one.verdict == EXCEEDED:
                tools.progress.warn(f"{file.file}: {one.reason}")
