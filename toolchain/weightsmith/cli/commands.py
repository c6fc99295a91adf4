"""The commands: each calls what `api` has, and says it as JSON and in words.

What they call is imported when they are called: the list of commands must appear at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from weightsmith.api.commands.requests import (
    AffectedCommand,
    BakeCommand,
    BenchCommand,
    BuildCommand,
    CacheCommand,
    EvaluateCommand,
    FleetCommand,
    InspectCommand,
    MergeCommand,
    PlanCommand,
    ProveCommand,
    PushCommand,
    QuantizeCommand,
    RebaseCommand,
    RenderCommand,
    Said,
    ValidateCommand,
    VerifyCommand,
)
from weightsmith.cli.command import command
from weightsmith.core.escape import escaped, joined, pinned
from weightsmith.core.values import Writable, plain

if TYPE_CHECKING:
    from weightsmith.building.record import BuiltTarget
    from weightsmith.core.ports import Progress
    from weightsmith.steps.tools import Tools
    from weightsmith.validating.result import Validation


def _progress() -> Progress:
    from weightsmith.building.progress import progress_for

    return progress_for()


@contextmanager
def _tools_for(asked: object, *images: str) -> Iterator[Tools]:
    from weightsmith.building.wiring import open_for

    with open_for(asked, _progress(), *images) as tools:
        yield tools


@command(BuildCommand)
def build(asked: BuildCommand) -> Said:
    """Build, check and publish the images of a recipe (or of --base and --adapter)."""
    from weightsmith.api.images import run_build

    made = run_build(asked, _progress())
    lines = [line for built in made for line in _lines(built)]
    return {"targets": {built.name: _facts(built) for built in made}}, joined(lines)


_OF_A_FORM = ("reference", "digest", "uploaded_bytes", "mounted")


def _facts(built: BuiltTarget) -> Mapping[str, Writable]:
    from weightsmith.evaluating.results import verdicts_of

    chosen = {"target": built.target.name, "auto": built.auto.to_json()} if built.auto else {}
    return {
        **chosen,
        "image": built.published.reference,
        "digest": built.published.digest,
        "verdict": built.verdict,
        "unproven": built.unproven,
        "scores": {name: score.score for name, score in built.scores.items()},
        "sameness": built.sameness,
        "suites": [
            {
                "name": one.task.task.name,
                "verdict": verdict,
                "scores": {who: score.score for who, score in one.scores.items()},
            }
            for one, verdict in zip(built.results, verdicts_of(built.results), strict=True)
        ],
        "verdicts": [v.facts for result in built.results for v in result.verdicts],
        "bench": built.bench.to_json() if built.bench else None,
        "forms": {
            kind: {key: getattr(form, key) for key in _OF_A_FORM}
            for kind, form in built.forms.items()
        },
        "platforms": {
            platform: {"digest": digest, "started": platform == built.started}
            for platform, digest in built.published.platforms.items()
        },
        "uploaded_bytes": built.published.uploaded_bytes,
        "stages": built.stages,
        "report": built.report,
    }


def _lines(built: BuiltTarget) -> Iterator[str]:
    from weightsmith.evaluating.results import verdicts_of

    image = built.published
    yield f"{built.target.name}: {image.reference}@{image.digest}"
    for platform, digest in image.platforms.items() if len(image.platforms) > 1 else ():
        tested = "started and tested" if platform == built.started else "not started"
        yield f"  {platform}: {digest}, {tested}"
    for kind, form in built.forms.items():
        yield f"  {kind}: {form.reference}@{form.digest}"
    for one, verdict in zip(built.results, verdicts_of(built.results), strict=True):
        scores = ", ".join(f"{who} {found.score:.3f}" for who, found in one.scores.items())
        several = len(built.results) > 1
        yield f"  {one.task.task.name}: {scores}: {verdict}" if several else f"  scores: {scores}"
    if same := ", ".join(f"{who} {share:.3f}" for who, share in built.sameness.items()):
        yield f"  answers equal to the reference's: {same}"
    yield from (f"  NOT PROVEN: {reason}" for reason in built.unproven)
    for row in built.auto.candidates if built.auto else ():
        if row.seconds:
            said = f"left: {row.left}" if row.left else "chosen"
            yield f"  {row.name}{f', {row.fast}' if row.speed else ''}: {said}"
    yield f"  report: {built.report}"


@command(PlanCommand)
def plan(asked: PlanCommand) -> Said:
    """Show what `build` would do: stages, which are cached or why not, memory, disk, time."""
    from weightsmith.api.commands.plan import table
    from weightsmith.api.images import run_plan

    result = run_plan(asked)
    return result, table(result)


@command(FleetCommand)
def fleet(asked: FleetCommand) -> Said:
    """Build every adapter of a fleet file for every target, sharing what several builds need."""
    from weightsmith.api.fleets import ordered_of, plan_fleet, run_fleet
    from weightsmith.fleets.graph import text_of
    from weightsmith.fleets.matrix import matrix_of
    from weightsmith.fleets.page import PAGE, table, watcher

    found = ordered_of(asked)
    if asked.print_:
        return matrix_of(found.builds, asked.print_, str(asked.file))
    if asked.plan:
        planned = plan_fleet(asked, found)
        return planned, text_of(planned)
    rows = run_fleet(asked, found, _progress(), watcher(live=asked.watch))
    if error := rows.error():
        raise error
    return rows.to_json(), f"{table(rows)}\npage: {asked.dist.absolute() / PAGE}"


@command(MergeCommand)
def merge(asked: MergeCommand) -> Said:
    """Merge adapters into a base and write a plain Hugging Face checkpoint to --out.

    Without --adapter, it is the base itself.
    """
    from weightsmith.api.commands.merge import merge_folders

    with _tools_for(asked) as tools:
        result = merge_folders(asked, tools)
    counts = ", ".join(f"{count} {what}" for what, count in result["tensors"].items())
    return result, escaped(f"{result['out']}: {counts} tensors, {result['seconds']:.1f} s")


@command(ValidateCommand)
def validate(asked: ValidateCommand) -> Said:
    """Compare a merged checkpoint with its base and adapters: files, every element, logits."""
    from weightsmith.api.commands.merge import validate_folders

    with _tools_for(asked) as tools:
        result = validate_folders(asked, tools)
    return result.to_json(), _verdict(asked.merged, result)


def _verdict(merged: Path, result: Validation) -> str:
    lines = [f"{merged} matches base and adapters"]
    if compared := result.comparison:
        if compared.elements:
            lines.append(
                f"  {compared.elements.elements} elements of {compared.elements.tensors} tensors "
                "are right"
            )
        lines.append(
            f"  logits of {compared.positions} positions: largest difference "
            f"{result.max_abs_logit_diff:.3g}, mean divergence {result.kl_mean:.3g}, "
            f"same first choice {result.top1_agreement:.1%}"
        )
        if texts := compared.greedy:
            same, tokens = sum(text.same for text in texts), sum(text.tokens for text in texts)
            lines.append(f"  {same} of {tokens} tokens of greedy text are those of base + adapters")
    lines += [f"  {found.severity}: {found.message}" for found in result.findings]
    return joined(lines)


@command(QuantizeCommand)
def quantize(asked: QuantizeCommand) -> Said:
    """Quantize a checkpoint to --format, read the result back and measure what was lost."""
    from weightsmith.api.commands.quantize import quantize_folder

    with _tools_for(asked) as tools:
        result = quantize_folder(asked, tools)
    measures = ", ".join(
        f"{key} {result['quality'][key]:.4g}"
        for key in ("kl_mean", "top1", "perplexity_ratio")
        if key in result["quality"]
    )
    text = f"{result['out']}: {result['format']}, {result['bits_per_weight']:.2f} bits"
    return result, escaped(f"{text}; {measures}" if measures else text)


@command(RenderCommand)
def render(asked: RenderCommand) -> Said:
    """Plan a target's memory and render its serving configuration and manifests into --out."""
    from weightsmith.api.commands.render import render_folder
    from weightsmith.building.wiring import keep_places_clean
    from weightsmith.serving.plan import summary

    keep_places_clean(asked)
    files, plan = render_folder(asked)
    result = {"files": files, "plan": plan.to_json()}
    return result, f"{joined([*files, ''])}\n{summary(asked.target, plan)}"


@command(BakeCommand)
def bake(asked: BakeCommand) -> Said:
    """Assemble the image of a model, and push it, load it or write it as an OCI layout."""
    from weightsmith.api.commands.bake import bake_model

    with _tools_for(asked, asked.image.base) as tools:
        made = bake_model(asked, tools)
    return plain(made), pinned(made.reference, made.digest)


@command(PushCommand)
def push(asked: PushCommand) -> Said:
    """Copy an image to a registry, its digest stays the same; or a model to a hub, with a card."""
    from weightsmith.api.images import run_push

    return run_push(asked, _progress())


@command(RebaseCommand)
def rebase(asked: RebaseCommand) -> Said:
    """Move an image to another engine base and push it; its weights are not copied."""
    from weightsmith.api.commands.rebase import rebase_image

    with _tools_for(asked) as tools:
        made, before = rebase_image(asked, tools)
    return {**plain(made), "rebased_from": before}, pinned(made.reference, made.digest)


@command(InspectCommand)
def inspect(asked: InspectCommand) -> Said:
    """Show what an image contains, using only the image: provenance, plan, scores, layers."""
    from weightsmith.api.commands.images import inspect_text
    from weightsmith.api.images import run_inspect

    result = run_inspect(asked)
    return result, inspect_text(result)


@command(VerifyCommand)
def verify(asked: VerifyCommand) -> Said:
    """Check an image's signature, its layers' digests, and the chain from sources to layers."""
    from weightsmith.api.commands.verify import facts_of, table
    from weightsmith.api.images import run_verify

    found = run_verify(asked, _progress())
    text = f"{pinned(found.image, found.digest)} holds\n{table(found.checks)}"
    return facts_of(found.image, found.digest, found.checks), text


@command(AffectedCommand)
def affected(asked: AffectedCommand) -> Said:
    """List what was made from an adapter, a base, an engine, a builder, a run or a package."""
    from weightsmith.api.commands.affected import affected_text, error_of
    from weightsmith.api.images import run_affected

    found = run_affected(asked, _progress())
    if error := error_of(found):
        raise error
    return found.to_json(), affected_text(found)


@command(EvaluateCommand)
def evaluate(asked: EvaluateCommand) -> Said:
    """Score a started image, a server, or a checkpoint with or without adapter on --data."""
    from weightsmith.api.commands import evaluate as run

    with _tools_for(asked) as tools:
        if asked.tasks:
            return run.evaluate_tasks(asked, tools)
        found = run.evaluate_subject(asked, tools)
    return run.evaluation_facts(found), run.evaluate_text(found)


@command(BenchCommand)
def bench(asked: BenchCommand) -> Said:
    """Measure throughput and latencies of a started image or a server in a short load test."""
    from weightsmith.api.commands.bench import bench as measure

    with _tools_for(asked) as tools:
        return measure(asked, tools)


@command(ProveCommand)
def prove(asked: ProveCommand) -> Said:
    """Ask a started image or a server the replay set: does it answer here as it was tested."""
    from weightsmith.api.commands.prove import prove_image

    run = replace(asked.run, sign_key=asked.key)
    with _tools_for(replace(asked, run=run)) as tools:
        return prove_image(asked, tools)


def report_words(words: Sequence[str]) -> tuple[str, ...]:
    """Return the positional arguments of `report` that a command line has words for.

    Invoke knows only positional arguments that must be given, and `report [DIR] --compare A B`
    has none to two: DIR, and B.
    """
    words = list(words)
    if "report" not in words:
        return ()
    bare, values = 0, {"--compare", "--out"}
    rest = words[words.index("report") + 1 :]
    for before, word in zip(["", *rest], rest, strict=False):
        bare += not word.startswith("-") and before not in values
    return ("folder", "other")[: min(bare, 2)]


@command(
    positional=report_words(sys.argv),
    meanings={
        "folder": "folder with build.json in it or in a subfolder; default: dist",
        "other": "folder of the second of two builds to compare",
        "compare": "two build folders to compare: the first here, the second after it",
        "out": "folder for the comparison",
    },
)
def report(
    *, folder: str | None = None, other: str | None = None, compare: str = "", out: str = ""
) -> Said:
    """Write the report of the builds in a folder (dist), or of two builds with --compare A B."""
    from weightsmith.api.commands.report import compare_builds, report_builds

    if compare:
        # With one word it is B; with two, DIR and B.
        place = Path(out) if out else Path(folder) if other and folder else None
        paths = compare_builds(compare, other or folder or "", place)
        return paths, str(paths["html"])
    reports = report_builds(Path(folder or "dist"))
    return {**reports[0], "reports": reports}, joined(str(written["html"]) for written in reports)


@command()
def targets() -> Said:
    """List all targets: the engines, and the formats that each can load."""
    from weightsmith.building.targets import all_targets
    from weightsmith.quantizers import legacy_of

    found, facts, lines = all_targets(), dict[str, Writable](), list[str]()
    width = max(map(len, found), default=0)
    for name, target in found.items():
        engine, format_, bits = target.engine, target.format.name, target.format.bits_per_weight
        legacy = "; ".join(filter(None, (engine.legacy, legacy_of(target.format))))
        facts[name] = {
            "engine": engine.name,
            "format": format_,
            "bits_per_weight": bits,
            "legacy": legacy,
        }
        said = f"{engine.name} with {format_} weights, about {bits:g} bits each"
        said += ", archived upstream" if legacy else ""
        lines.append(f"{name:<{width}}  {said}")
    return {"targets": facts}, joined(lines)


@command()
def doctor() -> Said:
    """Show what this machine provides, what is missing, and what to do about it."""
    from weightsmith.building.wiring import examine

    found = examine()
    lines = []
    for name, check in found.checks.items():
        lines.append(f"{'ok  ' if check.ok else 'no  '}{name:<12} {check.found}")
        lines += [f"{'':<17}{line}" for line in check.todo.splitlines()]
    return plain(found), joined(lines)


@command(meanings={"keep": "maximum size of the store afterwards, such as 20GiB"})
def clean(*, keep: str = "", json: bool = False) -> Said:
    """Shrink the store to --keep (default: 0), least recently used results first."""
    from weightsmith.building.wiring import make_store
    from weightsmith.serving.memory import human, parse_size

    store = make_store()
    asks = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
    if not keep and not json and asks:
        where = escaped(str(store.root))
        sys.stderr.write(f"Delete all results in {where} that are not in use? [y/N] ")
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
            return {}, "nothing deleted; `--keep 20GiB` would keep the latest"
    result = store.clean(parse_size(keep or "0"))
    freed = int(result["bytes_before"]) - int(result["bytes_after"])
    return result, (
        f"deleted {result['deleted']} result(s), {human(freed)};"
        f" kept {human(int(result['bytes_after']))}"
        + (f"; {result['in_use']} in use by a running build" if result["in_use"] else "")
    )


@command(CacheCommand)
def cache(asked: CacheCommand) -> Said:
    """Fill the shared cache (push), fetch it (pull), shrink it (prune) or describe it (stat)."""
    from weightsmith.api.commands.cache import run_cache

    return run_cache(asked, _progress())


COMMANDS = (
    build, plan, fleet, merge, validate, quantize, render, bake, push, rebase, inspect, verify,
    affected, evaluate, bench, prove, report, targets, doctor, clean, cache,
)  # fmt: skip
