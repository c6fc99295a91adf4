"""build.json -> report.html, report.md and junit.xml: outputs, inputs and quality.

Plain HTML and CSS: plots are boxes in percent, readable at 375 pixels and in print, with tables for
screen readers. One script filters the questions; its hash is in the content security policy, so
nothing in an answer can run. A plotting library is larger than the page may be, and text in SVG
shrinks with it. Every value is escaped where it is inserted; a filter on each had been forgotten on
seven.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from xml.etree import ElementTree as ET

from jinja2 import (
    Environment,
    FileSystemLoader,
    StrictUndefined,
    TemplateError,
    UndefinedError,
    select_autoescape,
)
from markupsafe import Markup

from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.escape import escaped, upright
from weightsmith.core.files import write_folder
from weightsmith.core.resources import templates
from weightsmith.core.safe_parse import RECORD, parse_file
from weightsmith.core.values import Json
from weightsmith.evaluating import views
from weightsmith.evaluating.build_record import FILE, BuildRecord, read_build
from weightsmith.evaluating.card import ModelCard
from weightsmith.evaluating.gate import compare
from weightsmith.evaluating.speed import EXCEEDED, MET
from weightsmith.serving.memory import human

_AGAIN = "build it again; cached stages are not repeated"
_BENCH = "bench.json"
_MARKDOWN = re.compile(r"[\\`*_\[\]<>|&~]|:(?=//)|(?<=\bwww)\.|^#|^[-+=](?=\s|$|[-=])")
"""Characters that are Markdown markup, anywhere or at the start of a line."""
_IN_VERDICT = ("not published: ", "published, but not proven: ")
_NUMBERED = re.compile(r"^(\d{1,9})([.)])(?=\s|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Paths of a report; `junit` is None for a comparison."""

    html: Path
    markdown: Path
    junit: Path | None = None


@contextmanager
def read_as_facts(path: Path) -> Iterator[None]:
    """Raise InputRefused for a file that is valid JSON but not a valid build.json.

    Not for facts from this process: there, the same errors are bugs and keep their traceback.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        text = f"{path} is damaged: {type(error).__name__}: {error}"[:300]
        raise InputRefused(text, hint=_AGAIN) from error
    except TemplateError as error:
        raise InputRefused(f"{path} is damaged: {error.message}", hint=_AGAIN) from error


def write_report(build: BuildRecord, folder: Path, *, anew: bool = True) -> Written:
    """Write report.html, report.md and junit.xml of a build; not `anew`, only if they are older.

    The page is self-contained: it loads no script, font or image. It includes other targets of the
    version, and a bench.json if the folder has one. Raises UsageError for missing facts and
    EnvironmentFailure if the folder cannot be written.
    """
    written = Written(
        html=folder / "report.html", markdown=folder / "report.md", junit=folder / "junit.xml"
    )
    if not anew and _is_current(written, folder):
        return written
    view = build_view(build, _siblings(folder, build), _bench_view(folder))
    texts = {
        "report.html": render_view(view, "report.html.j2"),
        "report.md": render_view(view, "report.md.j2"),
        "junit.xml": junit(build),
    }
    _write(texts, folder)
    with suppress(OSError):  # then it is only rendered again
        for name in texts:  # those whose text is the same, too
            os.utime(folder / name)
    return written


def _is_current(written: Written, folder: Path) -> bool:
    """Return whether a report is there that was written after everything that it shows."""
    version = _version_of(folder)
    others = {*_records(version), folder / _BENCH, version} - {folder / FILE}
    files = filter(None, (written.html, written.markdown, written.junit))
    try:
        oldest = min(path.stat().st_mtime_ns for path in files)
        newest = max(path.stat().st_mtime_ns for path in others if path.exists())
        record = (folder / FILE).stat().st_mtime_ns
        # A later time than now was set before the clock was put back, and says nothing.
        return record <= oldest and newest < oldest <= time.time_ns()
    except OSError:
        return False


def write_comparison(first: Path, second: Path, folder: Path) -> Written:
    """Write compare.html and compare.md of two builds' folders; raises what `read_json` raises."""
    (a, view_of_a), (b, view_of_b) = _side(first), _side(second)
    questions = views.shared_questions(a, b)
    rows = views.answer_rows(questions, {"adapter": "A", "image": "B"})
    view = {
        "sides": [{**view_of_a, "letter": "A"}, {**view_of_b, "letter": "B"}],
        "verdict": _compared(questions),
        "facts": views.fact_rows(a, b),
        "answers": rows,
        "counts": views.counts(rows),
    }
    names = ("compare.html", "compare.md")
    _write({name: render_view(view, f"{name}.j2") for name in names}, folder)
    return Written(html=folder / "compare.html", markdown=folder / "compare.md")


def build_view(
    build: BuildRecord, targets: Sequence[BuildRecord], bench: Mapping[str, object] | None
) -> dict[str, object]:
    """Return what the templates show of a build; `targets` are all targets of the version."""
    tasks = []
    for task in build.tasks:
        answers = views.answer_rows(views.asked(build.items_of(task)))
        tasks.append(
            {
                **task.to_json(),
                "rows": views.score_rows(task),
                "same": views.sameness(task),
                "floor": views.floor(task),
                "answers": answers,
                "counts": views.counts(answers),
            }
        )
    return {
        **build.to_json(),
        "verdict": views.verdict(build),
        # The verdict already shows these.
        "warnings": [w for w in build.warnings if not w.startswith(_IN_VERDICT)],
        "tasks": tasks,
        "suite_rows": views.suite_rows(build),
        "flow": views.flow(build),
        "differences": views.differences(build.validation),
        "memory": views.memory(build),
        "layers": views.layers(build.image),
        "platforms": views.platforms(build.image),
        "stages": views.stages(build),
        "targets": views.targets(targets, build.target),
        "choice": views.choice(build),
        "bench": bench,
        "speed": views.speed(build.bench),
        "title": build.title,
    }


def _bench_view(folder: Path) -> dict[str, object] | None:
    """Return a folder's load test, its runs with the throughput in percent of the fastest."""
    if not (folder / _BENCH).is_file():
        return None
    bench = read_json(folder / _BENCH)
    runs = bench.get("runs") or []
    fastest = max((run["requests_per_s"] for run in runs), default=0) or 1
    rows = [{**run, "percent": round(100 * run["requests_per_s"] / fastest, 2)} for run in runs]
    return {**bench, "rows": rows}


def _side(place: Path) -> tuple[BuildRecord, dict[str, object]]:
    """Return a build and its view."""
    folder = place.parent if place.name == FILE else place
    with read_as_facts(folder / FILE):
        build = BuildRecord.from_json(read_json(folder / FILE))
        return build, build_view(build, (), _bench_view(folder))


def _compared(questions: Sequence[views.Asked]) -> dict[str, object]:
    if not questions:
        return {
            "state": "untested",
            "headline": "Not compared by answers",
            "reasons": ["the two images were evaluated on different questions"],
        }
    found = compare(
        [one.value["image"] for one in questions], [one.value["adapter"] for one in questions]
    )
    low, high = found.interval
    graded = any(value not in {0, 1} for one in questions for value in one.value.values())
    lost = "better in A than in B" if graded else "right in A and wrong in B"
    reason = (
        f"over {found.n} questions, {found.lost} are {lost}, {found.won} the"
        f" other way; the drop from A to B is {found.drop:.3f}, {low:.3f} to {high:.3f} with 95 %"
        f" confidence, p={found.p:.2g}"
    )
    if found.p > 0.05:
        state, headline = "untested", "No difference shown" if found.drop else "As many right"
    elif found.drop > 0:
        state, headline = "failed", "B is worse"
    else:
        state, headline = "passed", "B is better"
    return {"state": state, "headline": headline, "reasons": [reason]}


def read_json(path: Path) -> dict[str, Json]:
    """Return a result file's content; raises UsageError if missing, InputRefused if damaged."""
    try:
        found = parse_file(path, largest=RECORD)
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}",
            hint="give a folder that `build` wrote, such as dist/NAME/VERSION/TARGET",
        ) from None
    except ValueError as error:
        raise InputRefused(f"{path} is damaged: {error}", hint=_AGAIN) from None
    if not isinstance(found, dict):
        raise InputRefused(f"{path} is damaged: not a JSON object", hint="build it again")
    return found


def _siblings(folder: Path, build: BuildRecord) -> list[BuildRecord]:
    """Return this build and the other targets of its version, from their folders."""
    found = [build]
    for path in sorted(_records(_version_of(folder))):
        if path.parent == folder:
            continue
        try:
            other = read_build(path.parent)
        except (OSError, ValueError):
            continue  # another build may be writing it
        same = (other.name, other.version) == (build.name, build.version)
        if same and other.target not in {each.target for each in found}:
            found.append(other)
    return found


def _version_of(folder: Path) -> Path:
    """Return the folder with all targets of a version."""
    return folder.parent.parent if folder.name == "refused" else folder.parent


def _records(version: Path) -> list[Path]:
    """Return every build.json of a version, passed or refused."""
    return [*version.glob(f"*/{FILE}"), *version.glob(f"*/refused/{FILE}")]


def render_view(view: Mapping[str, object], template: str) -> str:
    """Return a template's text; raises UsageError if the facts lack a key that it shows."""
    folder = templates() / "report"
    style, script = ((folder / name).read_text("utf-8") for name in ("report.css", "report.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Both are our own files, without any output of a model.
    ours = {"style": Markup(style), "script": Markup(script), "script_digest": f"sha256-{digest}"}  # noqa: S704
    environment = _environment(folder, template.split(".")[-2])
    try:
        return environment.get_template(template).render({**view, **ours})
    except UndefinedError as error:
        raise UsageError(
            f"{template}: {error.message}",
            hint="build.json lacks a value of the report: build again",
        ) from None


def model_card(card: ModelCard, repository: str, files: Sequence[str]) -> str:
    """Return the README.md of a hub's repository `owner/name` that holds these files."""
    return render_view(card.view(repository, files), "card.md.j2")


@cache
def _environment(folder: Path, page: str) -> Environment:
    """Return the environment for the report's templates, compiled once for all targets.

    `page` is `html` or `md`; both escape everything that a template does not mark as markup.
    """
    environment = Environment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        autoescape=select_autoescape(("html.j2",)),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_upright if page == "html" else _cell,
    )
    environment.filters.update(
        size=human,
        cell=_cell,
        # Lines of an indented Markdown block, where only the end of the block is markup.
        code=lambda value: Markup(escaped(str(value))),  # noqa: S704
        # No Markdown, such as YAML that a library wrote, or a link's address.
        verbatim=lambda value: Markup(upright(str(value))),  # noqa: S704
        pretty=partial(json.dumps, indent=1, sort_keys=True, ensure_ascii=False),
        seconds=lambda value: f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min",
        spread=lambda value: " / ".join(
            "-" if value[k] is None else f"{value[k]:.1f}" for k in ("p50", "p95")
        ),
        capital=lambda text: text[:1].upper() + text[1:],
        day=_day,
    )
    return environment


def _write(texts: Mapping[str, str], folder: Path) -> None:
    try:
        write_folder(
            folder, {name: text.encode("utf-8", errors="replace") for name, text in texts.items()}
        )
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot write {error.filename or folder}: {error.strerror}",
            hint="choose another output folder",
        ) from None


def _upright(value: object) -> object:
    return upright(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _cell(value: object) -> Markup:
    """Return text for a cell of a Markdown table: one line, with all markup escaped.

    https://spec.commonmark.org/0.31.2/#backslash-escapes, and GitHub's own links and lists.
    """
    if isinstance(value, Markup):
        return value
    flat = " ".join(upright(str(value)).split())
    flat = _NUMBERED.sub(r"\1\\\2", _MARKDOWN.sub(r"\\\g<0>", flat))
    return Markup(flat)  # noqa: S704 - it was just escaped


def _day(created: str) -> str:
    """Return an ISO 8601 time in readable form, to the minute; any other text unchanged."""
    try:
        return datetime.fromisoformat(created).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return created


_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 has no place for, in section 2.2."""


def junit(build: BuildRecord) -> str:
    """Return the XML: one suite of gates and checks, and one of questions per task.

    A question that the image lost is a failure where its suite stopped the build, and skipped with
    the answers where the loss was within what the recipe allows.
    """
    root = ET.Element("testsuites", name=_clean(build.title))
    _gates(root, build)
    for suite in build.tasks:
        stopped = any(not one.passed and one.binding for one in suite.verdicts)
        _questions(root, suite.name, build.items_of(suite), stopped=stopped)
    for made in root:
        kinds = [child.tag for case in made for child in case]
        made.set("tests", str(len(made)))
        made.set("failures", str(kinds.count("failure")))
        made.set("skipped", str(kinds.count("skipped")))
        made.set("errors", "0")
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _gates(root: ET.Element, build: BuildRecord) -> None:
    suite = ET.SubElement(root, "testsuite", name="checks", timestamp=_clean(build.created[:19]))
    for task in build.tasks:
        for verdict in task.verdicts:
            if not verdict.binding:
                continue
            who = f"{verdict.subject} against {verdict.against or 'min_score'}"
            case = _case(suite, "gate", f"{task.name}: {who}" if task.name else who)
            if not verdict.passed:
                _child(case, "failure", verdict.reason, "")
    for one in views.speed_limits(build.bench):
        case = _case(suite, "speed", one.name)
        if one.verdict == EXCEEDED and build.refused:
            _child(case, "failure", one.reason, "")
        elif one.verdict != MET:
            _child(case, "skipped", f"{one.verdict}: {one.reason}", "")
    if build.refused and not suite.findall("testcase/failure"):
        _child(_case(suite, "gate", "published"), "failure", build.refused, "")
    for number, reason in enumerate(build.unproven, start=1):
        _child(_case(suite, "gate", f"proven {number}"), "skipped", f"not proven: {reason}", "")
    for check in build.checks:
        case = _case(suite, "image", check.name)
        case.set("time", f"{check.seconds:.3f}")
        ET.SubElement(case, "system-out").text = _clean(check.seen)


def _questions(
    root: ET.Element, name: str, items: Sequence[Mapping[str, Json]], *, stopped: bool
) -> None:
    suite = ET.SubElement(root, "testsuite", name=_clean(f"questions {name}".strip()))
    for row in views.answer_rows(views.asked(items)):
        case = _case(suite, "question", f"{row.number}. {row.prompt}"[:200])
        if row.lost:
            text = "\n".join(
                f"{'right' if said.ok else 'wrong'} {', '.join(said.who)}: {said.text}"
                for said in row.answers
            )
            message = f"expected {' or '.join(row.expected)}"
            _child(case, "failure" if stopped else "skipped", message, text)


def _case(suite: ET.Element, group: str, name: str) -> ET.Element:
    return ET.SubElement(suite, "testcase", classname=f"weightsmith.{group}", name=_clean(name))


def _child(case: ET.Element, kind: str, message: str, text: str) -> None:
    element = ET.SubElement(case, kind, message=_clean(message))
    element.text = _clean(text)


def _clean(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
