"""Facts to views: what stands where on the page, in percent of the place it has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from weightsmith.evaluating.agreement import span_text
from weightsmith.evaluating.answers import PATHS
from weightsmith.evaluating.build_record import AnsweredTask, BuildRecord, ImageRecord
from weightsmith.validating.result import Validation

_LABELS = {
    "base": "base",
    "adapter": "base + adapter",
    "merged": "merged",
    "dequantized": "dequantized weights, in transformers",
    "image": "image",
}


def verdict(build: BuildRecord) -> dict[str, Any]:
    """Return `state` (passed, failed, untested), a `headline`, and the reasons behind it."""
    binding = [v for task in build.tasks for v in task.verdicts if v.binding]
    failed = [v.reason for v in binding if not v.passed] + _earlier_failures(build)
    failed = failed or [text for text in (build.refused,) if text]
    if failed:
        return {"state": "failed", "headline": "Stopped: not published", "reasons": failed}
    last = [v.reason for v in binding if v.subject == "image"]
    if build.unproven:
        headline = "Published, but not proven" if last else "Built, not proven"
        weights = [v.reason for v in binding if v.subject == "dequantized"]
        reasons = [*build.unproven, *weights, *last, *_not_started(build.image)]
        reasons += _no_picture(build.image)
        return {"state": "untested", "headline": headline, "reasons": reasons}
    if last:
        headline = "Passed: the image is the fine-tuned model"
        reasons = [*last, *_not_started(build.image)]
        return {"state": "passed", "headline": headline, "reasons": reasons}
    reason = "no questions were asked of the image" if not binding else "the image was not started"
    reasons = [reason, *_no_picture(build.image)]
    return {"state": "untested", "headline": "Built, not proven", "reasons": reasons}


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


def _not_started(image: ImageRecord | None) -> list[str]:
    """Return which platforms' images were not started, in one sentence, if any was."""
    others = [p for p in image.platforms if p != image.started] if image and image.started else []
    if image is None or not others:
        return []
    many = "images for {} were" if len(others) > 1 else "image for {} was"
    said = many.format(" and ".join(others))
    return [f"the image for {image.started} was started and tested; the {said} not"]


def _no_picture(image: ImageRecord | None) -> list[str]:
    """Return that no picture was tried, if the image takes pictures and was not started."""
    untried = image and image.takes_pictures and not image.started
    return ["no picture was tried, because the image was not started"] if untried else []


def sameness(task: AnsweredTask) -> list[dict[str, Any]]:
    """Return each subject's sameness, with the known margins in nats, from the smallest on."""
    rows = []
    for who, same in task.sameness.items():
        known = [one.margin for one in same.differences if one.margin is not None]
        margins = span_text(min(known), max(known)) if known else ""
        rows.append({"label": _LABELS[who], **same.to_json(), "margins": margins})
    return rows


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


def score_rows(task: AnsweredTask) -> list[dict[str, Any]]:
    """Return each subject's score and interval, in percent of the axis from 0 to 1."""
    rows = []
    for path in PATHS:
        if path not in task.scores:
            continue
        facts = task.scores[path]
        low, high = facts.interval or (facts.score, facts.score)
        rows.append(
            {
                "path": path,
                "label": _LABELS[path],
                "score": facts.score,
                "n": facts.n,
                "right": round(facts.score * facts.n),
                "interval": (low, high),
                "at": _percent(facts.score),
                "from": _percent(low),
                "wide": _percent(high - low),
            }
        )
    return rows


def floor(task: AnsweredTask) -> float | None:
    """Return the score below which the image, or its weights, fail; None if neither was asked.

    In percent of the axis.
    """
    reference = task.scores.get("adapter", task.scores.get("base"))
    if reference is None or not {"image", "dequantized"} & task.scores.keys():
        return None
    return _percent(max(0.0, reference.score - task.task.max_drop))


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


def memory(plan: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the parts of the memory bar, in bytes and in percent of what is usable."""
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
    return _shares(parts.items(), all_of_it)


def layers(image: ImageRecord | None) -> list[dict[str, Any]]:
    """Return the image's layers, bottom first, in bytes and in percent of the whole."""
    if not image:
        return []
    rows = image.layers
    shares = _shares(
        ((row.file or "base image", row.size) for row in rows),
        sum(row.size for row in rows) or 1,
    )
    return [{**share, "digest": row.digest} for share, row in zip(shares, rows, strict=True)]


def _shares(parts: Any, whole: int) -> list[dict[str, Any]]:
    return [
        {"name": name, "bytes": size, "percent": round(100 * size / whole, 2)}
        for name, size in parts
    ]


def stages(build: BuildRecord) -> list[dict[str, Any]]:
    """Return each stage with its seconds, in percent of the longest."""
    longest = max((stage.seconds for stage in build.stages.values()), default=0) or 1
    return [
        {"name": name, **stage.to_json(), "percent": round(100 * stage.seconds / longest, 2)}
        for name, stage in build.stages.items()
    ]


def differences(validation: Validation | None) -> list[dict[str, Any]]:
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


def targets(builds: Sequence[BuildRecord], own: str) -> list[dict[str, Any]]:
    """Return size and quality of each target, in percent of axes from 0 to the largest size."""
    points: list[dict[str, Any]] = [
        {
            "target": build.target,
            "short": build.target.partition("-")[2] or build.target,
            "own": build.target == own,
            "bytes": build.artifact.size,
            "bits": build.artifact.bits_per_weight,
            "score": build.scores["image"].score,
            "interval": build.scores["image"].interval,
            "refused": not _is_published(build),
        }
        for build in builds
        if build.artifact and "image" in build.scores
    ]
    largest = max((point["bytes"] for point in points), default=1)
    for point in points:
        low, high = point["interval"] or (point["score"], point["score"])
        point |= {
            "x": round(92 * point["bytes"] / largest + 2, 2),
            "y": _percent(point["score"]),
            "from": _percent(low),
            "tall": _percent(high - low),
        }
    return sorted(points, key=lambda point: -point["bytes"])


def bench_rows(bench: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the load test's runs, throughput in percent of the fastest."""
    runs = (bench or {}).get("runs") or []
    fastest = max((run["requests_per_s"] for run in runs), default=0) or 1
    return [{**run, "percent": round(100 * run["requests_per_s"] / fastest, 2)} for run in runs]


def _percent(share: float) -> float:
    return round(100 * min(1.0, max(0.0, share)), 3)
