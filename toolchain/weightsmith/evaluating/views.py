"""Records to views: what stands where on the report's pages.

Widths and heights are in percent of the place they have. Equal answers stand together, and long
ones are cut, so that a thousand questions fit into a megabyte; build.json has the full texts.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from weightsmith.core.values import Json
from weightsmith.evaluating.build_record import (
    LABELS,
    ArtifactRecord,
    BuildRecord,
    ImageRecord,
    MergeRecord,
    SuiteRecord,
)
from weightsmith.evaluating.gate import reference_of
from weightsmith.evaluating.speed import FIGURES, Speed, SpeedFigure, spelled
from weightsmith.serving.memory import human
from weightsmith.validating.result import Validation

_PATHS = tuple(LABELS)
_PAGE_BYTES = 940_000
"""Of all questions with their markup: the whole page then stays below a megabyte."""
_ROW_BYTES, _ANSWER_BYTES = 190, 90
"""Markup of a question and of an answer, at most."""
_SHORTEST, _LONGEST = 20, 1200
_NOTHING = "-"
_WHOLE = ("prompt", "messages", "choices", "tools", "parts")
"""What a record has of all that a model was told."""
_Number = TypeVar("_Number", int, float)


def verdict(build: BuildRecord) -> dict[str, object]:
    """Return `state` (passed, failed, untested), a `headline`, and the reasons behind it."""
    binding = [v for suite in build.tasks for v in suite.verdicts if v.binding]
    failed = [v.reason for v in binding if not v.passed] + _earlier_failures(build)
    failed = failed or [text for text in (build.refused,) if text]
    if failed:
        return {"state": "failed", "headline": "Stopped: not published", "reasons": failed}
    image = build.image
    untried = image and image.takes_pictures and not image.started
    no_picture = ["no picture was tried, because the image was not started"] if untried else []
    last = [v.reason for v in binding if v.subject == "image"]
    if build.unproven:
        headline = "Published, but not proven" if last else "Built, not proven"
        weights = [v.reason for v in binding if v.subject == "dequantized"]
        reasons = [*build.unproven, *weights, *last, *_not_started(image), *no_picture]
        return {"state": "untested", "headline": headline, "reasons": reasons}
    if last:
        headline = "Passed: the image is the fine-tuned model"
        return {"state": "passed", "headline": headline, "reasons": [*last, *_not_started(image)]}
    reason = "no questions were asked of the image" if not binding else "the image was not started"
    reasons = [reason, *no_picture]
    return {"state": "untested", "headline": "Built, not proven", "reasons": reasons}


def _earlier_failures(build: BuildRecord) -> list[str]:
    """Return why validation or the quality of the weights stopped the build."""
    reasons = []
    if build.validation and not build.validation.passed:
        errors = [found.message for found in build.validation.errors]
        first = errors[0] if errors else "it is not what base and adapters are"
        more = f" (and {len(errors) - 1} more findings)" if len(errors) > 1 else ""
        reasons.append(f"the merged checkpoint failed its validation: {first}{more}")
    if build.quality and build.quality.exceeded and not _is_published(build):
        reasons.append(f"quantizing lost too much: {'; '.join(build.quality.exceeded)}")
    return reasons


def _is_published(build: BuildRecord) -> bool:
    return bool(build.image and build.image.reference)


def _not_started(image: ImageRecord | None) -> list[str]:
    """Return which platforms' images were not started, in one sentence, if any was."""
    others = [p for p in image.platforms if p != image.started] if image and image.started else []
    if image is None or not others:
        return []
    many = "images for {} were" if len(others) > 1 else "image for {} was"
    said = many.format(" and ".join(others))
    return [f"the image for {image.started} was started and tested; the {said} not"]


def platforms(image: ImageRecord | None) -> list[dict[str, str]]:
    """Return each platform's image, and whether it was started; [] if the only one was."""
    rows = image.platforms if image else {}
    if image is None or list(rows) == [image.started]:
        return []
    said = {True: "started and tested", False: "not started"}
    return [
        {"platform": platform, "digest": digest, "tested": said[platform == image.started]}
        for platform, digest in rows.items()
    ]


def sameness(task: SuiteRecord) -> list[dict[str, object]]:
    """Return each subject's sameness, with the known margins in nats, from the smallest on."""
    rows: list[dict[str, object]] = []
    for who, same in task.sameness.items():
        known = [one.margin for one in same.differences if one.margin is not None]
        ends = dict.fromkeys(f"{end:.2g}" for end in (min(known), max(known))) if known else ()
        row = {"label": LABELS[who], **same.to_json(), "margins": " to ".join(ends)}
        rows.append({**row, "cosine": same.cosine})
    return rows


def score_rows(task: SuiteRecord) -> list[dict[str, object]]:
    """Return each subject's score and interval, in percent of the axis from 0 to 1."""
    rows: list[dict[str, object]] = []
    for path in _PATHS:
        if path not in task.scores:
            continue
        facts = task.scores[path]
        low, high = facts.interval or (facts.score, facts.score)
        rows.append(
            {
                "path": path,
                "label": LABELS[path],
                "score": facts.score,
                "n": facts.n,
                "right": facts.right,
                "figures": [
                    *(f"{n} {spelled(v)}" for n, v in facts.figures.items()),
                    *filter(None, [facts.asked]),
                ],
                "interval": (low, high),
                "at": _percent(facts.score),
                "from": _percent(low),
                "wide": _percent(high - low),
            }
        )
    return rows


def suite_rows(build: BuildRecord) -> list[dict[str, object]]:
    """Return a row per suite: its rule, the last score, its interval and the verdict."""
    rows: list[dict[str, object]] = []
    for suite in build.tasks:
        scores = score_rows(suite)
        last = next((v for v in reversed(suite.verdicts) if v.binding and v.comparison), None)
        rule = suite.task
        than = "the base" if rule.against == "base" else "base + adapter"
        allowed = f"at most {rule.max_drop:g} below {than}"
        rows.append(
            {
                **scores[-1],
                "name": suite.name or "questions",
                "metric": rule.metric,
                "rule": allowed if rule.against else f"at least {rule.min_score:g}",
                "drop": last.comparison.drop if last and last.comparison else None,
                "drop_interval": last.comparison.interval if last and last.comparison else None,
                "verdict": suite.verdict,
            }
        )
    return rows


def speed(found: Speed | None) -> list[dict[str, object]]:
    """Return each measurement's rows: what was measured here, and each results file."""
    if found is None:
        return []
    parts: list[dict[str, object]] = []
    if found.skipped:
        parts.append(_speed_part("Not measured", found.skipped, ()))
    if found.figures:
        prompt = f"{found.prompt_tokens} " if found.prompt_tokens else ""
        said = (
            f"{found.requests} requests in {found.rounds} rounds, {found.concurrency} at once,"
            f" {prompt}tokens in and {found.output_tokens} out"
        )
        failed = f"; {found.errors} failed" if found.errors else ""
        on = found.machine or "an unknown device"
        parts.append(_speed_part(f"Measured on {on}", said + failed, found.figures))
    if found.drafts:
        said = f"{found.drafts.questions} of the questions: {found.drafts.reason}"
        parts.append(_speed_part("With drafts and without", said, ()))
    for one in found.evidence:
        seen = f" on {', '.join(one.devices)}" if one.devices else ""
        said = (
            f"{one.requests} requests, {one.errors} failed, {one.concurrency:g} at once,"
            f" {one.prompt_tokens:g} tokens in and {one.output_tokens:g} out; sha256 {one.sha256}"
        )
        said += "" if one.image else "; nothing shows that it is about this image"
        title = f"{one.file}, measured by {one.tool} {one.version}".rstrip() + seen
        parts.append(_speed_part(title, said, one.figures))
    return parts


def _speed_part(title: str, said: str, figures: Sequence[SpeedFigure]) -> dict[str, object]:
    return {"title": title, "said": said, "rows": [*map(_speed_row, figures)]}


def _speed_row(one: SpeedFigure) -> dict[str, object]:
    title, unit = FIGURES.get(one.name, (one.name, ""))
    low, high = one.interval or (one.value, one.value)
    ends = f"{spelled(low)} to {spelled(high)}" if one.interval else ""
    return {
        "name": f"{title}, {unit}" if unit else title,
        "value": spelled(one.value),
        "interval": ends,
        "limit": "" if one.limit is None else spelled(one.limit),
        "verdict": one.verdict,
    }


def speed_limits(found: Speed | None) -> list[SpeedFigure]:
    """Return the figures that have a limit, measured here."""
    return [one for one in found.figures if one.verdict] if found else []


def floor(task: SuiteRecord) -> float | None:
    """Return the score below which the image, or its weights, fail; None if neither was asked.

    In percent of the axis.
    """
    if not {"image", "dequantized"} & task.scores.keys():
        return None
    lowest = task.task.min_score
    if reference := task.scores.get(reference_of(task.task.against, task.scores)):
        lowest = max(lowest, reference.score - task.task.max_drop)
    return _percent(max(0.0, lowest))


def flow(build: BuildRecord) -> list[list[dict[str, str]]]:
    """Return what was built from what: columns of boxes, from the sources to the image."""
    sources = [_box("base", build.base.source, build.base.digest)]
    for number, adapter in enumerate(build.adapters, start=1):
        many = f" {number}" if len(build.adapters) > 1 else ""
        kind = f"adapter{many} {adapter.version}".strip()
        times = f" × {adapter.weight:g}" if adapter.weight != 1 else ""  # noqa: RUF001
        sources.append(_box(kind, f"{adapter.source}{times}", adapter.digest))
    columns = [sources]
    merge, artifact, image = build.merge, build.artifact, build.image
    if merge and build.adapters:
        counted = ", ".join(f"{n} {kind}" for kind, n in merge.tensors.items() if n)
        columns.append([_box("merged", f"{merge.method}: {counted}", merge.digest)])
    if artifact:
        columns.append([_box(artifact.format, artifact.file, artifact.digest)])
    if image:
        columns.append([_box("image", image.reference or "not published", image.digest)])
    return columns


def _box(kind: str, what: str, digest: str) -> dict[str, str]:
    return {"kind": kind, "what": what, "digest": digest, "short": digest[7:19]}


def memory(build: BuildRecord) -> list[dict[str, object]]:
    """Return the parts of the plan's memory, in bytes and in percent of what is usable."""
    plan = build.plan
    if not plan or "weight_bytes" not in plan:
        return []
    parts = {
        "weights": int(plan["weight_bytes"]),
        "cache": int(plan["kv_bytes_total"]),
        "overhead": int(plan["overhead_bytes"]),
    }
    # A plan that leaves layers on the host needs more than the GPU has: the bar shows all of it.
    all_of_it = max(int(plan.get("usable_bytes", 0)), sum(parts.values())) or 1
    parts["free"] = all_of_it - sum(parts.values())
    return [
        {"name": name, "bytes": size, "percent": round(100 * size / all_of_it, 2)}
        for name, size in parts.items()
    ]


def layers(image: ImageRecord | None) -> list[dict[str, object]]:
    """Return the image's layers, bottom first, in bytes and in percent of the whole."""
    rows = image.layers if image else ()
    whole = sum(row.size for row in rows) or 1
    return [
        {
            "name": row.file or "base image",
            "bytes": row.size,
            "percent": round(100 * row.size / whole, 2),
            "digest": row.digest,
        }
        for row in rows
    ]


def stages(build: BuildRecord) -> list[dict[str, object]]:
    """Return each stage with its seconds, in percent of the longest."""
    longest = max((stage.seconds for stage in build.stages.values()), default=0) or 1
    return [
        {"name": name, **stage.to_json(), "percent": round(100 * stage.seconds / longest, 2)}
        for name, stage in build.stages.items()
    ]


def differences(validation: Validation | None) -> list[dict[str, object]]:
    """Return how far each layer is off, on a logarithmic axis of eight decades.

    `percent` and `explained` (by rounding) are of the largest value; 0 for an exact zero.
    """
    rows = validation.comparison.layers if validation and validation.comparison else ()
    largest = max((max(row.difference, row.rounding) for row in rows), default=0.0)
    return [
        {
            **row.to_json(),
            "percent": _decades(row.difference, largest),
            "explained": _decades(row.rounding, largest),
        }
        for row in rows
    ]


def _decades(value: float, largest: float) -> float:
    if not value or not largest or not math.isfinite(value):
        return 0.0 if not value else 100.0
    return round(100 * max(0.02, 1 + math.log10(abs(value) / largest) / 8), 2)


def targets(builds: Sequence[BuildRecord], own: str) -> list[dict[str, object]]:
    """Return size and quality of each target, in percent of axes from 0 to the largest size."""
    shown = [
        (b, b.artifact, b.scores["image"]) for b in builds if b.artifact and "image" in b.scores
    ]
    shown.sort(key=lambda one: -one[1].size)
    rows: list[dict[str, object]] = []
    for build, artifact, facts in shown:
        low, high = facts.interval or (facts.score, facts.score)
        rows.append(
            {
                "target": build.target,
                "short": build.target.partition("-")[2] or build.target,
                "own": build.target == own,
                "bytes": artifact.size,
                "bits": artifact.bits_per_weight,
                "score": facts.score,
                "refused": not _is_published(build),
                "x": round(92 * artifact.size / shown[0][1].size + 2, 2),
                "y": _percent(facts.score),
                "from": _percent(low),
                "tall": _percent(high - low),
            }
        )
    return rows


def choice(build: BuildRecord) -> dict[str, object] | None:
    """Return what `auto` tried and why the rest was left, and of what was asked size and score."""
    if (auto := build.auto) is None:
        return None
    asked = [one for one in auto.candidates if one.sequence]
    largest = max((one.size for one in asked), default=0) or 1
    points = []
    for one in sorted(asked, key=lambda one: -one.size):
        first = one.sequence[0]
        low, high = (first.score + first.drop - end for end in reversed(first.interval))
        points.append(
            {
                "target": one.name,
                "short": one.name.partition("-")[2],
                "own": not one.left,
                "bytes": one.size,
                "bits": None,
                "score": first.score,
                "refused": bool(one.left),
                "x": round(92 * one.size / largest + 2, 2),
                "y": _percent(first.score),
                "from": _percent(low),
                "tall": _percent(min(1.0, high) - max(0.0, low)),
            }
        )
    rows = [
        {**one.to_json(), "name": one.name, "bytes": one.size or one.price, "fast": one.fast}
        for one in auto.candidates
    ]
    return {**auto.to_json(), "prefer": auto.prefer, "rows": rows, "points": points}


def _percent(share: float) -> float:
    return round(100 * min(1.0, max(0.0, share)), 3)


@dataclass(frozen=True, slots=True)
class Asked:
    """A recorded question: everyone's answer, and who was right."""

    prompt: str
    expected: Sequence[str]
    said: Mapping[str, str]
    ok: Mapping[str, bool]
    value: Mapping[str, float]
    """Everyone's score, from 0 (wrong) to 1 (right)."""
    suite: str = ""
    whole: str = ""
    """All that was asked, as JSON: questions may have a last message in common."""


def asked(items: Sequence[Mapping[str, Json]]) -> list[Asked]:
    """Return the questions of a record's `items`."""
    return [
        Asked(
            prompt=str(item["prompt"]),
            expected=[str(text) for text in item["expected"]],
            said={path: _said(item, path) for path in _PATHS if path in item},
            ok={path: bool(right) for path, right in item["ok"].items()},
            value={**item["ok"], **item.get("value", {})},
            suite=str(item.get("suite", "")),
            whole=json.dumps([item.get(key) for key in _WHOLE], sort_keys=True),
        )
        for item in items
    ]


def _said(item: Mapping[str, Json], path: str) -> str:
    """Return an answer, with what went wrong at the server."""
    keys = ("error", "unjudged", "parser", "value")
    error, unjudged, fault, value = (item.get(key, {}).get(path) for key in keys)
    if error:
        return f"(no answer: {error})"
    if unjudged:
        return f"{item[path]} (not judged: {unjudged})"
    graded = "" if value is None else f" ({float(value):.3f})"
    return f"{item[path]}{graded}" + (f" ({fault})" if fault else "")


def shared_questions(first: BuildRecord, second: BuildRecord) -> list[Asked]:
    """Return the questions that both images were asked, with the suite's name if there are several.

    The first image's answers stand for the adapter's, against which the second's are held. Two
    suites may ask the same; a suite of another name is matched by the question alone.
    """
    old = [one for one in asked(first.items) if "image" in one.said]
    new = [one for one in asked(second.items) if "image" in one.said]
    before: dict[object, Asked] = {one.whole: one for one in old}
    before |= {(one.suite, one.whole): one for one in old}
    pairs = ((before.get((n.suite, n.whole)) or before.get(n.whole), n) for n in new)
    several = len({one.suite for one in new}) > 1
    return [
        Asked(
            prompt=f"{now.suite}: {now.prompt}" if several else now.prompt,
            expected=now.expected,
            said={"adapter": was.said["image"], "image": now.said["image"]},
            ok={"adapter": was.ok["image"], "image": now.ok["image"]},
            value={"adapter": was.value["image"], "image": now.value["image"]},
            suite=now.suite,
        )
        for was, now in pairs
        if was is not None
    ]


@dataclass(frozen=True, slots=True)
class Said:
    """An answer with everyone who gave it."""

    who: Sequence[str]
    ok: bool
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRow:
    """A question as the page shows it, and what it is filtered by."""

    number: int
    prompt: str
    expected: Sequence[str]
    answers: Sequence[Said]
    changed: bool
    """Whether a later subject is not right or wrong as an earlier one, from the adapter on."""
    worded: bool
    wrong: bool
    lost: bool
    """Whether image or dequantized weights are worse than the adapter was."""


def answer_rows(
    questions: Sequence[Asked], names: Mapping[str, str] | None = None
) -> list[AnswerRow]:
    """Return one row per question; `names` replaces those of who answered."""
    longest, rows = _cut_length(questions), []
    for number, one in enumerate(questions, start=1):
        said: dict[tuple[str, bool], list[str]] = {}
        for path, text in one.said.items():
            said.setdefault((text, one.ok.get(path, False)), []).append(path)
        before = one.value.get("adapter", one.value.get("base", 1.0))
        served = one.value.get("image", one.value.get("dequantized"))
        rows.append(
            AnswerRow(
                number=number,
                prompt=_cut(one.prompt, longest),
                expected=[_cut(text, longest) for text in one.expected],
                answers=[
                    Said([(names or {}).get(path, path) for path in who], ok, _cut(text, longest))
                    for (text, ok), who in said.items()
                ],
                changed=len({one.value[path] for path in _PATHS[1:] if path in one.value}) > 1,
                worded=len({text for (text, _), who in said.items() if who != ["base"]}) > 1,
                wrong=(one.value.get("merged", 1.0) if served is None else served) < 1,
                lost=served is not None and served < before,
            )
        )
    return rows


def _cut_length(questions: Sequence[Asked]) -> int:
    """Return the length in characters at which texts are cut, so that all fit on the page."""
    texts: list[str] = []
    markup = 0
    for one in questions:
        said = set(one.said.values())
        markup += _ROW_BYTES + len(said) * _ANSWER_BYTES
        texts += [*said, one.prompt, *one.expected]
    # Escaped, and in UTF-8: a character may take many bytes.
    sizes = [
        (len(text), len(html.escape(text).encode("utf-8", "replace"))) for text in texts if text
    ]
    longest = _LONGEST
    while (
        longest > _SHORTEST
        and markup + sum(size * min(1.0, (longest + 3) / length) for length, size in sizes)
        > _PAGE_BYTES
    ):
        longest = max(_SHORTEST, longest * 4 // 5)
    return longest


def _cut(text: str, longest: int) -> str:
    """Return a text of at most that many characters, its middle left out."""
    if len(text) <= longest:
        return text
    head = longest * 2 // 3
    return f"{text[:head]} … {text[len(text) - (longest - head) :]}"


def counts(rows: Sequence[AnswerRow]) -> dict[str, int]:
    """Return how many rows each filter shows."""
    return {
        "all": len(rows),
        "changed": sum(row.changed for row in rows),
        "worded": sum(row.worded for row in rows),
        "wrong": sum(row.wrong for row in rows),
    }


def fact_rows(a: BuildRecord, b: BuildRecord) -> list[dict[str, object]]:
    """Return the table of what the two builds are: name, both values, and whether they differ."""
    both = (a, b)
    adapters = [", ".join(x.digest[7:19] for x in one.adapters) or _NOTHING for one in both]
    formats = [one.artifact.format if one.artifact else _NOTHING for one in both]
    rows = [
        _row("target", [a.target, b.target]),
        _row("version", [a.version, b.version]),
        _row("built", [one.created[:16].replace("T", " ") for one in both], note=False),
        _row("base", [a.base.digest, b.base.digest], code=True),
        _row("adapters", adapters, code=True),
        _row("merged", [_digest(one.merge) for one in both], code=True),
        _row("weights", [_digest(one.artifact) for one in both], code=True),
        _row("image", [_digest(one.image) for one in both], code=True),
        _row("format", formats),
    ]
    sizes = [one.artifact.size if one.artifact else None for one in both]
    rows.append(_numbers("size of the weights", sizes, human))
    bits = [one.artifact.bits_per_weight if one.artifact else None for one in both]
    rows.append(_numbers("bits per weight", bits, "{:.2f}".format))
    suites = [{suite.name: suite.scores for suite in one.tasks} for one in both]
    for name in dict.fromkeys((*suites[0], *suites[1])) or [""]:
        asked = [one.get(name, {}) for one in suites]
        scores = [one["image"].score if "image" in one else None for one in asked]
        what = f"score of the image, {name}" if name else "score of the image"
        rows.append(_numbers(what, scores, "{:.3f}".format))
    layers = [{x.digest: x.size for x in one.image.layers} if one.image else {} for one in both]
    shared = sum(size for digest, size in layers[0].items() if digest in layers[1])
    total = [sum(sizes.values()) or None for sizes in layers]
    rows.append(_numbers("size of the image", total, human))
    rows.append(_numbers("of it in layers that both have", [shared, shared], human, note=False))
    for key, name in (("max_num_seqs", "requests at once"), ("max_model_len", "tokens a request")):
        rows.append(_row(name, [str((one.plan or {}).get(key, _NOTHING)) for one in both]))
    speeds = [one.bench or Speed(image="") for one in both]
    if any(one.figures for one in speeds):
        rows.append(_row("speed measured on", [one.machine or _NOTHING for one in speeds]))
    for key, (name, unit) in FIGURES.items():
        values = [next((f.value for f in one.figures if f.name == key), None) for one in speeds]
        if values != [None, None]:
            rows.append(_numbers(f"{name}, {unit}" if unit else name, values, spelled))
    return rows


def _digest(part: MergeRecord | ArtifactRecord | ImageRecord | None) -> str:
    return (part.digest if part else "") or _NOTHING


def _row(
    name: str, values: Sequence[str], *, code: bool = False, note: bool = True
) -> dict[str, object]:
    same = "the same" if values[0] == values[1] else "differs"
    shown = [v[7:19] if code and v.startswith("sha256:") else v for v in values]
    return {"name": name, "values": shown, "code": code, "note": same if note else ""}


def _numbers(
    name: str,
    values: Sequence[_Number | None],
    spell: Callable[[_Number], str],
    *,
    note: bool = True,
) -> dict[str, object]:
    text = ""
    first, second = values
    if note and first and second is not None and first != second:
        text = f"B has {second / first:.2f} of A"
    elif note and first == second:
        text = "the same"
    shown = [_NOTHING if value is None else spell(value) for value in values]
    return {"name": name, "values": shown, "code": False, "note": text}
