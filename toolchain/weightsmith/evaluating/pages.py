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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias
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
from weightsmith.core.values import Json, JsonValue, Score
from weightsmith.evaluating import answers, comparing, views
from weightsmith.evaluating.answers import rows
from weightsmith.evaluating.build_record import AnsweredTask, BuildRecord, read_build
from weightsmith.evaluating.card import ModelCard
from weightsmith.evaluating.gate import DropLimit, judge_drop
from weightsmith.serving.memory import human

_BUILD, _BENCH = "build.json", "bench.json"
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
        raise InputRefused(
            f"{path} is damaged: {type(error).__name__}: {error}"[:300],
            hint="build it again; cached stages are not repeated",
        ) from error
    except TemplateError as error:
        raise InputRefused(
            f"{path} is damaged: {error.message}",
            hint="build it again; cached stages are not repeated",
        ) from error


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
    bench = read_json(folder / _BENCH) if (folder / _BENCH).is_file() else None
    view = build_view(build, _siblings(folder, build), bench)
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
    others = {*_records(version), folder / _BENCH, version} - {folder / _BUILD}
    files = filter(None, (written.html, written.markdown, written.junit))
    try:
        oldest = min(path.stat().st_mtime_ns for path in files)
        newest = max(path.stat().st_mtime_ns for path in others if path.exists())
        record = (folder / _BUILD).stat().st_mtime_ns
        # A later time than now was set before the clock was put back, and says nothing.
        return record <= oldest and newest < oldest <= time.time_ns()
    except OSError:
        return False


def write_comparison(first: Path, second: Path, folder: Path) -> Written:
    """Write compare.html and compare.md of two builds' folders; raises what `read_json` raises."""
    view = comparison_view(_side(first), _side(second))
    _write({name: render_view(view, f"{name}.j2") for name in ("compare.html", "compare.md")},
           folder)  # fmt: skip
    return Written(html=folder / "compare.html", markdown=folder / "compare.md")


def build_view(
    build: BuildRecord, targets: Sequence[BuildRecord], bench: Mapping[str, Json] | None
) -> dict[str, Any]:
    """Return what the templates show of a build; `targets` are all targets of the version."""
    return {
        **build.to_json(),
        "verdict": views.verdict(build),
        # The verdict already shows these.
        "warnings": [w for w in build.warnings if not w.startswith(_IN_VERDICT)],
        "tasks": [_task_view(task) for task in build.tasks],
        "flow": views.flow(build),
        "differences": views.differences(build.validation),
        "memory": views.memory(build.plan),
        "layers": views.layers(build.image),
        "platforms": views.platforms(build.image),
        "stages": views.stages(build),
        "targets": views.targets(targets, build.target),
        "bench": {**bench, "rows": views.bench_rows(bench)} if bench else None,
        "title": build.title,
    }


def _task_view(task: AnsweredTask) -> dict[str, Any]:
    rows = answers.rows(task.items)
    return {
        **task.to_json(),
        "rows": views.score_rows(task),
        "same": views.sameness(task),
        "floor": views.floor(task),
        "answers": rows,
        "counts": answers.counts(rows),
    }


_Side: TypeAlias = tuple[BuildRecord, dict[str, Any]]
"""A build and its view."""


def comparison_view(first: _Side, second: _Side) -> dict[str, Any]:
    """Return what the comparison shows of two builds."""
    a, b = first[0], second[0]
    items = comparing.shared_items(a.items, b.items)
    rows = comparing.answer_rows(items)
    return {
        "sides": [{**first[1], "letter": "A"}, {**second[1], "letter": "B"}],
        "verdict": _compared(items),
        "facts": [_shown(row) for row in comparing.fact_rows(a, b)],
        "answers": rows,
        "counts": answers.counts(rows),
    }


def _compared(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not items:
        return {
            "state": "untested",
            "headline": "Not compared by answers",
            "reasons": ["the two images were evaluated on different questions"],
        }
    before, now = (_score(items, who) for who in ("adapter", "image"))
    found = judge_drop("this", now, "other", before, DropLimit(max_drop=1.0)).comparison
    if found is None:
        raise AssertionError("both sides have all items")
    low, high = found.interval
    reason = (
        f"over {found.n} questions, {found.lost} are right in A and wrong in B, {found.won} the"
        f" other way; the drop from A to B is {found.drop:.3f}, {low:.3f} to {high:.3f} with 95 %"
        f" confidence, p={found.p:.2g}"
    )
    if found.p > 0.05:
        headline = "No difference shown" if found.drop else "As many right"
        return {"state": "untested", "headline": headline, "reasons": [reason]}
    better = "B is worse" if found.drop > 0 else "B is better"
    return {"state": "failed" if found.drop > 0 else "passed", "headline": better,
            "reasons": [reason]}  # fmt: skip


def _score(items: Sequence[Mapping[str, Any]], who: str) -> Score:
    rows = tuple({"prompt": i["prompt"], "answer": i[who], "ok": i["ok"][who]} for i in items)
    right = sum(row["ok"] for row in rows)
    return Score(score=right / len(rows), n=len(rows), metric="", per_item=rows)


def _shown(row: Mapping[str, Any]) -> Mapping[str, Any]:
    spell: Mapping[str, Callable[[Any], str]] = {
        "bytes": human,
        "number": "{:.2f}".format,
        "share": "{:.3f}".format,
    }
    if not row["kind"]:
        return row
    values = ["-" if v is None else spell[row["kind"]](v) for v in row["values"]]
    return {**row, "values": values}


def read_json(path: Path) -> Any:
    """Return a result file's content; raises UsageError if missing, InputRefused if damaged."""
    try:
        found = parse_file(path, largest=RECORD)
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}",
            hint="give a folder that `build` wrote, such as dist/NAME/VERSION/TARGET",
        ) from None
    except ValueError as error:
        raise InputRefused(
            f"{path} is damaged: {error}", hint="build it again; cached stages are not repeated"
        ) from None
    if not isinstance(found, dict):
        raise InputRefused(f"{path} is damaged: not a JSON object", hint="build it again")
    return found


def _side(place: Path) -> _Side:
    folder = place.parent if place.name == _BUILD else place
    bench = read_json(folder / _BENCH) if (folder / _BENCH).is_file() else None
    with read_as_facts(folder / _BUILD):
        build = BuildRecord.from_json(read_json(folder / _BUILD))
        return build, build_view(build, (), bench)


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
    return [*version.glob(f"*/{_BUILD}"), *version.glob(f"*/refused/{_BUILD}")]


def render_view(view: Mapping[str, Any], template: str) -> str:
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
        code=_code,
        verbatim=_verbatim,
        pretty=_pretty,
        seconds=_seconds,
        spread=_spread,
        capital=_capital,
        sentence=_sentence,
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


def _cell(value: JsonValue) -> Markup:
    """Return text for a cell of a Markdown table: one line, with all markup escaped.

    https://spec.commonmark.org/0.31.2/#backslash-escapes, and GitHub's own links and lists.
    """
    if isinstance(value, Markup):
        return value
    flat = " ".join(upright(str(value)).split())
    flat = _NUMBERED.sub(r"\1\\\2", _MARKDOWN.sub(r"\\\g<0>", flat))
    return Markup(flat)  # noqa: S704 - it was just escaped


def _code(value: JsonValue) -> Markup:
    """Return a line of an indented Markdown block, where only the end of the block is markup."""
    return Markup(escaped(str(value)))  # noqa: S704 - an indented block shows it verbatim


def _verbatim(value: JsonValue) -> Markup:
    """Return a text that is no Markdown, such as YAML that a library wrote, or a link's address."""
    return Markup(upright(str(value)))  # noqa: S704 - its caller knows that nothing in it is markup


def _upright(value: JsonValue) -> JsonValue:
    """Return a value's text for HTML; autoescaping does the rest."""
    return upright(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _pretty(value: JsonValue) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def _spread(value: Mapping[str, float | None]) -> str:
    return " / ".join("-" if value[k] is None else f"{value[k]:.1f}" for k in ("p50", "p95"))


def _day(created: str) -> str:
    """Return an ISO 8601 time in readable form, to the minute; any other text unchanged."""
    try:
        return datetime.fromisoformat(created).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return created


def _sentence(finding: JsonValue) -> str:
    """Return a finding as text; it is a text, or a mapping that contains one."""
    if isinstance(finding, Mapping):
        texts = [finding.get(key) for key in ("message", "text", "detail") if finding.get(key)]
        return str(texts[0]) if texts else json.dumps(finding, sort_keys=True)
    return str(finding)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 has no place for, in section 2.2."""


def junit(build: BuildRecord) -> str:
    """Return the XML: one suite of gates and checks, and one of questions per task.

    A question that the image lost is a failure where the build was stopped, and skipped with the
    answers where the loss was within what the recipe allows.
    """
    root = ET.Element("testsuites", name=_clean(build.title))
    _gates(root, build)
    stopped = any(not v.passed and v.binding for task in build.tasks for v in task.verdicts)
    for task in build.tasks:
        _questions(root, task, stopped=stopped)
    for suite in root:
        kinds = [child.tag for case in suite for child in case]
        suite.set("tests", str(len(suite)))
        suite.set("failures", str(kinds.count("failure")))
        suite.set("skipped", str(kinds.count("skipped")))
        suite.set("errors", "0")
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
    if build.refused and not suite.findall("testcase/failure"):
        _child(_case(suite, "gate", "published"), "failure", build.refused, "")
    for number, reason in enumerate(build.unproven, start=1):
        _child(_case(suite, "gate", f"proven {number}"), "skipped", f"not proven: {reason}", "")
    for check in build.checks:
        case = _case(suite, "image", check.name)
        case.set("time", f"{check.seconds:.3f}")
        ET.SubElement(case, "system-out").text = _clean(check.seen)


def _questions(root: ET.Element, task: AnsweredTask, *, stopped: bool) -> None:
    suite = ET.SubElement(root, "testsuite", name=_clean(f"questions {task.name}".strip()))
    for row in rows(task.items):
        case = _case(suite, "question", f"{row['number']}. {row['prompt']}"[:200])
        if row["lost"]:
            text = "\n".join(
                f"{'right' if a['ok'] else 'wrong'} {', '.join(a['who'])}: {a['text']}"
                for a in row["answers"]
            )
            message = f"expected {' or '.join(row['expected'])}"
            _child(case, "failure" if stopped else "skipped", message, text)


def _case(suite: ET.Element, group: str, name: str) -> ET.Element:
    return ET.SubElement(suite, "testcase", classname=f"weightsmith.{group}", name=_clean(name))


def _child(case: ET.Element, kind: str, message: str, text: str) -> None:
    element = ET.SubElement(case, kind, message=_clean(message))
    element.text = _clean(text)


def _clean(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
